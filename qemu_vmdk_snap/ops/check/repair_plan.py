"""Plans the changes that repair the tables of one hosted sparse or COWD extent; nothing is written here.

The valid copy of a table entry wins; an entry that is valid in neither copy becomes 0 (the parent, or zeros). A
directory outside the file is rebuilt, with its tables, from the other one. Of grains that share a place, the first in
guest order keeps it and the others get copies. Grains at the end of the file move into gaps that no table names, so
that the end can be cut off.

Memory: about 60 bytes for each allocated grain, and the tables that change. Tables that are holes of the file take
neither memory nor time, and new ones that contain only zeros stay holes.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.light import dataclass, field, replace
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.ops.check.shape import TableShape
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import byte_sectors, round_up, sector_bytes
from qemu_vmdk_snap.vmdk.grain.extent import MAX_FILE_SECTORS
from qemu_vmdk_snap.vmdk.grain.tables import Entries, read_directory, read_tables, used_entries
from qemu_vmdk_snap.vmdk.runs import Int64s

if TYPE_CHECKING:
    import numpy.typing as npt

    Bools = npt.NDArray[np.bool_]

_TABLES_AT_ONCE: Final = 2048
_MAX_MADE: Final = 1 << 20
"""How many tables a repair rebuilds in any file; in a large file as many as it has room for."""
_MAX_SHARED: Final = 1 << 21
"""How many sectors grains with a shared place may need in any file (1 GiB); in a large file as many as it has."""


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
    blanks: list[tuple[int, int]] = field(default_factory=list)
    """(byte, length) of space that nothing names, and that becomes zeros: new tables go there."""
    fresh: list[tuple[int, bytes]] = field(default_factory=list)
    """What new tables and directories contain besides zeros."""
    patches: list[tuple[int, bytes]] = field(default_factory=list)
    """Changes to what is in use: tables, directories."""
    kept: list[tuple[int, int]] = field(default_factory=list)
    """(byte, length) of what no patch changes, and an undo must restore nevertheless."""
    end: int = 0
    """The length of the file afterwards."""
    gd_offset: int = 0
    """Sector of the primary directory afterwards."""
    rgd_offset: int | None = None
    header: bytes | None = None
    """The header, if it changes: last of all."""

    @property
    def changes(self) -> bool:
        """Whether anything is to be written."""
        tables = self.copies or self.blanks or self.patches
        return bool(tables) or self.header is not None or self.end != self.file.size()


def _overlap(start: int, length: int, other: int, others: int) -> bool:
    return start < other + others and other < start + length


class _Made(NamedTuple):
    """Tables rebuilt, one after the other, after their directory if that is new too; sectors."""

    place: int
    lead: int
    """Of the directory; 0 where it stays."""
    length: int
    tables: Int64s

    def places(self, shape: TableShape) -> Int64s:
        """Return the sectors of the tables."""
        return self.place + self.lead + np.arange(len(self.tables)) * shape.gt_sectors

    def content(self, entries: dict[int, Entries], shape: TableShape) -> Iterator[tuple[int, bytes]]:
        """Yield (byte, data) of all that is not zeros."""
        places = self.places(shape)
        if self.lead:
            yield sector_bytes(self.place), places.astype("<u4").tobytes()
        for place, table in zip(places.tolist(), self.tables.tolist(), strict=True):
            if table in entries and entries[table].any():
                yield sector_bytes(place), entries[table].astype("<u4").tobytes()


class _Copy:
    """One of the two directories with its tables, and which of these can be used."""

    def __init__(self, file: BlockFile, shape: TableShape, gd_offset: int) -> None:
        self.file, self.shape, self.gd_offset = file, shape, gd_offset
        size = file.size()
        self.lost = not gd_offset or sector_bytes(gd_offset + shape.gd_sectors) > size
        """Whether there is no directory where the header says."""
        self._refuse_too_many()
        self.directory = np.zeros(shape.gd_entries, np.int64)
        if not self.lost:
            self.directory[:] = read_directory(file, sector_bytes(gd_offset), shape.gd_entries)
        inside = sector_bytes(1) * (self.directory + shape.gt_sectors) <= size
        self.usable: Bools = (self.directory > 0) & inside
        self.twin: _Copy | None = None
        """The other copy."""
        for start, length in shape.fixed:
            self.usable &= ~self.over(start, length)

    def _refuse_too_many(self) -> None:
        """Refuse a capacity that needs far more tables than there are: then the capacity is damaged."""
        shape, size = self.shape, self.file.size()
        limit = max(_MAX_MADE, byte_sectors(size) // shape.gt_sectors)
        if shape.on_demand or shape.gd_entries <= limit:
            return
        there = 0
        if not self.lost:
            there = len(used_entries(read_directory(self.file, sector_bytes(self.gd_offset), shape.gd_entries)))
        if shape.gd_entries - there > limit:
            feature = (
                f"the capacity of {shape.capacity} sectors needs {shape.gd_entries} grain tables, and {there} exist"
            )
            raise Unsupported(self.file.path, f"{feature}: the header cannot be repaired")

    def over(self, start: int, sectors: int) -> Bools:
        """Return which tables overlap the range."""
        return (self.directory < start + sectors) & (self.directory + self.shape.gt_sectors > start)

    def tables_over(self, places: Int64s) -> Int64s:
        """Return how many of the usable tables each table at `places` would overlap."""
        starts = np.sort(self.directory[self.usable])
        length = self.shape.gt_sectors
        return np.searchsorted(starts, places + length, "left") - np.searchsorted(starts, places - length, "right")

    def give_up(self) -> None:
        """Treat the directory as lost: the header names something else."""
        self.lost = True
        self.directory[:] = 0
        self.usable[:] = False

    @property
    def wanting(self) -> Bools:
        """Which tables are rebuilt: in a kind that makes them on demand, only those that an entry names."""
        return ~self.usable & (self.directory > 0) if self.shape.on_demand else ~self.usable

    def read(self, first: int, last: int) -> Entries:
        """Return the entries of the tables [first, last), zeros for those that cannot be used; one row a table."""
        places = np.where(self.usable[first:last], self.directory[first:last], 0)
        found = read_tables(self.file, places, self.shape.gtes_per_gt)
        return np.zeros((last - first, self.shape.gtes_per_gt), "<u4") if found is None else found


class ExtentRepair:
    """Works out the plan of one extent."""

    def __init__(self, file: BlockFile, shape: TableShape) -> None:
        # Grains that begin past the end of the file: the number is damaged, and the file would grow to it.
        start = min(shape.used.start, byte_sectors(file.size()))
        shape = replace(shape, used=range(start, shape.used.stop))
        self._file, self._shape = file, shape
        self._step = shape.grain_size
        self._lowest = shape.lowest
        self._primary = _Copy(file, shape, shape.gd_offset)
        self._redundant = None if shape.rgd_offset is None else _Copy(file, shape, shape.rgd_offset)
        self._copies = [self._primary]
        if self._redundant is not None:
            self._primary.twin, self._redundant.twin = self._redundant, self._primary
            self._copies = [self._redundant, self._primary]
        self._doubt_directories()
        self._set_aside_overlapping()
        self._size = byte_sectors(file.size())
        self._meta = self._metadata()
        self._floor = shape.first_use(self._primary.directory[self._primary.usable])
        self._tables: dict[int, Entries] = {}
        self._next = 0
        self._plan = ExtentPlan(file)
        self._gaps: list[tuple[int, int]] = []
        self._made: list[_Made] = []
        self._split_to: dict[int, int] = {}

    def plan(self, *, repairing: bool) -> ExtentPlan:
        """Return the changes that free leaked space and, if `repairing`, first repair the faults.

        Raises:
            Unsupported: what has to be copied would not fit into the file.
        """
        plan, grains, sectors = self._plan, *self._choose(repairing)
        if repairing:
            self._gaps = self._free(sectors)
            last = int(sectors.max()) + self._step if len(sectors) else 0
            self._next = round_up(max(self._fixed_end(), last), self._step)
            sectors = self._split(grains, sectors)
            self._replace_tables()
        plan.end = max(self._file.size(), sector_bytes(self._next))
        self._reclaim(grains, sectors)
        for table, entries in sorted(self._tables.items()):
            for copy in self._copies:
                if copy.usable[table] and not np.array_equal(copy.read(table, table + 1)[0], entries):
                    plan.patches.append((sector_bytes(int(copy.directory[table])), entries.astype("<u4").tobytes()))
        plan.blanks = [(sector_bytes(made.place), sector_bytes(made.length)) for made in self._made]
        plan.fresh = [piece for made in self._made for piece in made.content(self._tables, self._shape)]
        # Leaked space is freed; the old place of grains that move may be cut off.
        plan.kept = list(self._lost()) if repairing else [(copied.source, copied.length) for copied in plan.copies]
        plan.gd_offset = self._primary.gd_offset
        plan.rgd_offset = None if self._redundant is None else self._redundant.gd_offset
        return plan

    def _fixed_end(self) -> int:
        """Return the sector past everything that is not moved: the metadata, and what was rebuilt."""
        made = (one.place + one.length for one in self._made)
        return max(int(self._meta[1][-1]), self._shape.used.start, *made)

    def _doubt_directories(self) -> None:
        """Find header fields that name something other than a directory; of two the one with fewer tables is wrong.

        Raises:
            FormatError: it does so for each copy.
        """
        shape = self._shape
        for copy in self._copies:
            if any(_overlap(copy.gd_offset, shape.gd_sectors, *part) for part in shape.fixed):
                copy.give_up()
        *worse, better = sorted(self._copies, key=lambda copy: int(np.count_nonzero(copy.usable)))
        for copy in worse:
            over = _overlap(copy.gd_offset, shape.gd_sectors, better.gd_offset, shape.gd_sectors)
            if not copy.usable.all():  # else it is a directory, and what overlaps it is not one of its tables
                over |= bool((better.over(copy.gd_offset, shape.gd_sectors) & better.usable).any())
            # Before the grains a directory is at its original place, however little of it is left.
            few = 2 * np.count_nonzero(copy.usable) < np.count_nonzero(better.usable)
            if over or (few and copy.gd_offset >= shape.used.start):
                copy.give_up()
        if all(copy.lost for copy in self._copies):
            rule = "must name a grain directory, and none of the header's copies does"
            raise FormatError(self._file.path, shape.gd_field, "gd_offset", self._primary.gd_offset, rule)

    def _set_aside_overlapping(self) -> None:
        """Exclude tables that overlap a directory or another table.

        Of tables that overlap, those with a twin in the other copy are excluded; else the first one stays. Where
        the two copies overlap, and one of them has more faults, nothing of the other is excluded.
        """
        shape = self._shape
        for copy in self._copies:
            for other in self._copies:
                if not other.lost:
                    copy.usable &= ~copy.over(other.gd_offset, shape.gd_sectors)
        aside = {copy: copy.usable & (copy.tables_over(copy.directory) > 1) for copy in self._copies}
        clash = {copy: copy.usable & (copy.twin.tables_over(copy.directory) > 0) for copy in self._copies if copy.twin}
        trouble = {copy: int(np.count_nonzero(~copy.usable | aside[copy])) for copy in self._copies}
        for copy in self._copies:
            if copy.twin and trouble[copy] >= trouble[copy.twin]:
                aside[copy] |= clash[copy]
            copy.usable &= ~aside[copy]
        kept = sorted(int(sector) for copy in self._copies for sector in copy.directory[copy.usable])
        for copy in reversed(self._copies):
            alone = aside[copy] & ~copy.twin.usable if copy.twin else aside[copy]
            for table in np.flatnonzero(alone).tolist():
                sector = int(copy.directory[table])
                after = bisect.bisect_right(kept, sector - shape.gt_sectors)
                if after == len(kept) or kept[after] >= sector + shape.gt_sectors:
                    copy.usable[table] = True
                    kept.insert(after, sector)

    def _lost(self) -> Iterator[tuple[int, int]]:
        """Yield what is overwritten or cut off although nothing names it: a damaged entry may have named it."""
        plan, size = self._plan, self._file.size()
        yield from ((copied.target, copied.length) for copied in plan.copies)
        yield from plan.blanks
        at = plan.end
        while (at := self._file.next_data(at)) < size:
            hole = min(size, self._file.next_hole(at))
            yield at, hole - at
            at = hole

    def _metadata(self) -> tuple[Int64s, Int64s]:
        shape = self._shape
        parts = list(shape.fixed)
        for copy in self._copies:
            if not copy.lost:
                parts.append((copy.gd_offset, shape.gd_sectors))
        tables = np.concatenate([copy.directory[copy.usable] for copy in self._copies])
        fixed = np.array([part for part in parts if part[1]], np.int64)
        starts = np.concatenate([fixed[:, 0], tables])
        ends = starts + np.concatenate([fixed[:, 1], np.full(len(tables), shape.gt_sectors, np.int64)])
        order = np.argsort(starts, kind="stable")
        return starts[order], np.maximum.accumulate(ends[order])

    def _good(self, entries: Entries) -> npt.NDArray[np.bool_]:
        """Return which entries are 0, the mark of zeros, or a grain in the file, outside the metadata."""
        places = entries.astype(np.int64)
        starts, ends = self._meta
        before = np.searchsorted(starts, places + self._step, "left") - 1
        clear = (before < 0) | (ends[before] <= places)
        return np.asarray((places < self._lowest) | ((places < self._size) & clear))

    def _choose(self, repairing: bool) -> tuple[Int64s, Int64s]:
        """Decide every entry; return the grains that are stored and their sectors, in guest order."""
        named = self._primary_sectors() if repairing else np.zeros(0, np.int64)
        grains, sectors = [], []
        per_table = self._shape.gtes_per_gt
        for first, last in self._windows():
            chosen = primary = self._primary.read(first, last)
            if repairing:
                other = np.zeros_like(primary) if self._redundant is None else self._redundant.read(first, last)
                if not primary.any() and not other.any():
                    continue
                chosen = self._better(primary, other, first, named)
                self._remember(first, primary, other, chosen)
            where = np.flatnonzero(chosen.reshape(-1) >= self._lowest)
            grains.append(where + first * per_table)
            sectors.append(chosen.reshape(-1)[where].astype(np.int64))
        none = np.zeros(0, np.int64)
        return np.concatenate([none, *grains]), np.concatenate([none, *sectors])

    def _windows(self) -> Iterator[tuple[int, int]]:
        """Yield the stretches of table numbers where any table can be used."""
        count = self._shape.gd_entries
        for first in range(0, count, _TABLES_AT_ONCE):
            last = min(count, first + _TABLES_AT_ONCE)
            if any(copy.usable[first:last].any() for copy in self._copies):
                yield first, last

    def _better(self, primary: Entries, redundant: Entries, first: int, named: Int64s) -> Entries:
        good = self._good(primary) & self._primary.usable[first : first + len(primary), None]
        other = np.where(self._good(redundant), redundant, 0)
        # A primary 0 whose redundant twin names a grain that no other entry has: the writer died between the two.
        # The same holds for 0 and the mark of zeros, and for that mark and a grain.
        near = np.searchsorted(named, other.astype(np.int64) - self._step, "right")
        alone = np.ones(other.shape, bool)
        if len(named):
            alone = (near == len(named)) | (
                named[np.minimum(near, len(named) - 1)] >= other.astype(np.int64) + self._step
            )
        newer = good & (primary < self._lowest) & (other > primary) & ((other < self._lowest) | alone)
        return np.where(good & ~newer, primary, other)

    def _primary_sectors(self) -> Int64s:
        found = [np.zeros(0, np.int64)]
        for first, last in self._windows():
            entries = self._primary.read(first, last).reshape(-1)
            if not entries.any():
                continue
            stored = entries[(entries >= self._lowest) & self._good(entries)]
            found.append(stored.astype(np.int64))
        return np.sort(np.concatenate(found))

    def _remember(self, first: int, primary: Entries, redundant: Entries, chosen: Entries) -> None:
        """Keep the tables that must be written: in one of the copies they differ from the result."""
        wrong = (primary != chosen).any(axis=1)
        if self._redundant is not None:
            wrong |= (redundant != chosen).any(axis=1)
        for row in np.flatnonzero(wrong).tolist():
            self._tables[first + row] = chosen[row].copy()

    def _split(self, grains: Int64s, sectors: Int64s) -> Int64s:
        """Give every grain that overlaps another one a copy of its own, past the end of the file."""
        order = np.lexsort((grains, sectors))
        over = np.zeros(len(order) + 1, bool)
        over[1:-1] = np.diff(sectors[order]) < self._step
        reach = -1
        sectors = sectors.copy()
        clashes = int(np.count_nonzero(over))
        if clashes * self._step > max(self._size, _MAX_SHARED):
            feature = f"{clashes} grains share places in its file of {self._file.size()} bytes"
            raise Unsupported(self._file.path, f"{feature}: convert what can be read")
        for index in order[over[:-1] | over[1:]].tolist():
            sector = int(sectors[index])
            if sector >= reach:
                reach = sector + self._step
                continue
            place = self._place(self._step)
            self._split_to[sector_bytes(place)] = len(self._plan.copies)
            self._plan.copies.append(Copied(sector_bytes(sector), sector_bytes(place), sector_bytes(self._step)))
            self._set(int(grains[index]), place)
            sectors[index] = place
        return sectors

    def _place(self, length: int) -> int:
        """Return where so many free sectors begin: in a gap if one is large enough, else past the end."""
        for number, (start, end) in enumerate(self._gaps):
            if end - start >= length:
                self._gaps[number] = (start + length, end)
                return start
        place = self._next
        self._next += length
        if self._next > MAX_FILE_SECTORS:
            feature = (
                f"its copies of grains and tables do not fit: a file holds at most {MAX_FILE_SECTORS} sectors (2 TiB)"
            )
            raise Unsupported(self._file.path, feature)
        return place

    def _free(self, sectors: Int64s) -> list[tuple[int, int]]:
        """Return the free ranges inside the part in use that have room for a grain; not the file's end."""
        made = np.array([(one.place, one.place + one.length) for one in self._made], np.int64).reshape(-1, 2)
        starts = np.concatenate([self._meta[0], sectors, made[:, 0]])
        ends = np.concatenate([self._meta[1], sectors + self._step, made[:, 1]])
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        after = np.maximum(ends, self._floor)[:-1]
        wide = np.flatnonzero(starts[1:] - after >= self._step)
        return list(zip(after[wide].tolist(), starts[1:][wide].tolist(), strict=True))

    def _replace_tables(self) -> None:
        """Find free room for tables that cannot be used, and for a directory that is lost."""
        shape = self._shape
        for copy in self._copies:
            wanting = np.flatnonzero(copy.wanting)
            lead = shape.gd_sectors if copy.lost else 0
            length = round_up(lead + len(wanting) * shape.gt_sectors, self._step)
            if not length:
                continue
            place = self._place(length)
            self._made.append(_Made(place, lead, length, wanting))
            if copy.lost:
                copy.gd_offset = place
                continue
            at, places = sector_bytes(copy.gd_offset), self._made[-1].places(shape).astype("<u4")
            breaks = np.flatnonzero(np.diff(wanting) != 1) + 1
            for tables, sectors in zip(np.split(wanting, breaks), np.split(places, breaks), strict=True):
                self._plan.patches.append((at + 4 * int(tables[0]), sectors.tobytes()))

    def _reclaim(self, grains: Int64s, sectors: Int64s) -> None:
        """Move grains from the end into gaps as long as this shortens the file; then set its length."""
        end = self._fixed_end()
        order = np.argsort(sectors)
        left = len(order)
        for place, start in self._free(sectors):
            while left and start - place >= self._step:
                index = int(order[left - 1])
                if int(sectors[index]) + self._step <= max(end, place):
                    break
                self._move(int(grains[index]), int(sectors[index]), place)
                left -= 1
                place += self._step
                end = max(end, place)
        if left:
            end = max(end, int(sectors[order[left - 1]]) + self._step)
        self._plan.end = min(self._plan.end, round_up(sector_bytes(end), sector_bytes(self._step)))

    def _move(self, grain: int, sector: int, place: int) -> None:
        source, target = sector_bytes(sector), sector_bytes(place)
        if source in self._split_to:  # it is copied anyway: directly to its last place
            number = self._split_to.pop(source)
            self._plan.copies[number] = self._plan.copies[number]._replace(target=target)
        else:
            self._plan.copies.append(Copied(source, target, sector_bytes(self._step)))
        self._set(grain, place)

    def _set(self, grain: int, sector: int) -> None:
        table, index = divmod(grain, self._shape.gtes_per_gt)
        if table not in self._tables:
            self._tables[table] = self._primary.read(table, table + 1)[0]
        self._tables[table][index] = sector
