"""What the tables of a stream say about its records, for a reader that cannot seek.

Tables in front are read before the first grain, and only what they name is kept: twelve bytes a stored grain. Tables
that come after the grains are compared with the records that came, which are kept in as many bytes each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.pipes import PipeReader
from qemu_vmdk_snap.units import SECTOR_SIZE, byte_sectors, sector_bytes
from qemu_vmdk_snap.vmdk.grain.extent import GTE_ZEROED
from qemu_vmdk_snap.vmdk.grain.tables import Entries
from qemu_vmdk_snap.vmdk.sparse.header import GD_AT_END, HeaderFlag, SparseExtentHeader

_BATCH: Final = 1 << 16
_COPIES: Final = 2  # some writers keep the tables twice


class FrontTables:
    """The directory and tables that lie between the descriptor and the first grain."""

    def __init__(self, pipe: PipeReader, header: SparseExtentHeader, grains: int) -> None:
        """Read them; the disk has so many `grains`.

        Raises:
            FormatError: they are not all in front, or not in an order in which a pipe can be read.
        """
        self._pipe, self._header = pipe, header
        self._sectors, self._grains = array("I"), array("Q")
        at = self._go_to(header.gd_offset, "gd_offset", header.offset_of("gd_offset"))
        directory = np.frombuffer(self._read(header.gd_entries * 4), "<u4")
        used = np.flatnonzero(directory)
        order = used[np.argsort(directory[used], kind="stable")]
        for table in order.tolist():
            self._go_to(int(directory[table]), f"grain directory entry {table}", at + 4 * table)
            self._keep(table, np.frombuffer(self._read(header.gtes_per_gt * 4), "<u4"), grains)

    def grains(self) -> Iterator[tuple[int, int]]:
        """Yield (grain, sector of its record) in the order in which the records come.

        Raises:
            FormatError: that is not the order of the disk.
        """
        sectors, grains = np.array(self._sectors, np.int64), np.array(self._grains, np.int64)
        self._sectors, self._grains = array("I"), array("Q")
        order = np.argsort(sectors, kind="stable")
        sectors, grains = sectors[order], grains[order]
        wrong = np.flatnonzero(np.diff(grains) <= 0)
        if len(wrong):
            place, grain = int(sectors[wrong[0] + 1]), int(grains[wrong[0] + 1])
            rule = "must ascend with the places of the records: in a pipe nothing else can be read"
            raise FormatError(self._pipe.path, sector_bytes(place), "grain", grain, rule)
        for first in range(0, len(grains), _BATCH):
            last = first + _BATCH
            yield from zip(grains[first:last].tolist(), sectors[first:last].tolist(), strict=True)

    def _keep(self, table: int, entries: Entries, grains: int) -> None:
        stored = np.flatnonzero(entries)
        if self._header.flags & HeaderFlag.ZEROED_GRAINS:
            stored = stored[entries[stored] != GTE_ZEROED]
        numbers = stored + table * self._header.gtes_per_gt
        inside = numbers < grains
        self._sectors.frombytes(entries[stored[inside]].astype(np.uint32).tobytes())
        self._grains.frombytes(numbers[inside].astype(np.uint64).tobytes())

    def _go_to(self, sector: int, field: str, at: int) -> int:
        """Skip to `sector`, which `field`, at byte `at`, names; return its byte."""
        position, overhead = sector_bytes(sector), sector_bytes(self._header.overhead)
        if not self._pipe.position <= position < overhead:
            rule = f"must be from byte {self._pipe.position:#x} to the grains at {overhead:#x}, for a pipe to be read"
            raise FormatError(self._pipe.path, at, field, sector, rule)
        self._pipe.skip(position - self._pipe.position)
        return position

    def _read(self, length: int) -> bytes:
        at = self._pipe.position
        data = self._pipe.read(length)
        if len(data) < length:
            rule = f"must have {length} bytes: the stream ends early"
            raise FormatError(self._pipe.path, at, "grain tables", len(data), rule)
        return data


class TablesBehind:
    """The tables that come after the grains they name, and the records that came."""

    def __init__(self, path: Path, header: SparseExtentHeader, sectors: int) -> None:
        """Begin for a stream with this header, whose disk has so many `sectors`."""
        self._path = path
        self._header = header
        self._max_tables = _COPIES * -(-sectors // header.gt_coverage)
        self._sectors, self._grains = array("I"), array("Q")
        self._tables: dict[int, bytes] = {}
        self._directory: tuple[int, bytes] | None = None
        self._footer_seen = False

    @property
    def complete(self) -> bool:
        """Whether everything that the header names has been read: the footer, or the directory."""
        if self._footer_seen or self._header.gd_offset == GD_AT_END:
            return self._footer_seen
        return self._directory is not None and self._directory[0] == sector_bytes(self._header.gd_offset)

    def note_record(self, grain: int, start: int) -> None:
        """Keep that a record of `grain` is at byte `start`; they come in ascending order."""
        if start // SECTOR_SIZE >= 1 << 32:
            rule = "must be below sector 2^32: no table can name it"
            raise FormatError(self._path, start, f"record of grain {grain}", start // SECTOR_SIZE, rule)
        self._sectors.append(start // SECTOR_SIZE)
        self._grains.append(grain)

    def take_table(self, at: int, raw: bytes) -> None:
        """Keep the grain table at byte `at`.

        Raises:
            FormatError: there are more than the disk can have.
        """
        if len(self._tables) >= self._max_tables:
            rule = f"must be one of at most {self._max_tables}, for this capacity"
            raise FormatError(self._path, at, "grain table", len(self._tables) + 1, rule)
        self._tables[at // SECTOR_SIZE] = raw

    def take_directory(self, at: int, raw: bytes) -> None:
        """Keep the grain directory at byte `at`."""
        self._directory = at, raw

    def take_footer(self, footer: SparseExtentHeader, at: int) -> None:
        """Take the footer at byte `at` as the header.

        Raises:
            FormatError: it names another directory than the one that came.
        """
        if self._directory is None or self._directory[0] != sector_bytes(footer.gd_offset):
            rule = "must be the place of the grain directory that came before: what lies between was lost or added"
            where = at + footer.offset_of("gd_offset")
            raise FormatError(self._path, where, "gd_offset", footer.gd_offset, rule)
        if byte_sectors(footer.gd_entries * 4) * SECTOR_SIZE > len(self._directory[1]):
            rule = f"must need no more than the {len(self._directory[1])} bytes of the grain directory that came before"
            raise FormatError(self._path, at + footer.offset_of("capacity"), "capacity", footer.capacity, rule)
        self._header, self._footer_seen = footer, True

    def compare(self) -> None:
        """Compare the tables with the records that came.

        Raises:
            FormatError: an entry names something else than the record of its grain, or none where one came.
        """
        at, raw = self._directory or (0, b"")
        directory = np.frombuffer(raw, "<u4")[: self._header.gd_entries]
        sectors, grains = np.array(self._sectors, np.int64), np.array(self._grains, np.int64)
        per_table = self._header.gtes_per_gt
        for number in np.union1d(np.flatnonzero(directory), np.unique(grains // per_table)).astype(int).tolist():
            first, last = np.searchsorted(grains, (number * per_table, (number + 1) * per_table)).tolist()
            place = int(directory[number]) if number < len(directory) else 0
            wanted = np.zeros(per_table, np.int64)
            wanted[grains[first:last] - number * per_table] = sectors[first:last]
            table = self._tables.get(place)
            if table is None:
                rule = "must name a grain table that came with the stream"
                raise FormatError(self._path, at + 4 * number, f"grain directory entry {number}", place, rule)
            self._compare_table(number, place, np.frombuffer(table, "<u4")[:per_table].astype(np.int64), wanted)

    def _compare_table(self, number: int, place: int, entries: Entries, wanted: Entries) -> None:
        if self._header.flags & HeaderFlag.ZEROED_GRAINS:
            entries = np.where(entries == GTE_ZEROED, 0, entries)
        wrong = np.flatnonzero(entries != wanted)
        if len(wrong):
            index = int(wrong[0])
            grain = number * self._header.gtes_per_gt + index
            came = f"sector {wanted[index]}, where its record came" if wanted[index] else "0: no record came"
            rule = f"must be {came} (grain {grain}): records were lost, added or moved"
            raise FormatError(
                self._path, sector_bytes(place) + 4 * index, "grain table entry", int(entries[index]), rule
            )
