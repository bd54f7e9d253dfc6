"""Compares the two copies of the grain tables of a hosted sparse extent, and finds which one is right.

    grain directory  -> table -> entry       A power cut between the two copies leaves an entry in one of them alone:
    redundant GD     -> table -> entry       our engine writes the redundant copy first, QEMU the primary one.

An entry is *missing* where one copy has 0 (or the zero mark, where the other has a place) and the other names a grain
that is completely in the file, outside the metadata, and that no other entry names: that entry is right. Every
other difference is a *conflict*: only a repair decides it.

Memory: one window of tables, the directories, and, only where copies differ, 4 bytes for each stored grain. Holes of
the file are not read.
"""

from __future__ import annotations

from collections.abc import Iterator

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.light import TYPE_CHECKING, Final, NamedTuple, dataclass
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import byte_sectors, sector_bytes
from qemu_vmdk_snap.vmdk.grain.tables import Entries, read_directory, read_tables, used_entries
from qemu_vmdk_snap.vmdk.runs import Int64s
from qemu_vmdk_snap.vmdk.sparse.header import HeaderFlag, SparseExtentHeader

if TYPE_CHECKING:
    import numpy.typing as npt

    Bools = npt.NDArray[np.bool_]

LISTED: Final = 1 << 16
"""Entries that a report lists one by one; the rest is only counted."""
_TABLES_AT_ONCE: Final = 2048


class MissingEntry(NamedTuple):
    """An entry that one of the copies lacks."""

    grain: int
    primary: int
    redundant: int
    offset: int
    """Byte of the file where the entry is missing."""


class Conflict(NamedTuple):
    """A difference that only a repair can decide."""

    offset: int
    """Byte of the file where `value` is."""
    field: str
    value: int
    rule: str


@dataclass(frozen=True, slots=True)
class CopiesReport:
    """How the two copies differ; the counts include what is not listed."""

    missing: tuple[MissingEntry, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    missing_count: int = 0
    conflict_count: int = 0


def compare_copies(file: BlockFile, header: SparseExtentHeader) -> CopiesReport:
    """Return how the two copies of the tables differ; nothing where the extent keeps one copy."""
    return Comparison(file, header).report() if _has_two(header) else CopiesReport()


def settle_copies(file: BlockFile, header: SparseExtentHeader) -> int:
    """Write every missing entry into the copy that lacks it, durably, and return how many there were.

    Only entries that the other copy has are added, so a power cut or a kill at any point leaves less to do.

    Raises:
        FormatError: the copies conflict: the first difference is named; or neither has a table, so that what it named
            cannot be distinguished from what was never written. Nothing was written.
    """
    if not _has_two(header):
        return 0
    comparison = Comparison(file, header)
    report = comparison.report()
    if report.conflicts:
        first = report.conflicts[0]
        rule = f"{first.rule}: repair the image first: image check -r all {file.path}"
        raise FormatError(file.path, first.offset, first.field, first.value, rule)
    if (absent := comparison.absent()) is not None:
        rule = "must name a grain table in one of the two directories: nothing is changed while one is lost"
        at = sector_bytes(header.gd_offset) + 4 * absent
        raise FormatError(file.path, at, f"grain directory entry {absent}", 0, rule)
    if report.missing_count:
        file.flush()  # barrier: the grains that are named may be in the page cache alone, after a kill
        for offset, data in comparison.writes():
            file.write_at(offset, data)
        file.flush()
    return report.missing_count


def _has_two(header: SparseExtentHeader) -> bool:
    return header.redundant and header.is_extent and not header.compressed


class _Window(NamedTuple):
    """Some tables of both copies: their numbers, and their entries, one row a table."""

    tables: Int64s
    primary: Entries
    redundant: Entries


class Comparison:
    """Compares the copies of one extent; both directories must be inside the file, else that is the one conflict."""

    def __init__(self, file: BlockFile, header: SparseExtentHeader) -> None:
        self._file, self._header = file, header
        self._size = file.size()
        self._grains = -(-header.capacity // header.grain_size)
        self._lowest = 2 if header.flags & HeaderFlag.ZEROED_GRAINS else 1
        self._outside = self._directory_outside()
        empty = np.zeros(0, "<u4")
        places = [empty, empty]
        self._tables: Int64s = np.zeros(0, np.int64)
        if self._outside is None:
            places = [
                read_directory(file, sector_bytes(at), header.gd_entries)
                for at in (header.gd_offset, header.rgd_offset)
            ]
            self._tables = np.union1d(used_entries(places[0]), used_entries(places[1]))
        # From here on arrays have one element for each table that a directory names.
        self._places = [directory[self._tables].astype(np.int64) for directory in places]
        self._usable: list[Bools] = [
            (at > 0) & (sector_bytes(1) * at + header.gtes_per_gt * 4 <= self._size) for at in self._places
        ]
        self._meta = self._metadata()
        self._clean = self._undisputed(0) & self._undisputed(1)
        self._named: Entries | None = None
        self._differing: list[int] = []

    def report(self) -> CopiesReport:
        """Return all differences."""
        if self._outside is not None:
            return CopiesReport(conflicts=(self._outside,), conflict_count=1)
        self._scan()
        conflicts, count = self._bad_directories()
        missing: list[MissingEntry] = []
        missing_count = 0
        both = self._usable[0] & self._usable[1]
        for window in map(self._read, self._differing):
            lacking, contrary = self.sort_out(*window)
            contrary &= both[
                np.searchsorted(self._tables, window.tables), None
            ]  # else the directory entry is the difference
            missing_count += int(np.count_nonzero(lacking))
            count += int(np.count_nonzero(contrary))
            missing += self._list_missing(window, lacking, LISTED - len(missing))
            conflicts += self._list_conflicts(window, contrary, LISTED - len(conflicts))
        return CopiesReport(tuple(missing), tuple(conflicts), missing_count, count)

    def absent(self) -> int | None:
        """Return the first table that neither directory names: every writer makes all tables when it makes the file."""
        if len(self._tables) == self._header.gd_entries:
            return None
        there = np.zeros(self._header.gd_entries, np.bool_)
        there[self._tables] = True
        return int(np.argmin(there))

    def writes(self) -> Iterator[tuple[int, bytes]]:
        """Yield (byte, entries) for each table that lacks entries of the other copy."""
        for window in map(self._read, self._differing):
            lacking, _ = self.sort_out(*window)
            right = np.maximum(window.primary, window.redundant)
            for copy, mine in enumerate((window.redundant, window.primary)):
                wanted = lacking & (mine != right)
                for row in np.flatnonzero(wanted.any(axis=1)).tolist():
                    columns = np.flatnonzero(wanted[row])
                    first, last = int(columns[0]), int(columns[-1]) + 1
                    at = self._entry_offset(1 - copy, int(window.tables[row]), first)
                    yield at, right[row, first:last].astype("<u4").tobytes()

    def sort_out(self, tables: Int64s, primary: Entries, redundant: Entries) -> tuple[Bools, Bools]:
        """Return which entries are missing in one of the copies, and which are in conflict; one row a table."""
        differ = primary != redundant
        named, other = np.maximum(primary, redundant), np.minimum(primary, redundant)
        lacking = differ & (other < self._lowest) & self._in_order(tables)[:, None]
        rows, columns = np.nonzero(lacking & (named >= self._lowest))
        grains = tables[rows] * self._header.gtes_per_gt + columns
        lacking[rows, columns] = self._good(named[rows, columns].astype(np.int64), grains)
        return lacking, differ & ~lacking

    def _directory_outside(self) -> Conflict | None:
        header, length = self._header, self._header.gd_entries * 4
        for field in ("gd_offset", "rgd_offset"):
            sector = getattr(header, field)
            if not sector or sector_bytes(sector) + length > self._size:
                rule = f"must leave {length} bytes inside the file of {self._size} bytes"
                return Conflict(header.offset_of(field), field, sector, rule)
        return None

    def _fixed(self) -> list[tuple[int, int]]:
        header = self._header
        gd_sectors = byte_sectors(header.gd_entries * 4)
        parts = [(0, 1), (header.descriptor_offset, header.descriptor_size)]
        parts += [(header.gd_offset, gd_sectors), (header.rgd_offset, gd_sectors)]
        end = byte_sectors(self._size)
        return [(start, min(length, end - start)) for start, length in parts if length and start < end]

    def _metadata(self) -> tuple[Int64s, Int64s]:
        """Return where metadata begins, sorted, and up to where it reaches from there."""
        fixed = np.array(self._fixed(), np.int64)
        tables = np.concatenate([at[usable] for at, usable in zip(self._places, self._usable, strict=True)])
        starts = np.concatenate([fixed[:, 0], tables])
        ends = np.concatenate([fixed.sum(axis=1), tables + self._header.gt_sectors])
        order = np.argsort(starts, kind="stable")
        return starts[order], np.maximum.accumulate(ends[order])

    def _undisputed(self, copy: int) -> Bools:
        """Return which tables of a copy overlap nothing else, so that writing into them changes nothing else."""
        header, at = self._header, self._places[copy]
        clean: Bools = self._usable[copy].copy()
        for start, length in self._fixed():
            clean &= (at >= start + length) | (at + header.gt_sectors <= start)
        every = np.concatenate([places[usable] for places, usable in zip(self._places, self._usable, strict=True)])
        every.sort()
        near = np.searchsorted(every, at + header.gt_sectors, "left")
        near -= np.searchsorted(every, at - header.gt_sectors, "right")
        clean &= near == 1
        return clean

    def _in_order(self, tables: Int64s) -> Bools:
        """Return which of the tables exist in both copies and overlap nothing else."""
        if not len(self._tables):
            return np.zeros(len(tables), np.bool_)
        index = np.minimum(np.searchsorted(self._tables, tables), len(self._tables) - 1)
        found: Bools = (self._tables[index] == tables) & self._clean[index]
        return found

    def _scan(self) -> None:
        self._differing = []
        for first in range(0, len(self._tables), _TABLES_AT_ONCE):
            if (window := self._stored(first)) is not None and not np.array_equal(window.primary, window.redundant):
                self._differing.append(first)

    def _stored(self, first: int) -> _Window | None:
        """Return a window; None where both copies are holes of the file."""
        part = slice(first, first + _TABLES_AT_ONCE)
        tables = self._tables[part]
        found = [
            read_tables(self._file, np.where(usable[part], at[part], 0), self._header.gtes_per_gt)
            for at, usable in zip(self._places, self._usable, strict=True)
        ]
        if all(entries is None for entries in found):
            return None
        shape = len(tables), self._header.gtes_per_gt
        primary, redundant = (np.zeros(shape, "<u4") if entries is None else entries for entries in found)
        past = self._grains - int(tables[-1]) * self._header.gtes_per_gt
        if past < self._header.gtes_per_gt:  # the last table is covered in part
            primary[-1, past:] = 0
            redundant[-1, past:] = 0
        return _Window(tables, primary, redundant)

    def _read(self, first: int) -> _Window:
        window = self._stored(first)
        if window is None:  # it existed just before: the image is not locked
            tables = self._tables[first : first + _TABLES_AT_ONCE]
            none = np.zeros((len(tables), self._header.gtes_per_gt), "<u4")
            return _Window(tables, none, none)
        return window

    def _good(self, places: Int64s, grains: Int64s) -> Bools:
        """Return which grains are completely in the file, outside the metadata, and named by only one entry."""
        step = self._header.grain_size
        left = np.minimum(step, self._header.capacity - grains * step)  # the disk may end within its last one
        starts, reach = self._meta
        before = np.searchsorted(starts, places + step, "left") - 1
        good: Bools = (sector_bytes(1) * (places + left) <= self._size) & ((before < 0) | (reach[before] <= places))
        if good.any():
            named = self._names()
            first, last = (places - step + 1).clip(0), places + step
            good &= np.searchsorted(named, last, "left") - np.searchsorted(named, first, "left") == 1
        return good

    def _names(self) -> Entries:
        """Return the sorted places that the entries of both copies name; where they agree, they count once."""
        if self._named is None:
            named = np.zeros(sum(len(places) for places in self._each_names()), "<u4")
            at = 0
            for places in self._each_names():
                named[at : at + len(places)] = places
                at += len(places)
            named.sort()
            self._named = named
        return self._named

    def _each_names(self) -> Iterator[Entries]:
        # A damaged directory may name one table a thousand times; it is never written, so looking at it once is enough.
        first_named = np.zeros((2, len(self._tables)), np.bool_)
        for copy, places in enumerate(self._places):
            first_named[copy, np.unique(places, return_index=True)[1]] = True
        for first in range(0, len(self._tables), _TABLES_AT_ONCE):
            if (window := self._stored(first)) is not None:
                once = first_named[:, first : first + _TABLES_AT_ONCE, None]
                yield window.primary[(window.primary >= self._lowest) & once[0]]
                alone = (window.redundant >= self._lowest) & (window.redundant != window.primary)
                yield window.redundant[alone & once[1]]

    def _bad_directories(self) -> tuple[list[Conflict], int]:
        """Return the directory entries that lead to no table while those of the other copy do."""
        found: list[Conflict] = []
        count = 0
        header = self._header
        for copy, (field, at) in enumerate(
            (("grain directory entry", header.gd_offset), ("redundant grain directory entry", header.rgd_offset))
        ):
            mine, twin = self._usable[copy], self._usable[1 - copy]
            wrong = ~mine & (self._places[copy] > 0)
            rows = np.flatnonzero(~mine & ~wrong & twin)
            wrong[rows] = self._hold_entries(self._places[1 - copy][rows])
            count += int(np.count_nonzero(wrong))
            for row in np.flatnonzero(wrong)[: LISTED - len(found)].tolist():
                sector, table = int(self._places[copy][row]), int(self._tables[row])
                rule = f"must place the grain table inside the file of {self._size} bytes"
                if not sector:
                    rule = "must name a grain table, as the other copy of the directory does"
                found.append(Conflict(sector_bytes(at) + 4 * table, f"{field} {table}", sector, rule))
        return found, count

    def _hold_entries(self, sectors: Int64s) -> Bools:
        """Return which of the tables name anything."""
        hold = np.zeros(len(sectors), np.bool_)
        for first in range(0, len(sectors), _TABLES_AT_ONCE):
            entries = read_tables(self._file, sectors[first : first + _TABLES_AT_ONCE], self._header.gtes_per_gt)
            if entries is not None:
                hold[first : first + _TABLES_AT_ONCE] = entries.any(axis=1)
        return hold

    def _list_missing(self, window: _Window, lacking: Bools, room: int) -> list[MissingEntry]:
        listed = []
        for row, column in np.argwhere(lacking)[:room].tolist():
            table, mine, twin = int(window.tables[row]), window.primary[row, column], window.redundant[row, column]
            at = self._entry_offset(0 if mine < twin else 1, table, column)
            listed.append(MissingEntry(table * self._header.gtes_per_gt + column, int(mine), int(twin), at))
        return listed

    def _list_conflicts(self, window: _Window, contrary: Bools, room: int) -> list[Conflict]:
        listed = []
        for row, column in np.argwhere(contrary)[:room].tolist():
            table = int(window.tables[row])
            grain = table * self._header.gtes_per_gt + column
            rule = f"must equal the primary entry {window.primary[row, column]} of grain {grain}"
            at = self._entry_offset(1, table, column)
            listed.append(Conflict(at, "redundant grain table entry", int(window.redundant[row, column]), rule))
        return listed

    def _entry_offset(self, copy: int, table: int, column: int) -> int:
        """Return the byte of an entry in a copy: 0 is the primary one, 1 the redundant one."""
        return sector_bytes(int(self._places[copy][np.searchsorted(self._tables, table)])) + 4 * column
