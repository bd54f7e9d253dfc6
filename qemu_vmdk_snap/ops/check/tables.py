"""Checks the grain tables of one hosted sparse or COWD extent, as whole arrays.

Checked: a directory entry that is 0 (normal in COWD), outside the file or inside something else; a grain table entry
that is past the end of the file, inside the metadata, or shares its grain with another; primary and redundant
copies that differ; grains of the file that no entry names. Entries that one copy lacks, as a power cut between the two
leaves it, are notes.

Memory: one window of tables, the directories as far as they are stored, and 16 bytes for each stretch of grains that
follow one another in the file. Tables that are holes of the file take no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qemu_vmdk_snap.light import TYPE_CHECKING, Final, dataclass, field
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.ops.check.findings import LISTED, Findings, GrainCounts, Severity
from qemu_vmdk_snap.ops.check.shape import TableShape, shape_of
from qemu_vmdk_snap.ops.check.stretches import Stretches
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.cowd.header import CowdHeader
from qemu_vmdk_snap.vmdk.grain.tables import Entries, GrainTables, read_directory, used_entries
from qemu_vmdk_snap.vmdk.runs import Int64s
from qemu_vmdk_snap.vmdk.sparse.copies import Comparison
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader

if TYPE_CHECKING:
    import numpy.typing as npt

_TABLES_AT_ONCE: Final = 2048


@dataclass(frozen=True, slots=True)
class TableAudit:
    """What `audit_tables` found and a repair needs again."""

    counts: GrainCounts
    end: int
    """The byte after the last grain or table that is in use."""
    leaks: list[tuple[int, int]] = field(default_factory=list)
    """(first sector, sectors) of each stretch that nothing refers to."""
    shared: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    """Sectors of grains that overlap the grain before them, as entries have them."""


def audit_tables(
    file: BlockFile,
    header: SparseExtentHeader | CowdHeader,
    findings: Findings,
    on_grains: Callable[[int], None],
) -> TableAudit:
    """Add what is wrong with the tables to `findings`; `on_grains` gets the number of grains of each window."""
    copies = None if isinstance(header, CowdHeader) else header
    return _Audit(file, shape_of(header), findings, copies).run(on_grains)


class _Audit:
    def __init__(
        self, file: BlockFile, header: TableShape, findings: Findings, copies: SparseExtentHeader | None
    ) -> None:
        """`copies` is the header of an extent that may keep two copies of its tables."""
        self._two_copies = copies
        self._file, self._path, self._header, self._findings = file, file.path, header, findings
        self._size = file.size()
        self._grains = -(-header.capacity // header.grain_size)
        self._lowest = header.lowest
        self._tables = self._read_directory(header.gd_offset, "grain directory entry")
        self._redundant = (
            None
            if header.rgd_offset is None
            else self._read_directory(header.rgd_offset, "redundant grain directory entry")
        )
        self._meta_starts, self._meta_ends = self._metadata()
        self._last = -1

    def run(self, on_grains: Callable[[int], None]) -> TableAudit:
        counts = GrainCounts(total=self._grains)
        places = Stretches(self._header.grain_size)
        differing: list[int] = []
        done = 0
        for first, entries, copy in self._windows():
            if copy is None or np.array_equal(entries, copy):
                self._collect(first, entries, counts, places)
            else:
                differing.append(first)
            on_grains(first + len(entries) - done)
            done = first + len(entries)
        for first, entries in self._decided(differing):
            self._collect(first, entries, counts, places)
        on_grains(self._grains - done)
        starts, ends = places.sorted()
        shared = places.shared_sectors()
        if len(shared):
            self._name_shared(shared, places.shared_count)
        leaks = self._find_leaks(starts, ends)
        end = sector_bytes(max(int(ends.max(initial=0)), int(self._meta_ends[-1])))
        return TableAudit(counts, min(end, self._size), leaks, shared)

    def _collect(self, first: int, entries: Entries, counts: GrainCounts, places: Stretches) -> None:
        stored = entries >= self._lowest
        count = int(np.count_nonzero(stored))
        if count:
            counts.allocated += count
            sectors = entries if count == len(entries) else entries[stored]
            sectors = self._usable(first, stored, sectors)
            places.add(*self._as_runs(sectors, counts))

    def _usable(self, first: int, stored: npt.NDArray[np.bool_], sectors: Entries) -> Entries:
        """Return the sectors that are in the file and outside the metadata; the others are noted."""
        clear = len(self._meta_ends) == 1 and int(sectors.min()) >= self._meta_ends[0]
        if clear and (int(sectors.max()) + self._header.grain_size) * SECTOR_SIZE <= self._size:
            return sectors
        named = np.flatnonzero(stored)
        good = self._inside_file(first, named, sectors) & self._outside_metadata(first, named, sectors)
        return np.asarray(sectors[good])

    def _as_runs(self, sectors: Entries, counts: GrainCounts) -> tuple[Int64s, Int64s]:
        """Return where grains that follow one another in the file begin and end; count the jumps between."""
        if not len(sectors):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        step = self._header.grain_size
        jumps = np.flatnonzero(
            sectors[1:] - sectors[:-1] != step
        )  # 32 bits: a step backwards wraps, and counts as a jump
        starts = sectors[np.concatenate([[0], jumps + 1])].astype(np.int64)
        ends = sectors[np.concatenate([jumps, [len(sectors) - 1]])].astype(np.int64) + step
        counts.fragmented += len(jumps) + (self._last >= 0 and int(starts[0]) != self._last)
        self._last = int(ends[-1])
        return starts, ends

    def _windows(self) -> Iterator[tuple[int, Entries, Entries | None]]:
        """Yield (first grain, entries, entries of the redundant copy) where any is stored."""
        both = [self._tables] if self._redundant is None else [self._tables, self._redundant]
        numbers = np.concatenate([used_entries(tables.directory) // _TABLES_AT_ONCE for tables in both])
        for number in np.unique(numbers).tolist():
            t0 = number * _TABLES_AT_ONCE
            if any(self._is_stored(tables, t0) for tables in both):
                yield self._window(t0 * self._header.gtes_per_gt)

    def _window(self, first: int) -> tuple[int, Entries, Entries | None]:
        last = min(self._grains, first + _TABLES_AT_ONCE * self._header.gtes_per_gt)
        copy = None if self._redundant is None else self._redundant.entries(first, last)
        return first, self._tables.entries(first, last), copy

    def _is_stored(self, tables: GrainTables, t0: int) -> bool:
        """Return whether any of a window's tables is not a hole of the file."""
        for table, count in tables.stretches(t0, min(tables.count, t0 + _TABLES_AT_ONCE)):
            start = sector_bytes(tables.table_sector(table))
            if self._file.next_data(start) < start + count * tables.table_bytes:
                return True
        return False

    def _read_directory(self, gd_offset: int, name: str) -> GrainTables:
        """Return the tables; entries that cannot be followed are noted and taken as absent."""
        header = self._header
        directory = read_directory(self._file, sector_bytes(gd_offset), header.gd_entries)
        absent = len(directory) - int(np.count_nonzero(directory))
        if absent and not header.on_demand:
            first = int(np.argmin(directory))
            at = sector_bytes(gd_offset) + 4 * first
            rule = "must name a grain table: QEMU overwrites the header when it writes through an entry of 0"
            self._findings.corrupt(self._path, at, f"{name} {first}", 0, rule, absent)
        used = used_entries(directory)
        beyond = used[directory[used] > self._size // SECTOR_SIZE - header.gt_sectors]
        for index in beyond[:LISTED].tolist():
            at = sector_bytes(gd_offset) + 4 * index
            rule = f"must place the grain table inside the file of {self._size} bytes"
            self._findings.corrupt(self._path, at, f"{name} {index}", int(directory[index]), rule)
        self._findings.corrupt_many(self._path, name, (), max(0, len(beyond) - LISTED))
        directory[beyond] = 0
        return GrainTables(self._file, self._path, directory, entries_per_table=header.gtes_per_gt)

    def _metadata(self) -> tuple[Int64s, Int64s]:
        """Return the sorted stretches (sectors) that hold metadata; note those that overlap."""
        header = self._header
        fixed = [*header.fixed, (header.gd_offset, header.gd_sectors)]
        tables = [self._tables.directory]
        if self._redundant is not None and header.rgd_offset is not None:
            fixed.append((header.rgd_offset, header.gd_sectors))
            tables.append(self._redundant.directory)
        fixed = [(start, length) for start, length in fixed if length]
        used = [table[used_entries(table)].astype(np.int64) for table in tables]
        starts = np.concatenate([np.array([start for start, _ in fixed]), *used])
        lengths = np.full(len(starts), header.gt_sectors, np.int64)
        lengths[: len(fixed)] = [length for _, length in fixed]
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], (starts + lengths)[order]
        reach = np.maximum.accumulate(ends)
        overlapping = np.flatnonzero(starts[1:] < reach[:-1]) + 1
        for index in overlapping[:LISTED].tolist():
            rule = f"must not lie inside the metadata that reaches to sector {reach[index - 1]}"
            at = sector_bytes(int(starts[index]))
            self._findings.corrupt(self._path, at, "grain table", int(starts[index]), rule)
        self._findings.corrupt_many(self._path, "grain table", (), max(0, len(overlapping) - LISTED))
        for table in tables:
            self._keep_first(table)
        opens = np.concatenate([[True], starts[1:] > reach[:-1]])
        return starts[opens], reach[np.append(np.flatnonzero(opens)[1:] - 1, len(reach) - 1)]

    def _keep_first(self, directory: Entries) -> None:
        """Treat entries that name the table of an earlier one as absent: that was noted, and a table is read once."""
        used = used_entries(directory)
        kept = np.unique(directory[used], return_index=True)[1]
        if len(kept) < len(used):
            directory[np.delete(used, kept)] = 0

    def _decided(self, differing: list[int]) -> Iterator[tuple[int, Entries]]:
        """Yield the windows whose copies differ, with what only one copy has; the differences are noted."""
        if not differing or self._two_copies is None:
            return
        comparison = Comparison(self._file, self._two_copies)
        per_table = self._header.gtes_per_gt
        for first in differing:
            _, primary, redundant = self._window(first)
            if redundant is None:
                continue
            rows = -(-len(primary) // per_table)
            mine, twin = _as_rows(primary, rows, per_table), _as_rows(redundant, rows, per_table)
            lacking, contrary = comparison.sort_out(first // per_table + np.arange(rows), mine, twin)
            self._note_lacking(first, mine, twin, np.flatnonzero(lacking))
            self._note_contrary(first, mine, twin, np.flatnonzero(contrary))
            yield first, np.where(lacking, np.maximum(mine, twin), mine).reshape(-1)[: len(primary)]

    def _note_lacking(self, first: int, primary: Entries, redundant: Entries, where: Int64s) -> None:
        mine, twin = primary.reshape(-1), redundant.reshape(-1)
        why = "a writer was interrupted between the two copies, and the next one adds it"
        for here, field_name, other, rows in (
            (self._tables, "grain table entry", "redundant", where[mine[where] < twin[where]]),
            (self._redundant, "redundant grain table entry", "primary", where[mine[where] > twin[where]]),
        ):
            values = (mine, twin) if here is self._tables else (twin, mine)
            items = (
                (
                    self._entry_offset(here or self._tables, first + int(i)),
                    int(values[0][i]),
                    f"must equal the {other} entry {values[1][i]} of grain {first + i}: {why}",
                )
                for i in rows
            )
            self._findings.repairable_many(self._path, field_name, items, len(rows))

    def _note_contrary(self, first: int, primary: Entries, redundant: Entries, where: Int64s) -> None:
        mine, twin = primary.reshape(-1), redundant.reshape(-1)
        tables = self._redundant or self._tables
        items = (
            (
                self._entry_offset(tables, first + int(i)),
                int(twin[i]),
                f"must equal the primary entry {mine[i]} of grain {first + i}",
            )
            for i in where
        )
        self._findings.corrupt_many(self._path, "redundant grain table entry", items, len(where))

    def _inside_file(self, first: int, named: Int64s, sectors: Entries) -> npt.NDArray[np.bool_]:
        starts = sectors.astype(np.int64) * SECTOR_SIZE
        good = starts < self._size
        if not good.all():
            beyond = np.flatnonzero(~good)
            self._bad_entries(first, named[beyond], sectors[beyond], f"inside the file of {self._size} bytes")
        left = self._header.capacity - (first + named) * self._header.grain_size  # the disk may end within its last one
        ends = starts + sector_bytes(1) * np.minimum(self._header.grain_size, left)
        if (cut := np.flatnonzero(good & (ends > self._size))).size:
            self._bad_entries(first, named[cut], sectors[cut], f"inside the file of {self._size} bytes, whole")
        return np.asarray(good)

    def _outside_metadata(self, first: int, named: Int64s, sectors: Entries) -> npt.NDArray[np.bool_]:
        if len(self._meta_ends) == 1 and int(sectors.min()) >= self._meta_ends[0]:
            return np.ones(len(sectors), np.bool_)
        places = sectors.astype(np.int64)
        before = np.searchsorted(self._meta_starts, places + self._header.grain_size, "left") - 1
        good = (before < 0) | (self._meta_ends[before] <= places)
        if not good.all():
            inside = np.flatnonzero(~good)
            self._bad_entries(first, named[inside], sectors[inside], "outside the metadata")
        return np.asarray(good)

    def _bad_entries(self, first: int, indices: Int64s, sectors: Entries, where: str) -> None:
        items = (
            (self._entry_offset(self._tables, first + int(i)), int(sector), f"must place grain {first + i} {where}")
            for i, sector in zip(indices, sectors, strict=True)
        )
        self._findings.corrupt_many(self._path, "grain table entry", items, len(indices))

    def _name_shared(self, shared: Entries, count: int) -> None:
        """Find the entries whose grains overlap: a second pass over the tables, only for a damaged image."""
        step = self._header.grain_size
        items: list[tuple[int, object, str]] = []
        for first, entries, _ in self._windows():
            places = entries.astype(np.int64)
            near = np.searchsorted(shared, np.maximum(places - step + 1, 0), "left")
            hit = shared[np.minimum(near, len(shared) - 1)] < places + step
            hit &= (near < len(shared)) & (entries >= self._lowest)
            for index in np.flatnonzero(hit):
                at = self._entry_offset(self._tables, first + int(index))
                rule = f"must not share the place of grain {first + index} in the file with another entry"
                items.append((at, int(entries[index]), rule))
                if len(items) == LISTED:
                    break
            if len(items) == LISTED:
                break
        self._findings.corrupt_many(self._path, "shared grain table entry", items, count)

    def _find_leaks(self, grain_starts: Int64s, grain_ends: Int64s) -> list[tuple[int, int]]:
        """Return the ranges inside the part in use that nothing names; whole grains only."""
        step = self._header.grain_size
        starts = np.concatenate([self._meta_starts, grain_starts])
        ends = np.concatenate([self._meta_ends, grain_ends])
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        stop = min(self._header.used.stop, self._size // SECTOR_SIZE)
        tables = self._tables.directory
        floor = min(self._header.first_use(tables[used_entries(tables)]), stop)
        from_ = np.maximum(ends, floor)
        to = np.minimum(np.append(starts[1:], stop), stop)
        leaks = []
        for index in np.flatnonzero(to - from_ >= step):
            start, length = int(from_[index]), int(to[index] - from_[index])
            leaks.append((start, length))
            rule = "must be named by a grain table entry"
            args = (self._path, sector_bytes(start), "grain", start, rule, length // step)
            self._findings.add(Severity.LEAK, *args)
        return leaks

    def _entry_offset(self, tables: GrainTables, grain: int) -> int:
        table, index = divmod(grain, self._header.gtes_per_gt)
        return sector_bytes(tables.table_sector(table)) + 4 * index


def _as_rows(entries: Entries, rows: int, per_table: int) -> Entries:
    """Return the entries one row a table, zeros past the last one."""
    whole = np.zeros((rows, per_table), "<u4")
    whole.reshape(-1)[: len(entries)] = entries
    return whole
