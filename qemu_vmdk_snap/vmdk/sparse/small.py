"""The tables of a small hosted sparse extent in which nothing is wrong, as plain arrays.

Importing NumPy takes several times as long as going through a few thousand entries one by one, so short commands on
small images do without it. An extent of which there would be anything to say is left to the code that says it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.runs import DATA, HOLE, ZERO
from qemu_vmdk_snap.vmdk.sparse.header import HeaderFlag, SparseExtentHeader

MAX_TABLES: Final = 64
"""2 GiB of grains of 64 KiB: 32,768 entries, a few milliseconds."""

Piece = tuple[int, int, int, int]
"""Offset in the extent, length, kind (of `vmdk.runs`) and file offset."""


class SmallTables:
    """The entries of an extent; a table without any is None."""

    __slots__ = ("_per_table", "_tables", "_unit", "_zeroed")

    def __init__(self, tables: list[array[int] | None], per_table: int, unit: int, zeroed: bool) -> None:
        self._tables, self._per_table, self._unit, self._zeroed = tables, per_table, unit, zeroed

    @property
    def entries(self) -> int:
        """How many entries there may be to go through."""
        return self._per_table * sum(table is not None for table in self._tables)

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Yield what is where in [start, end), in order; neighbours may belong together."""
        unit, per_table = self._unit, self._per_table
        at = start
        while at < end:
            table, index = divmod(at // unit, per_table)
            stop = min(end, (table + 1) * per_table * unit)
            entries = self._tables[table]
            if entries is None:
                yield at, stop - at, HOLE, 0
                at = stop
                continue
            while at < stop:
                entry, first = entries[index], at
                inside = at % unit
                index, at = index + 1, min(stop, at - inside + unit)
                if entry > 1 or (entry and not self._zeroed):
                    yield first, at - first, DATA, entry * SECTOR_SIZE + inside
                    continue
                while at < stop and entries[index] == entry:
                    index, at = index + 1, min(stop, at + unit)
                yield first, at - first, ZERO if entry else HOLE, 0


def small_tables(file: BlockFile, header: SparseExtentHeader) -> SmallTables | None:
    """Return the tables of a plain extent, or None where they are many, or anything is not as it should be."""
    size, count = file.size(), header.gd_entries
    if count > MAX_TABLES or header.compressed or size % SECTOR_SIZE or sector_bytes(header.overhead) > size:
        return None
    last = size // SECTOR_SIZE - header.gt_sectors
    places = [header.gd_offset, header.rgd_offset] if header.redundant else [header.gd_offset]
    if any(not place or sector_bytes(place) + 4 * count > size for place in places):
        return None
    primary, *others = [entries_of(file.read_at(sector_bytes(place), 4 * count)) for place in places]
    if len(primary) != count or any(len(other) != count for other in others):
        return None
    unit, length = sector_bytes(header.grain_size), 4 * header.gtes_per_gt
    tables: list[array[int] | None] = []
    for number, sector in enumerate(primary):
        if sector > last or (not sector and any(other[number] for other in others)):
            return None
        at = sector_bytes(sector)
        table = None
        if sector and file.next_data(at) < at + length:
            table = entries_of(file.read_at(at, length))
            highest = max(table)
            if len(table) != header.gtes_per_gt or sector_bytes(highest) + unit > size:
                return None
            if not highest:
                table = None
        tables.append(table)
    return SmallTables(tables, header.gtes_per_gt, unit, bool(header.flags & HeaderFlag.ZEROED_GRAINS))


def entries_of(raw: bytes) -> array[int]:
    """Return the little-endian entries in `raw`."""
    entries = array("I", raw[: len(raw) // 4 * 4])
    if sys.byteorder == "big":
        entries.byteswap()
    return entries
