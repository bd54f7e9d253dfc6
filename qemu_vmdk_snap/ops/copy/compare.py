"""Compare what a guest sees on two disks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from qemu_vmdk_snap.chain.disk import Disk
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.blocks import in_same_blocks
from qemu_vmdk_snap.units import KIB, SECTOR_SIZE
from qemu_vmdk_snap.vmdk.runs import DATA, HOLE, Row

_STEP: Final = 256 * KIB  # both buffers stay in the processor's cache


@dataclass(frozen=True, slots=True)
class CompareReport:
    """The first difference, or none."""

    identical: bool
    reason: str | None = None
    """None, "content", or in strict mode also "size" or "allocation"."""
    offset: int | None = None
    """Guest byte of the first difference: of the sector that differs, or of the run whose allocation does."""
    sizes: tuple[int, int] | None = None
    """Both sizes, where they differ."""

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `image compare --output=json` shows it."""
        sizes = None if self.sizes is None else list(self.sizes)
        return {"identical": self.identical, "reason": self.reason, "offset": self.offset, "sizes": sizes}


class _Pair(NamedTuple):
    """A stretch that is one run on either disk: the rows, and how far into each the stretch begins."""

    offset: int
    length: int
    one: Row
    skip_one: int
    two: Row
    skip_two: int


def compare(
    one: Disk, two: Disk, *, strict: bool = False, blocks: bool = False, on_progress: OnProgress = ignore
) -> CompareReport:
    """Compare the disks byte by byte. What neither stores, and what both store in the same place, is not read.

    Where one is longer, its rest must be zeros; `strict` requires equal sizes and equal allocation too, as qemu-img's
    `-s`. With `blocks`, ranges whose blocks are shared (reflinks) are not read; pending writes are stored first.
    """
    sizes = None if one.capacity == two.capacity else (one.capacity, two.capacity)
    if strict and sizes:
        return CompareReport(False, "size", None, sizes)
    common = min(one.capacity, two.capacity)
    meter = Meter("compare", max(one.capacity, two.capacity), on_progress)
    reader = _Reader(one, two, meter, blocks)
    for pair in _pairs(one, two, common):
        if strict and (pair.one.kind == HOLE) != (pair.two.kind == HOLE):
            return CompareReport(False, "allocation", pair.offset, sizes)
        offset = reader.first_difference(pair)
        if offset is not None:
            return CompareReport(False, "content", offset, sizes)
        meter.reach(pair.offset + pair.length)
    longer = one if one.capacity > two.capacity else two
    for row in longer.rows(common, longer.capacity - common):
        offset = reader.first_nonzero(longer, row, 0, row.length)
        if offset is not None:
            return CompareReport(False, "content", offset, sizes)
        meter.reach(row.offset + row.length)
    return CompareReport(True, None, None, sizes)


def _pairs(one: Disk, two: Disk, end: int) -> Iterator[_Pair]:
    rows_one, rows_two = one.rows(0, end), two.rows(0, end)
    row_one, row_two = next(rows_one, None), next(rows_two, None)
    offset = 0
    while row_one is not None and row_two is not None:
        stop = min(row_one.offset + row_one.length, row_two.offset + row_two.length)
        yield _Pair(offset, stop - offset, row_one, offset - row_one.offset, row_two, offset - row_two.offset)
        offset = stop
        if row_one.offset + row_one.length == stop:
            row_one = next(rows_one, None)
        if row_two.offset + row_two.length == stop:
            row_two = next(rows_two, None)


class _Reader:
    """Reads both disks into the same two buffers: allocating new ones would take longer than reading."""

    def __init__(self, one: Disk, two: Disk, meter: Meter, blocks: bool) -> None:
        self._one, self._two, self._meter, self._blocks = one, two, meter, blocks
        self._buffers = bytearray(_STEP), bytearray(_STEP)
        self._zeros = bytes(_STEP)

    def first_difference(self, pair: _Pair) -> int | None:
        """Return the guest offset of the first sector that differs in `pair`, or None."""
        if pair.one.kind < DATA and pair.two.kind < DATA:
            return None
        if pair.one.kind < DATA:
            return self.first_nonzero(self._two, pair.two, pair.skip_two, pair.length)
        if pair.two.kind < DATA:
            return self.first_nonzero(self._one, pair.one, pair.skip_one, pair.length)
        if _same_place(self._one, self._two, pair) or (self._blocks and self._same_blocks(pair)):
            return None
        for done in range(0, pair.length, _STEP):
            length = min(_STEP, pair.length - done)
            left = self._read(0, self._one, pair.one, pair.skip_one + done, length)
            right = self._read(1, self._two, pair.two, pair.skip_two + done, length)
            if left != right:
                return pair.offset + done + _differing_sector(left, right)
            self._meter.step(length)
        return None

    def _same_blocks(self, pair: _Pair) -> bool:
        files = self._one.file_of(pair.one), self._two.file_of(pair.two)
        descriptors = [None if file is None else file.fileno() for file in files]
        if descriptors[0] is None or descriptors[1] is None:
            return False
        places = pair.one.file_offset + pair.skip_one, pair.two.file_offset + pair.skip_two
        return in_same_blocks(descriptors[0], places[0], descriptors[1], places[1], pair.length)

    def first_nonzero(self, disk: Disk, row: Row, skip: int, length: int) -> int | None:
        """Return the guest offset of the first sector that is not zeros in the part of `row`, or None."""
        if row.kind < DATA:
            return None
        for done in range(0, length, _STEP):
            size = min(_STEP, length - done)
            data = self._read(0, disk, row, skip + done, size)
            zeros = self._zeros if size == _STEP else bytes(size)
            if data != zeros:
                return row.offset + skip + done + _differing_sector(data, zeros)
            self._meter.step(size)
        return None

    def _read(self, number: int, disk: Disk, row: Row, skip: int, length: int) -> bytes | bytearray:
        """Return the bytes; a whole step is the buffer itself, as only whole bytearrays compare at full speed."""
        buffer = self._buffers[number]
        if length < _STEP:
            return disk.read_row(row, skip, length)
        disk.read_row_into(row, skip, memoryview(buffer))
        return buffer


def _same_place(one: Disk, two: Disk, pair: _Pair) -> bool:
    file_one, file_two = one.file_of(pair.one), two.file_of(pair.two)
    if file_one is None or file_two is None:
        return False
    if pair.one.file_offset + pair.skip_one != pair.two.file_offset + pair.skip_two:
        return False
    return file_one is file_two or file_one.path.samefile(file_two.path)


def _differing_sector(left: bytes | bytearray, right: bytes | bytearray) -> int:
    """Return the offset of the first sector in which the two differ; they must differ."""
    for start in range(0, len(left), SECTOR_SIZE):
        if left[start : start + SECTOR_SIZE] != right[start : start + SECTOR_SIZE]:
            return start
    raise AssertionError("equal buffers have no differing sector")
