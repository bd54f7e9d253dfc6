"""Filling ranges of an existing link from runs: stored grains in place, else new ones in bulk.

The kernel copies the bytes from file to file wherever a run covers whole grains. No table names a grain before
`finish` (or a flush between) has made it durable, so a killed process leaves only unnamed grains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol, Self, runtime_checkable

from qemu_vmdk_snap.chain.chain import Chain
from qemu_vmdk_snap.chain.disk import Disk
from qemu_vmdk_snap.chain.link import Link
from qemu_vmdk_snap.chain.windows import windows
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer
from qemu_vmdk_snap.storage.copying import Copier
from qemu_vmdk_snap.units import MIB
from qemu_vmdk_snap.vmdk.extent import Below, PlacedExtent
from qemu_vmdk_snap.vmdk.runs import DATA, HOLE, NO_SOURCE, ZERO, Row, RunTable

STEP: Final = 4 * MIB
"""Bytes that are read at once where the kernel cannot copy."""

_FLUSH_GRAINS: Final = 1 << 20

OnStep = Callable[[int], None]


@runtime_checkable
class GrainStore(Protocol):
    """An extent that can place many new grains at once."""

    def reserve(self, offset: int, length: int) -> int:
        """Allocate one place in the file for whole grains that are not stored yet; return its byte offset."""

    def zero(self, offset: int, length: int) -> bool:
        """Mark whole grains, none stored, as zeros over any parent; return False where there is no such mark."""


@runtime_checkable
class Clearable(Protocol):
    """An extent that can remove all its grains."""

    def clear(self) -> None:
        """Remove every grain, durably, and free the space."""


class View:
    """The chain from the link at `depth` downwards as a Disk; the caller closes the chain."""

    def __init__(self, chain: Chain, depth: int, capacity: int | None = None) -> None:
        self._chain, self._depth = chain, depth
        self.path: Path = chain.links[min(depth, chain.depth - 1)].path
        self.capacity = chain.capacity if capacity is None else capacity

    def tables(self, offset: int, length: int) -> Iterator[RunTable]:
        """Yield the runs of the range, window by window."""
        if self._depth >= self._chain.depth:
            yield RunTable.single(offset, offset + length, HOLE)
            return
        for start, stop in self._chain.windows(offset, offset + length):
            yield self._chain.resolve(start, stop, self._depth)

    def rows(self, offset: int = 0, length: int | None = None) -> Iterator[Row]:
        """Yield the runs of the range."""
        for table in self.tables(offset, self.capacity - offset if length is None else length):
            yield from table.rows()

    def read_row(self, row: Row, skip: int, length: int) -> bytes:
        """Return `length` bytes from byte `skip` of `row`."""
        return self._chain.read_row(row, skip, length)

    def read_row_into(self, row: Row, skip: int, view: memoryview) -> None:
        """Fill `view` from byte `skip` of `row`."""
        self._chain.read_row_into(row, skip, view)

    def file_of(self, row: Row) -> BlockFile | None:
        """Return the file that stores `row` as it is."""
        return self._chain.file_of(row)

    def read(self, offset: int, length: int) -> bytes:
        """Return what is seen in the range."""
        if self._depth >= self._chain.depth:
            return bytes(length)
        return self._chain.read_below(self._depth, offset, length)

    def is_zero(self, offset: int, length: int) -> bool:
        """Return whether no stored run is seen in the range."""
        return all(row.kind <= ZERO for row in self.rows(offset, length))

    def __enter__(self) -> Self:
        """Return the view itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave the chain open."""


def upper_tables(chain: Chain, count: int, offset: int, length: int) -> Iterator[RunTable]:
    """Yield what the first `count` links of the chain store, window by window; holes where they store nothing."""
    for start, stop in chain.windows(offset, offset + length):
        table = chain.links[0].resolve(start, stop)
        for link in chain.links[1:count]:
            table = table.over(link.resolve(start, stop))
        yield table.coalesced()


def restricted(table: RunTable, *masks: tuple[RunTable, bool]) -> list[Row]:
    """Return the parts of `table` where each (other table, wanted) has a hole exactly if wanted.

    All tables cover the same stretch. Holes of `table` itself are returned as zeros.
    """
    starts = np.unique(np.concatenate([table.starts, *(other.starts for other, _ in masks)]))
    wanted = np.ones(len(starts), bool)
    for other, hole in masks:
        rows = np.searchsorted(other.starts, starts, "right") - 1
        wanted &= (other.kinds[rows] == HOLE) == hole
    rows = np.searchsorted(table.starts, starts, "right") - 1
    kinds = np.where(table.kinds[rows] == HOLE, ZERO, table.kinds[rows])
    offsets = table.file_offsets[rows] + np.where(kinds == DATA, starts - table.starts[rows], 0)
    sources = table.sources[rows]
    kept = RunTable(
        starts, np.where(wanted, kinds, HOLE).astype(np.uint8), np.where(wanted, sources, NO_SOURCE), offsets, table.end
    )
    return [row for row in kept.coalesced().rows() if row.kind != HOLE]


class LinkWriter:
    """Writes into one link that is open for writing.

    `below` is what the guest sees below it now, which fills grains that are stored in part; `later` is what it will
    see there when the operation is done, if that differs: zeros are left out where it reads as zeros.
    """

    def __init__(self, link: Link, below: View, on_step: OnStep, *, later: View | None = None) -> None:
        self._link, self._below, self._on_step = link, below, on_step
        self._later = later or below
        self._copiers: dict[int, Copier] = {}
        self._rewritten: dict[int, BlockFile] = {}
        self._named = 0

    def put_rows(self, rows: Iterable[Row], source: Disk) -> None:
        """Store every row but the holes: data by the kernel, the rest through a buffer."""
        for row in rows:
            if row.kind == HOLE:
                continue
            if row.kind == ZERO or row.source == NO_SOURCE:
                self.put_zeros(row.offset, row.length)
                continue
            file = source.file_of(row)
            if file is not None:
                self.put(row.offset, row.length, file, row.file_offset)
                continue
            for skip in range(0, row.length, STEP):
                self.put_bytes(row.offset + skip, source.read_row(row, skip, min(STEP, row.length - skip)))

    def put(self, offset: int, length: int, source: BlockFile, source_offset: int) -> None:
        """Copy `length` bytes of `source` to guest offset `offset`."""
        for placed, first, last in self._pieces(offset, length):
            delta = source_offset - offset + placed.start
            for row in placed.extent.resolve(first, last).rows():
                self._put_row(placed, row, source, delta)

    def put_bytes(self, offset: int, data: Buffer) -> None:
        """Write `data` to guest offset `offset`."""
        view = memoryview(data)
        for placed, first, last in self._pieces(offset, len(view)):
            start = placed.start + first - offset
            self._write(placed, first, view[start : start + last - first])

    def put_zeros(self, offset: int, length: int) -> None:
        """Make the range read as zeros; nothing is stored where it does already."""
        for placed, first, last in self._pieces(offset, length):
            for row in placed.extent.resolve(first, last).rows():
                if row.kind == DATA:
                    self._write_zeros(placed, row.offset, row.length)
                elif row.kind == HOLE and not self._later.is_zero(placed.start + row.offset, row.length):
                    self._zero_hole(placed, row)
        self._on_step(length)

    def finish(self) -> None:
        """Return when everything is durable, data before the tables that name it."""
        for file in self._rewritten.values():
            file.flush()  # barrier: an extent knows its own writes, not what the kernel copied over stored grains
        self._rewritten.clear()
        self._link.flush()

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[PlacedExtent, int, int]]:
        for start, stop in windows([self._link.extents], offset, offset + length):
            yield from self._link.overlapping(start, stop)

    def _put_row(self, placed: PlacedExtent, row: Row, source: BlockFile, delta: int) -> None:
        """Copy into one run of the target; `delta` is the distance from offsets in the extent to those in `source`."""
        extent = placed.extent
        if row.kind == DATA and extent.file is not None:
            if isinstance(extent, GrainStore):
                self._rewritten[id(extent.file)] = extent.file
            self._copier(extent.file).copy(source, row.offset + delta, row.file_offset, row.length, self._on_step)
            return
        head, start, stop, end = self._whole_grains(placed, row)
        self._copy_part(placed, head, start, source, delta)
        if start < stop:
            if isinstance(extent, GrainStore) and extent.file is not None:
                self._copy_grains(placed, extent, start, stop, source, delta)
            else:
                self._copy_part(placed, start, stop, source, delta)
        self._copy_part(placed, stop, end, source, delta)

    def _copy_grains(
        self, placed: PlacedExtent, store: GrainStore, start: int, stop: int, source: BlockFile, delta: int
    ) -> None:
        file, unit = placed.extent.file, placed.extent.grain_bytes
        assert file is not None
        position = store.reserve(start, stop - start)
        self._copier(file).copy(source, start + delta, position, stop - start, self._on_step)
        if pad := -(stop - start) % unit:  # the last grain of the disk is stored whole
            self._copier(file).put_zeros(position + stop - start, pad)
        self._count(placed, stop - start)

    def _copy_part(self, placed: PlacedExtent, start: int, stop: int, source: BlockFile, delta: int) -> None:
        for offset in range(start, stop, STEP):
            length = min(STEP, stop - offset)
            data = source.read_at(offset + delta, length)
            self._write(placed, offset, data + bytes(length - len(data)))

    def _write(self, placed: PlacedExtent, offset: int, data: Buffer) -> None:
        placed.extent.write(offset, data, self._below_extent(placed))
        self._count(placed, len(data))
        self._on_step(len(data))

    def _write_zeros(self, placed: PlacedExtent, offset: int, length: int) -> None:
        for start in range(offset, offset + length, STEP):
            zeros = bytes(min(STEP, offset + length - start))
            placed.extent.write(start, zeros, self._below_extent(placed))

    def _zero_hole(self, placed: PlacedExtent, row: Row) -> None:
        extent = placed.extent
        head, start, stop, end = self._whole_grains(placed, row)
        self._write_zeros(placed, head, start - head)
        if start < stop and not (isinstance(extent, GrainStore) and extent.zero(start, stop - start)):
            self._write_zeros(placed, start, stop - start)
        self._write_zeros(placed, stop, end - stop)
        self._count(placed, row.length)

    @staticmethod
    def _whole_grains(placed: PlacedExtent, row: Row) -> tuple[int, int, int, int]:
        """Return the row's start, the first and last edge of a grain in it, and its end; the disk's end is an edge."""
        unit, end = placed.extent.grain_bytes, row.offset + row.length
        start = min(end, -(-row.offset // unit) * unit)
        stop = end if end == placed.extent.capacity else end - end % unit
        return row.offset, start, max(start, stop), end

    def _below_extent(self, placed: PlacedExtent) -> Below:
        return lambda offset, length: self._below.read(placed.start + offset, length)

    def _copier(self, file: BlockFile) -> Copier:
        return self._copiers.setdefault(id(file), Copier(file))

    def _count(self, placed: PlacedExtent, length: int) -> None:
        """Store the tables from time to time, so that those in memory stay bounded."""
        self._named += -(-length // placed.extent.grain_bytes)
        if self._named >= _FLUSH_GRAINS:
            self._named = 0
            placed.extent.flush()
