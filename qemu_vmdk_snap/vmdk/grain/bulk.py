"""Filling a new image in one pass by ascending offsets: nothing is read back, and the kernel copies the bytes."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer
from qemu_vmdk_snap.storage.copying import Copier
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes

OnStep = Callable[[int], None]
MAX_FILE_SECTORS: Final = 1 << 32


class BulkWriter(Protocol):
    """Takes the data of a new disk by ascending offsets (bytes); what is not written reads as zeros."""

    def put(self, offset: int, length: int, source: BlockFile, source_offset: int, on_step: OnStep) -> None:
        """Copy `length` bytes of `source` to `offset`; `on_step` is called at least every 64 MiB."""

    def put_bytes(self, offset: int, data: Buffer) -> None:
        """Write `data` to `offset`."""

    def finish(self) -> None:
        """Complete the file: every table and its full length. Its creator makes it durable."""


class BulkFlat:
    """Fills a file whose byte n is byte n of the disk: raw images and flat extents."""

    def __init__(self, file: BlockFile, capacity: int, *, start: int = 0) -> None:
        file.truncate(start + capacity)
        self._file = file
        self._start = start
        self._copier = Copier(file)

    def put(self, offset: int, length: int, source: BlockFile, source_offset: int, on_step: OnStep) -> None:
        """Copy `length` bytes of `source` to `offset`."""
        self._copier.copy(source, source_offset, self._start + offset, length, on_step)

    def put_bytes(self, offset: int, data: Buffer) -> None:
        """Write `data` to `offset`."""
        self._copier.write(self._start + offset, data)

    def finish(self) -> None:
        """Do nothing: the length was set at the start."""


class GrainHeader(Protocol):
    """The fields of a header that the writer needs."""

    @property
    def grain_size(self) -> int:
        """Sectors of a grain."""

    @property
    def gtes_per_gt(self) -> int:
        """Entries of one grain table."""

    @property
    def gt_sectors(self) -> int:
        """Sectors that one grain table takes in the file."""

    @property
    def overhead(self) -> int:
        """Sector where the grains begin."""


class GrainLayout(Protocol):
    """Where the parts of a new extent with grains are."""

    @property
    def header(self) -> GrainHeader:
        """Its header."""

    @property
    def rgt_sector(self) -> int:
        """The sector where the redundant tables begin; the same as `gt_sector` where there are none."""

    @property
    def gt_sector(self) -> int:
        """The sector where the tables begin, one after the other."""


class BulkSparse:
    """Fills a hosted sparse extent: grains in guest order after the overhead, so that long runs stay long."""

    def __init__(self, file: BlockFile, layout: GrainLayout) -> None:
        self._file = file
        self._layout = layout
        self._copier = Copier(file)
        self._unit = sector_bytes(layout.header.grain_size)
        self._end: int = sector_bytes(layout.header.overhead)
        self._last_grain = -1
        self._last_position = 0
        self._tables_at_once = 512
        self._window = -1
        self._entries = np.zeros(0, "<u4")

    def put(self, offset: int, length: int, source: BlockFile, source_offset: int, on_step: OnStep) -> None:
        """Copy `length` bytes of `source` to `offset`."""
        self._copier.copy(source, source_offset, self._allocate(offset, length), length, on_step)

    def put_bytes(self, offset: int, data: Buffer) -> None:
        """Write `data` to `offset`."""
        self._copier.write(self._allocate(offset, len(data)), data)

    def mark_zeros(self, offset: int, length: int) -> None:
        """Mark the grains of the range, all whole, as zeros over any parent; the layout must allow that."""
        first = offset // self._unit
        self._enter(first, -(-length // self._unit), 1, 0)

    def finish(self) -> None:
        """Store the last tables and extend the file to the end of its last grain."""
        self._store_tables()
        self._file.truncate(self._end)

    @property
    def end(self) -> int:
        """The byte after the last grain so far."""
        return self._end

    def _allocate(self, offset: int, length: int) -> int:
        """Return the file offset for the range; new grains follow the last one."""
        first, inside = divmod(offset, self._unit)
        last = (offset + length - 1) // self._unit
        if first == self._last_grain:
            start, fresh = self._last_position, first + 1
        else:
            start, fresh = self._end, first
        count = last + 1 - fresh
        if count:
            self._name_grains(fresh, self._end, count)
            self._end += count * self._unit
        self._last_grain, self._last_position = last, start + (last - first) * self._unit
        return start + inside

    def _name_grains(self, first: int, position: int, count: int) -> None:
        step = self._layout.header.grain_size
        sector = position // SECTOR_SIZE
        if sector + count * step > MAX_FILE_SECTORS:
            feature = f"the data does not fit: an extent file holds at most {MAX_FILE_SECTORS} sectors (2 TiB)"
            raise Unsupported(self._file.path, feature)
        self._enter(first, count, sector, step)

    def _enter(self, first: int, count: int, value: int, step: int) -> None:
        """Set the entries of so many grains to `value`, `value` + `step` and so on."""
        per_window = self._tables_at_once * self._layout.header.gtes_per_gt
        while count:
            window, index = divmod(first, per_window)
            if window != self._window:
                self._store_tables()
                self._window, self._entries = window, np.zeros(per_window, "<u4")
            now = min(count, per_window - index)
            self._entries[index : index + now] = value + step * np.arange(now, dtype=np.int64)
            first, value, count = first + now, value + now * step, count - now

    def _store_tables(self) -> None:
        if self._window < 0:
            return
        header = self._layout.header
        tables = self._entries.reshape(self._tables_at_once, header.gtes_per_gt)
        used = np.flatnonzero(tables.any(axis=1))
        # Untouched tables stay holes of the file: only stretches of used ones are written.
        for stretch in np.split(used, np.flatnonzero(np.diff(used) != 1) + 1):
            if not len(stretch):
                continue
            raw = tables[stretch[0] : stretch[-1] + 1].tobytes()
            at = (self._window * self._tables_at_once + int(stretch[0])) * header.gt_sectors
            if self._layout.rgt_sector != self._layout.gt_sector:
                self._file.write_at(sector_bytes(self._layout.rgt_sector + at), raw)
            self._file.write_at(sector_bytes(self._layout.gt_sector + at), raw)
        self._window = -1


class BulkParts:
    """Fills a disk of several extents: each piece is passed to the writers of its extents."""

    def __init__(self, parts: Sequence[tuple[int, BulkWriter]]) -> None:
        """`parts` are the extents in order: length in bytes, writer."""
        self._starts = [0, *itertools.accumulate(length for length, _ in parts)]
        self._writers = [writer for _, writer in parts]

    def put(self, offset: int, length: int, source: BlockFile, source_offset: int, on_step: OnStep) -> None:
        """Copy `length` bytes of `source` to `offset`."""
        for number, start, stop in self._pieces(offset, length):
            at = start - self._starts[number]
            self._writers[number].put(at, stop - start, source, source_offset + start - offset, on_step)

    def put_bytes(self, offset: int, data: Buffer) -> None:
        """Write `data` to `offset`."""
        view = memoryview(data)
        for number, start, stop in self._pieces(offset, len(view)):
            self._writers[number].put_bytes(start - self._starts[number], view[start - offset : stop - offset])

    def finish(self) -> None:
        """Complete every file."""
        for writer in self._writers:
            writer.finish()

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        end = offset + length
        number = bisect.bisect_right(self._starts, offset) - 1
        while offset < end:
            stop = min(end, self._starts[number + 1])
            yield number, offset, stop
            offset, number = stop, number + 1
