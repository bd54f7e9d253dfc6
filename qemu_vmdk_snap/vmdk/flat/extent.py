"""The flat extent (FLAT, VMFS): byte n of the extent is byte n of a file, from the offset in its descriptor line on.

It hides its parent everywhere, so holes of the file are zeros. Bytes past the end of a file that is too short are
zeros too, as QEMU reads them; the extent's notes say so.

Source: VMware Virtual Disk Format 5.0, "Extent descriptions"; the offset counts for FLAT alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer
from qemu_vmdk_snap.units import KIB, sector_bytes
from qemu_vmdk_snap.vmdk import shortfall
from qemu_vmdk_snap.vmdk.extent import Below, ExtentSpec, Place
from qemu_vmdk_snap.vmdk.runs import DATA, NO_SOURCE, ZERO, RunTable

UNIT: Final = 64 * KIB
"""Its nominal grain: bounds the windows in which a chain with it is resolved."""


def open_extent(spec: ExtentSpec) -> FlatExtent:
    """Open a flat extent."""
    if spec.file is None:
        raise FormatError(spec.path, spec.line.at, "extent", spec.line.type, "must name a file")
    start = sector_bytes(spec.line.offset) if spec.line.type == "FLAT" else 0
    return FlatExtent(spec.file, spec.path, start, sector_bytes(spec.line.sectors), writable=spec.writable)


class FlatExtent:
    """One open flat extent."""

    def __init__(self, file: BlockFile, path: Path, start: int, capacity: int, *, writable: bool) -> None:
        self._file = file
        self._path = path
        self._start = start
        self._capacity = capacity
        self._writable = writable
        self.notes = shortfall.of_flat(path, file.size(), start, capacity)

    @property
    def capacity(self) -> int:
        """Bytes of the guest's disk that it stands for."""
        return self._capacity

    @property
    def grain_bytes(self) -> int:
        """A nominal unit: nothing is allocated."""
        return UNIT

    @property
    def varied_bytes(self) -> int:
        """Where its file ends: what is missing of it is one run."""
        return 0 if self._writable else min(self._capacity, max(0, self._file.size() - self._start))

    @property
    def file(self) -> BlockFile:
        """The file that holds it."""
        return self._file

    def lookup(self, offset: int) -> Place:
        """Return where the byte at `offset` is: always stored, to the end of the extent."""
        return Place(DATA, self._start + offset, self._capacity - offset)

    def resolve(self, start: int, end: int) -> RunTable:
        """Return the runs of [start, end): data, and zeros where the file has holes.

        While the extent is open for writing everything is data, so that it is filled in place.
        """
        if self._writable:
            return RunTable.single(start, end, DATA, file_offset=self._start + start)
        rows = self._begins(start, end)
        begins, kinds = np.array(rows, np.int64).T
        places = np.where(kinds == DATA, begins + self._start, 0)
        return RunTable(begins, kinds.astype(np.uint8), np.full(len(rows), NO_SOURCE, np.int64), places, end)

    def small_entries(self) -> int | None:
        """Return 0: it has no tables; None while it is written."""
        return None if self._writable else 0

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (offset, length, kind, file offset) of what is in [start, end), as `resolve` has it."""
        rows = self._begins(start, end)
        for (begin, kind), (stop, _) in zip(rows, [*rows[1:], (end, ZERO)], strict=True):
            yield begin, stop - begin, kind, begin + self._start if kind == DATA else 0

    def _begins(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return where each run of [start, end) begins, and its kind."""
        rows: list[tuple[int, int]] = []
        offset = start
        limit = min(end, max(start, self._file.size() - self._start))
        while offset < limit:
            data = min(limit, self._file.next_data(self._start + offset) - self._start)
            if data > offset:
                rows.append((offset, ZERO))
            if data < limit:
                rows.append((data, DATA))
                data = min(limit, self._file.next_hole(self._start + data) - self._start)
            offset = data
        if offset < end and (not rows or rows[-1][1] != ZERO):
            rows.append((offset, ZERO))  # the file ends inside the extent
        return rows

    def read_grain(self, file_offset: int) -> bytes:
        """Never called: this kind has no compressed grains."""
        raise NotImplementedError(f"{self._path}: no compressed grain at {file_offset:#x}")

    def write(self, offset: int, data: Buffer, below: Below) -> None:
        """Write `data` in place."""
        if not self._writable:
            raise Unsupported(self._path, f"the extent is read-only: guest data at its byte {offset} cannot change")
        self._file.write_at(self._start + offset, data)

    def flush(self) -> None:
        """Return when all writes are durable."""
        # This includes what the kernel copied into the file, without a write here.
        if self._writable:
            self._file.flush()
