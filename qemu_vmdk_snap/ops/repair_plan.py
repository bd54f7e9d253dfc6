"""What has to be written to mend the tables of one hosted sparse extent; nothing is written here.

The good copy of a table entry wins; an entry that is good in neither copy becomes 0 (the parent, or zeros, answers). Of
grains that share a place, the first in guest order keeps it and the others get copies. Grains at the end of the file
move into gaps that nothing names, so that the end can be cut.

Memory: some 30 bytes for each allocated grain, and the tables that change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import Sector, byte_sectors, round_up, sector_bytes
from qemu_vmdk_snap.vmdk.header import HeaderFlag, SparseExtentHeader

_TABLES_AT_ONCE: Final = 2048

Int64s = npt.NDArray[np.int64]
Entries = npt.NDArray[Any]


class Copied(NamedTuple):
    """A grain that is copied inside the file, bytes."""

    source: int
    target: int
    length: int


@dataclass(slots=True)
class ExtentPlan:
    """The writes, in the order of their fields; each group is durable before the next."""

    file: BlockFile
    copies: list[Copied] = field(default_factory=list)
    fresh: list[tuple[int, bytes]] = field(default_factory=list)
    """New tables in space that nothing names."""
    patches: list[tuple[int, bytes]] = field(default_factory=list)
    """What replaces something in use: tables, directories."""
    kept: list[tuple[int, int]] = field(default_factory=list)
    """(byte, length) of what is named by no patch, and is to be brought back by an undo all the same."""
    end: int = 0
    """The length of the file afterwards."""

    @property
    def changes(self) -> bool:
        """Whether anything is to be written."""
        return bool(self.copies or self.fresh or self.patches) or self.end != self.file.size()


class _Copy:
    """One of the two directories with its tables, and which of these can be used."""

    def __init__(self, file: BlockFile, header: SparseExtentHeader, gd_offset: int) -> None:
        self.file, self.header, self.gd_offset = file, header, gd_offset
        raw = file.read_at(sector_bytes(gd_offset), header.gd_entries * 4)
        self.directory = np.frombuffer(raw, "<u4").astype(np.int64)
        inside = sector_bytes(1) * (self.directory + header.gt_sectors) <= file.size()
        first = np.zeros(len(self.directory), bool)
        first[np.unique(self.directory, return_index=True)[1]] = True  # of two entries with one table the first has it
        self.usable = (self.directory > 0) & inside & first

    def read(self, first: int, last: int) -> Entries:
        """Return the entries of the tables [first, last), zeros for those that cannot be used; one row a table."""
        per_table = self.header.gtes_per_gt
        found = np.zeros((last - first, per_table), "<u4")
        for table in (np.flatnonzero(self.usable[first:last]) + first).tolist():
            offset = sector_bytes(int(self.directory[table]))
            if self.file.next_data(offset) < offset + per_table * 4:
                found[table - first] = np.frombuffer(self.file.read_at(offset, per_table * 4), "<u4")
        return found


class ExtentRepair:
    """Works out the plan of one extent."""

    def __init__(self, file: BlockFile, header: SparseExtentHeader) -> None:
        self._file, self._header = file, header
        self._step = header.grain_size
        self._lowest = 2 if header.flags & HeaderFlag.ZEROED_GRAINS else 1
        self._primary = _Copy(file, header, header.gd_offset)
        self._redundant = _Copy(file, header, header.rgd_offset) if header.redundant else None
        self._copies = [copy for copy in (self._redundant, self._primary) if copy is not None]
        self._size = byte_sectors(file.size())
        self._meta = self._metadata()
        self._tables: dict[int, Entries] = {}
        self._next = byte_sectors(round_up(file.size(), sector_bytes(self._step)))
        self._plan = ExtentPlan(file)
        self._gaps: list[tuple[int, int]] = []
        self._placed: list[tuple[int, int]] = []

    def plan(self, *, mend: bool, reclaim: bool) -> ExtentPlan:
        """Return what to write: to `mend` what is wrong, to `reclaim` leaked space, or both."""
        grains, sectors = self._choose(mend)
        if mend:
            if reclaim:
                self._gaps = self._free(sectors)
                last = int(np.max(sectors, initial=0))
                used = max(int(self._meta[1][-1]), self._header.overhead, last + self._step)
                self._next = Sector(round_up(used, self._step))
            sectors = self._split(grains, sectors)
            self._replace_tables()
        self._plan.end = sector_bytes(self._next) if mend and self._next > self._size else self._file.size()
        if reclaim:
            self._reclaim(grains, sectors)
        for table, entries in sorted(self._tables.items()):
            for copy in self._copies:
                if copy.usable[table]:
                    self._plan.patches.append(
                        (sector_bytes(int(copy.directory[table])), entries.astype("<u4").tobytes())
                    )
        if mend:
            self._plan.kept = list(self._lost())
        return self._plan

    def _lost(self) -> Iterator[tuple[int, int]]:
        """Yield what is overwritten or cut off, though nothing names it: it may be what a damaged entry has named."""
        plan, size = self._plan, self._file.size()
        yield from ((copied.target, copied.length) for copied in plan.copies)
        yield from ((at, len(data)) for at, data in plan.fresh)
        at = plan.end
        while (at := self._file.next_data(at)) < size:
            hole = min(size, self._file.next_hole(at))
            yield at, hole - at
            at = hole

    def _metadata(self) -> tuple[Int64s, Int64s]:
        header = self._header
        gd_sectors = byte_sectors(header.gd_entries * 4)
        parts = [(0, 1), (header.descriptor_offset, header.descriptor_size)]
        parts += [(copy.gd_offset, gd_sectors) for copy in self._copies]
        for copy in self._copies:
            parts += [(int(sector), header.gt_sectors) for sector in copy.directory[copy.usable]]
        parts = sorted(part for part in parts if part[1])
        starts, lengths = np.array(parts, np.int64).T
        return starts, np.maximum.accumulate(starts + lengths)

    def _good(self, entries: Entries) -> npt.NDArray[np.bool_]:
        """Return which entries are 0, the mark of zeros, or a grain in the file that lies over no metadata."""
        places = entries.astype(np.int64)
        starts, ends = self._meta
        before = np.searchsorted(starts, places + self._step, "left") - 1
        clear = (before < 0) | (ends[before] <= places)
        return np.asarray((places < self._lowest) | ((places < self._size) & clear))

    def _choose(self, mend: bool) -> tuple[Int64s, Int64s]:
        """Decide every entry; return the grains that are stored and their sectors, in guest order."""
        named = self._primary_sectors() if mend else np.zeros(0, np.int64)
        grains, sectors = [], []
        count, per_table = self._header.gd_entries, self._header.gtes_per_gt
        for first in range(0, count, _TABLES_AT_ONCE):
            last = min(count, first + _TABLES_AT_ONCE)
            primary = self._primary.read(first, last)
            chosen = primary
            if mend:
                chosen = self._better(primary, first, last, named)
                self._remember(first, last, primary, chosen)
            where = np.flatnonzero(chosen.reshape(-1) >= self._lowest)
            grains.append(where + first * per_table)
            sectors.append(chosen.reshape(-1)[where].astype(np.int64))
        return np.concatenate(grains), np.concatenate(sectors)

    def _better(self, primary: Entries, first: int, last: int, named: Int64s) -> Entries:
        good = self._good(primary)
        other = np.zeros_like(primary) if self._redundant is None else self._redundant.read(first, last)
        other = np.where(self._good(other), other, 0)
        # A primary 0 whose redundant twin names a grain that nobody else has: the writer died between the two.
        near = np.searchsorted(named, other.astype(np.int64) - self._step, "right")
        alone = np.ones(other.shape, bool)
        if len(named):
            alone = (near == len(named)) | (
                named[np.minimum(near, len(named) - 1)] >= other.astype(np.int64) + self._step
            )
        newer = good & (primary == 0) & (other >= self._lowest) & alone
        return np.where(good & ~newer, primary, other)

    def _primary_sectors(self) -> Int64s:
        found = []
        for first in range(0, self._header.gd_entries, _TABLES_AT_ONCE):
            entries = self._primary.read(first, min(self._header.gd_entries, first + _TABLES_AT_ONCE)).reshape(-1)
            stored = entries[(entries >= self._lowest) & self._good(entries)]
            found.append(stored.astype(np.int64))
        return np.sort(np.concatenate(found))

    def _remember(self, first: int, last: int, primary: Entries, chosen: Entries) -> None:
        """Keep the tables that have to be written: in one of the copies they are not what they shall be."""
        wrong = (primary != chosen).any(axis=1)
        if self._redundant is not None:
            wrong |= (self._redundant.read(first, last) != chosen).any(axis=1)
        for copy in self._copies:
            wrong |= ~copy.usable[first:last]
        for row in np.flatnonzero(wrong).tolist():
            self._tables[first + row] = chosen[row].copy()

    def _split(self, grains: Int64s, sectors: Int64s) -> Int64s:
        """Give every grain that lies over another one a copy of its own, behind the end of the file."""
        order = np.lexsort((grains, sectors))
        reach = -1
        sectors = sectors.copy()
        for index in order.tolist():
            sector = int(sectors[index])
            if sector >= reach:
                reach = sector + self._step
                continue
            place = self._place(self._step)
            self._plan.copies.append(Copied(sector_bytes(sector), sector_bytes(place), sector_bytes(self._step)))
            self._set(int(grains[index]), place)
            sectors[index] = place
        return sectors

    def _place(self, length: int) -> int:
        """Return where so many free sectors begin: in a gap if one is large enough, else behind the end."""
        for number, (start, end) in enumerate(self._gaps):
            if end - start >= length:
                self._gaps[number] = (start + length, end)
                return start
        place = int(self._next)
        self._next = Sector(place + length)
        return place

    def _free(self, sectors: Int64s) -> list[tuple[int, int]]:
        """Return the stretches behind the overhead that nothing uses and that hold a grain; not the file's end."""
        placed = np.array(self._placed, np.int64).reshape(-1, 2)
        starts = np.concatenate([self._meta[0], sectors, placed[:, 0]])
        ends = np.concatenate([self._meta[1], sectors + self._step, placed.sum(axis=1)])
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        after = np.maximum(ends, self._header.overhead)[:-1]
        wide = np.flatnonzero(starts[1:] - after >= self._step)
        return list(zip(after[wide].tolist(), starts[1:][wide].tolist(), strict=True))

    def _replace_tables(self) -> None:
        """Put tables that cannot be used where nothing is, and name them in the directory."""
        table_sectors = round_up(self._header.gt_sectors, self._step)
        for copy in self._copies:
            for table in np.flatnonzero(~copy.usable).tolist():
                entries = self._tables[table].astype("<u4").tobytes()
                place = self._place(table_sectors)
                self._placed.append((place, table_sectors))
                self._plan.fresh.append((sector_bytes(place), entries.ljust(sector_bytes(table_sectors), b"\0")))
                at = sector_bytes(copy.gd_offset) + 4 * table
                self._plan.patches.append((at, place.to_bytes(4, "little")))

    def _reclaim(self, grains: Int64s, sectors: Int64s) -> None:
        """Move grains from the end into gaps while that lets the file end sooner; then say where it ends."""
        tail = [int(index) for index in np.argsort(sectors)]
        moved_end = max(
            int(self._meta[1][-1]), self._header.overhead, *(start + length for start, length in self._placed), 0
        )
        for place, start in self._free(sectors):
            while start - place >= self._step and tail and int(sectors[tail[-1]]) > place:
                index = tail.pop()
                self._move(int(grains[index]), int(sectors[index]), place)
                sectors[index] = place
                place += self._step
                moved_end = max(moved_end, place)
        last = max([moved_end, *(int(sectors[index]) + self._step for index in tail[-1:])])
        self._plan.end = min(self._plan.end, round_up(sector_bytes(last), sector_bytes(self._step)))

    def _move(self, grain: int, sector: int, place: int) -> None:
        unit = sector_bytes(self._step)
        source = sector_bytes(sector)
        for number, copied in enumerate(self._plan.copies):
            if copied.target == source:  # it was to be a copy anyway: straight to its last place
                self._plan.copies[number] = copied._replace(target=sector_bytes(place))
                break
        else:
            self._plan.copies.append(Copied(source, sector_bytes(place), unit))
            self._plan.kept.append((source, unit))
        self._set(grain, place)

    def _set(self, grain: int, sector: int) -> None:
        table, index = divmod(grain, self._header.gtes_per_gt)
        if table not in self._tables:
            self._tables[table] = self._primary.read(table, table + 1)[0]
        self._tables[table][index] = sector
