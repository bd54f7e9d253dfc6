"""Grain tables and their directory: single entries for served requests, whole ranges as arrays for the rest.

    grain directory            grain tables (entries_per_table entries each)
    +------+                   +-----+-----+-----+
    | GDE0 | ----------------> | GTE | GTE | ... |      a GTE names the sector of a grain; 0 and 1 have meanings of
    their own
    | GDE1 | --- 0: no table   +-----+-----+-----+
    +------+

Invariants: tables are read on demand and only a bounded number stays in memory; a changed table stays there until
`write_back` has stored it, and every reader sees it meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.light import TYPE_CHECKING, Any, Final
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    Entries = npt.NDArray[Any]
else:
    Entries = object  # for annotations alone

_CACHED_BYTES: Final = 8 << 20
MAX_DIRTY_TABLES: Final = 2048
_ENTRIES_AT_ONCE: Final = 1 << 18
_CLEARED_BYTES: Final = 1 << 20


def read_directory(file: BlockFile, offset: int, count: int) -> Entries:
    """Return the `count` entries (32 bits) of a grain directory; entries past the end of the file are 0.

    Only what is stored is read: a directory of 128 MiB that is a hole of its file takes no memory.
    """
    directory = np.zeros(count, "<u4")
    view = directory.view(np.uint8).data
    at, end = offset, offset + len(view)
    while (at := file.next_data(at)) < end:
        hole = min(end, file.next_hole(at))
        if hole <= at:
            break
        file.read_into(at, view[at - offset : hole - offset])
        at = hole
    return directory


def used_entries(directory: Entries) -> npt.NDArray[np.int64]:
    """Return the numbers of the entries that are not 0; a directory that is a hole of its file takes no memory."""
    parts = [
        np.flatnonzero(directory[first : first + _ENTRIES_AT_ONCE]) + first
        for first in range(0, len(directory), _ENTRIES_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def read_tables(file: BlockFile, sectors: Entries, per_table: int) -> Entries | None:
    """Return the entries (32 bits) of the tables at `sectors`, one row a table; None where all are holes of the file.

    A sector of 0 is a table that does not exist. Only what is stored is read, and what the file lacks is 0.
    """
    found: Entries | None = None
    places, size = sectors.astype(np.int64), per_table * 4
    rows = np.flatnonzero(places)
    step, rest = divmod(size, SECTOR_SIZE)
    apart = (np.diff(rows) != 1) | (np.diff(places[rows]) != step)
    breaks = np.arange(1, len(rows)) if rest else np.flatnonzero(apart) + 1
    for group in np.split(rows, breaks):
        if not len(group):
            continue
        start: int = sector_bytes(int(places[group[0]]))
        end = start + len(group) * size
        at = start
        while (at := file.next_data(at)) < end:
            hole = min(end, file.next_hole(at))
            if hole <= at:
                break
            if found is None:
                found = np.zeros((len(sectors), per_table), "<u4")
            whole = found[group[0] : group[0] + len(group)].view(np.uint8).reshape(-1).data
            file.read_into(at, whole[at - start : hole - start])
            at = hole
    return found


def clear_tables(file: BlockFile, tables: GrainTables) -> None:
    """Make every entry of every table 0; where possible as a hole of the file. Not durable by itself."""
    for table, count in tables.stretches(0, tables.count):
        zero_range(file, sector_bytes(tables.table_sector(table)), count * tables.table_bytes)


def zero_range(file: BlockFile, offset: int, length: int) -> None:
    """Make the range read as zeros; where possible as a hole of the file. Not durable by itself."""
    at, end = offset, offset + length
    while (at := file.next_data(at)) < end:
        hole = min(end, file.next_hole(at))
        if hole <= at:
            break
        _discard(file, at, hole - at)
        at = hole


def _discard(file: BlockFile, offset: int, length: int) -> None:
    discard = getattr(file, "discard_range", None)
    if discard is not None and discard(offset, length):
        return
    for at in range(offset, offset + length, _CLEARED_BYTES):
        size = min(_CLEARED_BYTES, offset + length - at)
        if file.read_at(at, size).strip(b"\0"):  # what reads as zeros may be a hole that is not reported
            file.write_at(at, bytes(size))


class GrainTables:
    """The tables of one extent. `directory` is the GD as stored: one sector number a table, 0 where there is none."""

    def __init__(
        self, file: BlockFile, path: Path, directory: bytes | Entries, *, entries_per_table: int, entry_size: int = 4
    ) -> None:
        self._file = file
        self._path = path
        self._directory: Entries = (
            np.frombuffer(directory, "<u4" if entry_size == 4 else "<u8").copy()
            if isinstance(directory, bytes)
            else directory
        )
        self._dtype = np.dtype("<u4" if entry_size == 4 else "<u8")
        self.entries_per_table = entries_per_table
        self._entry_size = entry_size
        self.table_bytes = entries_per_table * entry_size
        self._cache: OrderedDict[int, bytearray] = OrderedDict()
        self._cache_limit = max(16, _CACHED_BYTES // self.table_bytes)
        self._dirty: dict[int, bytearray] = {}

    @property
    def count(self) -> int:
        """How many tables the directory has room for."""
        return len(self._directory)

    @property
    def directory(self) -> Entries:
        """Sector of each table, 0 where there is none; unsigned, as wide as they are stored."""
        return self._directory

    @property
    def dirty(self) -> dict[int, bytearray]:
        """Tables that were changed and not yet stored, by number."""
        return self._dirty

    def table_sector(self, table: int) -> int:
        """Return the sector of a table in the file, 0 where there is none."""
        return int(self._directory[table])

    def place_table(self, table: int, sector: int) -> None:
        """Note where a table that did not exist now is; its entries are zeros."""
        self._directory[table] = sector
        self._cache.pop(table, None)

    def place_tables(self, tables: npt.NDArray[np.intp], sectors: Entries) -> None:
        """Note where tables are that did not exist before."""
        self._directory[tables] = sectors

    def entry(self, grain: int) -> int:
        """Return the entry of `grain`."""
        table, index = divmod(grain, self.entries_per_table)
        raw = self._table(table)
        at = index * self._entry_size
        return int.from_bytes(raw[at : at + self._entry_size], "little")

    def run_length(self, grain: int, step: int, limit: int) -> int:
        """Return how many grains from `grain` on, in one table and at most `limit`, lie `step` apart or are all 0."""
        table, index = divmod(grain, self.entries_per_table)
        count = min(limit, self.entries_per_table - index)
        found = np.frombuffer(self._table(table), self._dtype, count, index * self._entry_size).astype(np.int64)
        first = int(found[0])
        breaks = np.flatnonzero(found != (first + step * np.arange(count) if first else 0))
        return int(breaks[0]) if len(breaks) else count

    def set_entry(self, grain: int, value: int) -> None:
        """Change the entry of `grain` in memory; the table is dirty from now on."""
        table, index = divmod(grain, self.entries_per_table)
        raw = self._dirty.get(table)
        if raw is None:
            raw = self._dirty[table] = self._table(table)
            self._cache.pop(table, None)
        at = index * self._entry_size
        raw[at : at + self._entry_size] = value.to_bytes(self._entry_size, "little")

    def stored(self) -> None:
        """Note that every dirty table has been stored."""
        for table, raw in self._dirty.items():
            self._remember(table, raw)
        self._dirty = {}

    def entries(self, first: int, last: int) -> Entries:
        """Return the entries of grains [first, last) as an array of that length."""
        per_table = self.entries_per_table
        t0, t1 = first // per_table, -(-last // per_table)
        found = np.zeros((t1 - t0, per_table), self._dtype)
        for table, count in self.stretches(t0, t1):
            offset = sector_bytes(int(self._directory[table]))
            length = count * self.table_bytes
            if self._file.next_data(offset) >= offset + length:
                continue  # a hole of the file: all entries are 0
            raw = self._file.read_at(offset, length)
            if len(raw) != length:
                self._beyond_end(table)
            found[table - t0 : table - t0 + count] = np.frombuffer(raw, self._dtype).reshape(count, per_table)
        for table, changed in self._dirty.items():
            if t0 <= table < t1:
                found[table - t0] = np.frombuffer(changed, self._dtype)
        return found.reshape(-1)[first - t0 * per_table : last - t0 * per_table]

    def stretches(self, t0: int, t1: int) -> Iterator[tuple[int, int]]:
        """Yield (first table, count) of the stretches of [t0, t1) whose tables lie one after the other in the file."""
        sectors = self._directory[t0:t1].astype(np.int64)
        present = np.flatnonzero(sectors)
        if not len(present):
            return
        step, rest = divmod(self.table_bytes, SECTOR_SIZE)
        apart = (np.diff(present) != 1) | (np.diff(sectors[present]) != step)
        # A table that fills no whole sectors is padded: no two of them lie one after the other.
        breaks = np.arange(1, len(present)) if rest else np.flatnonzero(apart) + 1
        for group in np.split(present, breaks):
            yield t0 + int(group[0]), len(group)

    def _table(self, table: int) -> bytearray:
        raw = self._dirty.get(table) or self._cache.get(table)
        if raw is None:
            raw = self._load(table)
            self._remember(table, raw)
        else:
            try:  # noqa: SIM105 - contextlib.suppress takes longer than all the rest of this
                self._cache.move_to_end(table)
            except KeyError:  # it is a dirty one, or another thread that reads has just dropped it
                pass
        return raw

    def _load(self, table: int) -> bytearray:
        sector = int(self._directory[table])
        if not sector:
            return bytearray(self.table_bytes)
        raw = bytearray(self._file.read_at(sector_bytes(sector), self.table_bytes))
        if len(raw) != self.table_bytes:
            self._beyond_end(table)
        return raw

    def _remember(self, table: int, raw: bytearray) -> None:
        self._cache[table] = raw
        if len(self._cache) > self._cache_limit:
            self._cache.popitem(last=False)

    def _beyond_end(self, table: int) -> None:
        sector = int(self._directory[table])
        rule = f"must place the grain table inside the file of {self._file.size()} bytes"
        raise FormatError(self._path, sector_bytes(sector), f"grain directory entry {table}", sector, rule)
