"""Extents with grains, a directory and tables: reading and copy-on-write, independent of the header.

    | header ... | directory | tables ... | grain | grain | ...

A table entry is 0 (read from the parent), 1 where the kind allows it (zeros over any parent), or the sector of the
grain.

Invariants of writing:
- A grain is durable before any table names it: tables change in memory first, and `flush` stores them after a barrier.
- Every copy of a table is stored; a table that is new is durable in its zeros before a directory names it.
- Grains are only ever added past the end of the file; what a table names is never moved or reused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.light import ClassVar, Final, NamedTuple
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer
from qemu_vmdk_snap.units import MIB, SECTOR_SIZE, byte_sectors, round_up, sector_bytes
from qemu_vmdk_snap.vmdk import shortfall
from qemu_vmdk_snap.vmdk.extent import Below, Place
from qemu_vmdk_snap.vmdk.grain.tables import MAX_DIRTY_TABLES, Entries, GrainTables
from qemu_vmdk_snap.vmdk.noted import Notes
from qemu_vmdk_snap.vmdk.runs import DATA, HOLE, ZERO, Int64s, Kinds, RunTable, from_entries

GTE_UNALLOCATED: Final = 0
GTE_ZEROED: Final = 1
MAX_FILE_SECTORS: Final = 1 << 32
"""A GTE is 32 bits wide: no grain can begin at or after this sector."""

_WRITE_BATCH: Final = 4 * MIB


class Copy(NamedTuple):
    """One copy of the tables, and the byte of the file where its directory begins."""

    tables: GrainTables
    directory_offset: int


class GrainExtent:
    """One open extent with grains. The first of `copies` is the one that is read."""

    compressed: ClassVar[bool] = False
    """Whether its grains are stored deflated."""

    def __init__(
        self,
        file: BlockFile,
        path: Path,
        copies: list[Copy],
        *,
        capacity: int,
        grain_bytes: int,
        has_zeroed: bool = False,
        writable: bool = False,
    ) -> None:
        self._file = file
        self._path = path
        self._copies = copies
        self._capacity = capacity
        self._grain_bytes = grain_bytes
        self._has_zeroed = has_zeroed
        self._writable = writable
        self._file_size = file.size()
        self._unsynced = False
        self._on_entry: Callable[[int, int], None] | None = None
        self.notes = Notes()

    @property
    def capacity(self) -> int:
        """Bytes of the guest's disk that it stands for."""
        return self._capacity

    @property
    def grain_bytes(self) -> int:
        """Bytes of one grain."""
        return self._grain_bytes

    @property
    def varied_bytes(self) -> int:
        """The whole capacity."""
        return self._capacity

    @property
    def file(self) -> BlockFile:
        """The file that holds it."""
        return self._file

    @property
    def tables(self) -> GrainTables:
        """The tables that are read."""
        return self._copies[0].tables

    def lookup(self, offset: int) -> Place:
        """Return where the byte at `offset` is; the place ends with its grain."""
        grain, inside = divmod(offset, self._grain_bytes)
        left = min(self._grain_bytes - inside, self._capacity - offset)
        entry = self.tables.entry(grain)
        if entry == GTE_UNALLOCATED:
            return Place(HOLE, 0, left)
        if entry == GTE_ZEROED and self._has_zeroed:
            return Place(ZERO, 0, left)
        if sector_bytes(entry) >= self._file_size:
            entry = self._instead_of(grain, entry)
        place = sector_bytes(entry)
        if place + self._grain_bytes > self._file_size:
            self._note_short(grain, np.array([DATA], np.uint8), np.array([place], np.int64))
        return Place(DATA, place + inside, left)

    def resolve(self, start: int, end: int) -> RunTable:
        """Return the runs of [start, end)."""
        unit = self._grain_bytes
        first, last = start // unit, -(-end // unit)
        entries = self.tables.entries(first, last)
        if not entries.any():
            return RunTable.single(start, end, HOLE)
        kinds, file_offsets = self._decoded(first, entries)
        self._note_short(first, kinds, file_offsets)
        return from_entries(kinds, file_offsets, unit, first * unit, last * unit).clipped(start, end)

    def _decoded(self, first: int, entries: Entries) -> tuple[Kinds, Int64s]:
        kinds = np.where(entries == GTE_UNALLOCATED, HOLE, DATA).astype(np.uint8)
        if self._has_zeroed:
            kinds[entries == GTE_ZEROED] = ZERO
        file_offsets = entries.astype(np.int64) * SECTOR_SIZE
        for index in np.flatnonzero((kinds == DATA) & (file_offsets >= self._file_size)).tolist():
            file_offsets[index] = sector_bytes(self._instead_of(first + index, int(entries[index])))
        return kinds, file_offsets

    def _note_short(self, first: int, kinds: Kinds, file_offsets: Int64s) -> None:
        """Note the stored grains, from `first` on, whose end is past the end of the file."""
        past = file_offsets + self._grain_bytes - self._file_size
        for index in np.flatnonzero((past > 0) & (kinds == DATA)).tolist():
            place = int(file_offsets[index])
            # Of the last grain the disk may need a part only, and some writers store no more.
            unused = max(0, (first + index + 1) * self._grain_bytes - self._capacity)
            missing = int(past[index]) - unused
            if missing > 0:
                line = shortfall.of_grain(self._path, self._file_size, place, first + index, missing)
                self.notes.add("grain past the end", line, case=place)

    def read_grain(self, file_offset: int) -> bytes:
        """Never called: this kind has no compressed grains."""
        raise NotImplementedError(f"{self._path}: no compressed grain at {file_offset:#x}")

    def write(self, offset: int, data: Buffer, below: Below) -> None:
        """Write `data` at `offset`: stored grains in place, new grains whole past the end of the file."""
        if not self._writable:
            raise Unsupported(self._path, f"the extent is read-only: guest data at its byte {offset} cannot change")
        view = memoryview(data)
        done = 0
        while done < len(view):
            place = self.lookup(offset + done)
            if place.kind == DATA:
                length = min(place.length, len(view) - done)
                self._file.write_at(place.file_offset, view[done : done + length])
                self._unsynced = True
            else:
                length = self._write_new(offset + done, view[done : done + _WRITE_BATCH], below)
            done += length

    def wrote(self) -> None:
        """Note that stored grains were written by way of the file itself: the next flush makes them durable too."""
        self._unsynced = True

    def tell_entries(self, on_entry: Callable[[int, int], None] | None) -> None:
        """Let `on_entry` hear each (grain, sector) that a table names from now on, long before that is durable."""
        self._on_entry = on_entry

    def forget_entry(self, grain: int) -> None:
        """Let the parent answer again for a grain that was named since the last flush, and whose data did not come."""
        self.tables.set_entry(grain, GTE_UNALLOCATED)

    def adopt_entry(self, grain: int, sector: int) -> None:
        """Name a grain that another process stored and did not live to name; durable after `flush`."""
        self._make_table(grain // self.tables.entries_per_table)
        self.tables.set_entry(grain, sector)
        self._unsynced = True

    def flush(self) -> None:
        """Return when everything is durable: grains first, then every copy of the tables that name them."""
        if self._unsynced:
            self._note_end()
            self._file.flush()  # barrier: grain data is durable before a table entry points at it
            self._unsynced = False
        if not self.tables.dirty:
            return
        for table, raw in self.tables.dirty.items():
            for copy, _ in reversed(self._copies):
                if copy.table_sector(table):
                    self._file.write_at(sector_bytes(copy.table_sector(table)), raw)
        self._file.flush()
        self.tables.stored()

    def reserve(self, offset: int, length: int) -> int:
        """Allocate one place in the file for the grains of a range, none of them stored yet; return its byte offset.

        Both ends are on grains, or at the end of the disk. The caller fills the whole place before the next flush,
        and before it asks for another.
        """
        if len(self.tables.dirty) >= MAX_DIRTY_TABLES:
            self.flush()
        unit = self._grain_bytes
        first, count = offset // unit, -(-length // unit)
        position = self._place_at_end(count * unit, first)
        self._file_size = position + count * unit
        self._name_grains(first, count, byte_sectors(position))
        return position

    def append(self, first: int, data: Buffer) -> int:
        """Store whole grains from `first` on, none of them stored yet; return the byte offset of the first in the file.

        The data is in the file before anybody hears of the entries.
        """
        if len(self.tables.dirty) >= MAX_DIRTY_TABLES:
            self.flush()
        length = len(data)
        position = self._place_at_end(length, first)
        self._file.write_at(position, data)
        self._file_size = position + length
        self._name_grains(first, length // self._grain_bytes, byte_sectors(position))
        return position

    def append_hole(self, grain: int) -> int:
        """Store one grain of zeros, as a hole of the file; return its byte offset."""
        if len(self.tables.dirty) >= MAX_DIRTY_TABLES:
            self.flush()
        position = self._place_at_end(self._grain_bytes, grain)
        self._file.truncate(position + self._grain_bytes)
        self._file_size = position + self._grain_bytes
        self._name_grains(grain, 1, byte_sectors(position))
        return position

    def zero(self, offset: int, length: int) -> bool:
        """Mark whole grains, none of them stored, as zeros over any parent; False where there is no such mark."""
        if not self._has_zeroed:
            return False
        for grain in range(offset // self._grain_bytes, -(-(offset + length) // self._grain_bytes)):
            self._make_table(grain // self.tables.entries_per_table)
            self.tables.set_entry(grain, GTE_ZEROED)
            if self._on_entry is not None:
                self._on_entry(grain, GTE_ZEROED)
            if len(self.tables.dirty) >= MAX_DIRTY_TABLES:
                self.flush()
        return True

    def _write_new(self, offset: int, data: memoryview, below: Below) -> int:
        """Store a stretch of grains that are not stored yet, in one write; return how many bytes of `data` it took."""
        unit = self._grain_bytes
        first = offset // unit
        taken, parts = 0, []
        grain = first
        while taken < len(data):
            entry = self.tables.entry(grain)
            zeroed = entry == GTE_ZEROED and self._has_zeroed
            if entry != GTE_UNALLOCATED and not zeroed:
                break
            inside = (offset + taken) - grain * unit
            piece = data[taken : taken + unit - inside]
            parts.append(self._whole_grain(grain, inside, piece, None if zeroed else below))
            taken += len(piece)
            grain += 1
        sector = self._append(b"".join(parts), first)
        self._name_grains(first, len(parts), sector)
        if len(self.tables.dirty) >= MAX_DIRTY_TABLES:
            self.flush()
        return taken

    def _name_grains(self, first: int, count: int, sector: int) -> None:
        step = self._grain_bytes // SECTOR_SIZE
        for i in range(count):
            self._make_table((first + i) // self.tables.entries_per_table)
            self.tables.set_entry(first + i, sector + i * step)
            if self._on_entry is not None:
                self._on_entry(first + i, sector + i * step)

    def _whole_grain(self, grain: int, inside: int, piece: memoryview, below: Below | None) -> bytes:
        unit = self._grain_bytes
        if len(piece) == unit:
            return bytes(piece)
        start = grain * unit
        real = min(unit, self._capacity - start)  # the last grain may reach past the end of the disk
        whole = bytearray(unit)
        if below is not None and (inside > 0 or inside + len(piece) < real):
            whole[:real] = below(start, real)
        whole[inside : inside + len(piece)] = piece
        return bytes(whole)

    def _append(self, data: bytes, grain: int) -> int:
        """Write whole grains past the end of the file and return the sector of the first."""
        position = self._place_at_end(len(data), grain)
        self._file.write_at(position, data)
        self._file_size = position + len(data)
        return byte_sectors(position)

    def _place_at_end(self, length: int, grain: int) -> int:
        position = round_up(max(self._file_size, self._file.size()), self._grain_bytes)
        if position + length > sector_bytes(MAX_FILE_SECTORS):
            feature = f"grain {grain} does not fit: an extent file holds at most {MAX_FILE_SECTORS} sectors (2 TiB)"
            raise Unsupported(self._path, feature)
        self._unsynced = True
        return position

    def _make_table(self, table: int) -> None:
        """Create the table for a directory entry of 0; the format requires all, but some writers leave them out."""
        for tables, directory_offset in reversed(self._copies):
            if tables.table_sector(table):
                continue
            sector = self._append(bytes(round_up(tables.table_bytes, self._grain_bytes)), table)
            self._note_end()
            self._file.flush()  # barrier: the table is durable in its zeros before the directory names it
            self._file.write_at(directory_offset + table * 4, sector.to_bytes(4, "little"))
            tables.place_table(table, sector)

    def _note_end(self) -> None:
        """Write, before the next barrier, how far the file is in use, if the kind's header has that field."""

    def _instead_of(self, grain: int, entry: int) -> int:
        """Return the sector to read where `entry` is outside the file; raise FormatError if there is no copy."""
        table, index = divmod(grain, self.tables.entries_per_table)
        at = sector_bytes(self.tables.table_sector(table)) + index * 4
        rule = f"must place grain {grain} inside the file of {self._file_size} bytes"
        raise FormatError(self._path, at, "grain table entry", entry, rule)
