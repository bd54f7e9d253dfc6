"""The hosted sparse extent (`KDMV`): grains, with a directory and tables that are both kept twice.

    | header | descriptor | RGD | redundant GTs | GD | GTs | pad | grain | grain | ...
    sector 0   1..20        21                               overhead

Where the primary directory or an entry is invalid and the redundant copy is valid, an extent that is only read is
read through the copy, with a note. An extent that is written must be valid.

Source: VMware Virtual Disk Format 5.0, "Hosted Sparse Extents".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.light import TYPE_CHECKING, Final
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.extent import ExtentSpec
from qemu_vmdk_snap.vmdk.grain.extent import GTE_UNALLOCATED, GTE_ZEROED, MAX_FILE_SECTORS, Copy, GrainExtent
from qemu_vmdk_snap.vmdk.grain.tables import Entries, GrainTables, clear_tables, read_directory
from qemu_vmdk_snap.vmdk.sparse.header import HeaderFlag, SparseExtentHeader, check_header, refuse_moved
from qemu_vmdk_snap.vmdk.sparse.small import Piece, small_tables

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["GTE_UNALLOCATED", "GTE_ZEROED", "MAX_FILE_SECTORS", "SparseExtent", "open_sparse", "read_header"]


_ENTRIES_AT_ONCE: Final = 1 << 18


def read_header(file: BlockFile, path: Path, *, tolerant: bool = False) -> SparseExtentHeader:
    """Return the checked header of the sparse extent in `file`; `tolerant` as in `check_header`."""
    header = SparseExtentHeader.parse(file.read_at(0, SECTOR_SIZE), path=path)
    check_header(header, path, file.size(), tolerant=tolerant)
    return header


def open_sparse(spec: ExtentSpec, file: BlockFile, header: SparseExtentHeader) -> SparseExtent:
    """Open the plain hosted sparse extent in `file`.

    Raises:
        FormatError: the header, or what it names, is invalid.
        Unsupported: write access to version 3.
    """
    if spec.writable and header.version > 2:
        raise Unsupported(
            spec.path, f"version {header.version} extents are read-only: something unknown may track their changes"
        )
    if header.capacity < spec.line.sectors:
        rule = f"must be at least the {spec.line.sectors} sectors that the descriptor gives the extent"
        raise FormatError(spec.path, header.offset_of("capacity"), "capacity", header.capacity, rule)
    refuse_moved(header, file)
    return SparseExtent(file, spec.path, header, sector_bytes(spec.line.sectors), writable=spec.writable)


class SparseExtent(GrainExtent):
    """One open hosted sparse extent."""

    _known_copies: list[Copy]

    def __init__(
        self, file: BlockFile, path: Path, header: SparseExtentHeader, capacity: int, *, writable: bool
    ) -> None:
        self.header = header
        self._file, self._path, self._file_size, self._writable = file, path, file.size(), writable
        self._small = None if writable else small_tables(file, header)
        super().__init__(
            file,
            path,
            [] if self._small is not None else self._read_copies(),
            capacity=capacity,
            grain_bytes=sector_bytes(header.grain_size),
            has_zeroed=bool(header.flags & HeaderFlag.ZEROED_GRAINS),
            writable=writable,
        )
        if self._small is None:
            self._prefer_good_tables()

    @property
    def _copies(self) -> list[Copy]:
        """Both copies of the tables; of a small extent they are read when something asks for arrays."""
        if not self._known_copies:
            self._known_copies = self._read_copies()
        return self._known_copies

    @_copies.setter
    def _copies(self, copies: list[Copy]) -> None:
        self._known_copies = copies

    def small_entries(self) -> int | None:
        """Return how many entries `pieces` goes through; None where the extent is large, written, or needs a word."""
        return None if self._small is None else self._small.entries

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Yield what is where in [start, end) of a small extent."""
        assert self._small is not None
        return self._small.pieces(start, end)

    def cut(self, end: int) -> None:
        """Free, durably, what is past byte `end` of the file; the caller knows that nothing in use is there."""
        self._file.truncate(end)
        self._file.flush()
        self._file_size = end

    def clear(self) -> None:
        """Remove every grain, durably, and free its space: the parent is read everywhere."""
        self.flush()
        ends = [self.header.overhead]
        for tables, _ in reversed(self._copies):
            clear_tables(self._file, tables)
            ends.append(int(tables.directory.max(initial=0)) + self.header.gt_sectors)
        self._file.flush()  # barrier: no table names a grain any more when the space goes
        self.cut(min(self._file_size, sector_bytes(max(ends))))
        self._copies = self._read_copies()

    def settle_copies(self) -> int:
        """Copy entries that only one copy of the tables has to the other, durably; return how many there were.

        Raises:
            FormatError: the copies differ in a way that only a repair can decide. Nothing was written.
            Unsupported: the extent is not open for writing.
        """
        if not self._writable:
            raise Unsupported(self._path, "the extent is read-only: its tables cannot change")
        from qemu_vmdk_snap.vmdk.sparse.copies import settle_copies

        self.flush()
        settled = settle_copies(self._file, self.header)
        if settled:
            self._copies = self._read_copies()
        return settled

    def _read_copies(self) -> list[Copy]:
        """Return both copies of the tables for writing; reading needs one, and rarely the other."""
        header = self.header
        offsets = [("gd_offset", header.gd_offset)]
        if header.redundant:
            offsets.append(("rgd_offset", header.rgd_offset))
        copies: list[Copy] = []
        broken: FormatError | None = None
        self._redundant_at = 0
        for field, sector in offsets:
            length, at = header.gd_entries * 4, sector_bytes(sector)
            if not sector or at + length > self._file_size:
                rule = f"must leave {length} bytes inside the file of {self._file_size} bytes"
                broken = FormatError(self._path, header.offset_of(field), field, sector, rule)
                continue
            if copies:
                self._redundant_at = at
            if not copies or self._writable:
                directory = read_directory(self._file, at, header.gd_entries)
                tables = GrainTables(self._file, self._path, directory, entries_per_table=header.gtes_per_gt)
                copies.append(Copy(tables, at))
        if broken is not None and not copies:
            raise broken
        self._broken_directory = broken
        return copies

    def _prefer_good_tables(self) -> None:
        """Use the tables of the redundant copy where the primary directory names none."""
        if self._broken_directory is not None:
            self.notes.add("directory", f"{self._broken_directory}; the other copy of the directory is used")
        if not self._redundant_at:
            return
        primary, at = self._copies[0]
        for first in range(0, primary.count, _ENTRIES_AT_ONCE):
            last = min(primary.count, first + _ENTRIES_AT_ONCE)
            redundant = read_directory(self._file, self._redundant_at + 4 * first, last - first)
            mine = primary.directory[first:last]
            wrong = np.flatnonzero((~self._inside(mine) | (mine == 0)) & self._inside(redundant) & (redundant != 0))
            nowhere = mine[wrong] == 0
            wrong = wrong[~nowhere | self._hold_entries(redundant[wrong], nowhere)]
            for index in wrong[:1].tolist():
                self._note_wrong(first + index, int(mine[index]), at, len(wrong))
            primary.place_tables(first + wrong, redundant[wrong])

    def _note_wrong(self, table: int, sector: int, directory_at: int, count: int) -> None:
        """Note that `count` entries of the directory, of which this one is the first, lead to no table."""
        rule = "names no grain table" if not sector else f"lies outside the file of {self._file_size} bytes"
        where = directory_at + 4 * table
        if self._writable:  # a new table would be stored over the good copy
            rule += ", while the redundant directory leads to one: repair the image (check -r all) before it is written"
            raise FormatError(self._path, where, f"grain directory entry {table}", sector, rule)
        line = f"{self._path}: byte {where:#x}: grain directory entry {table} = {sector}: {rule}"
        self.notes.add("directory entry", f"{line}; the redundant table is used", count=count)

    def _hold_entries(self, sectors: Entries, wanted: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return which of the wanted tables at `sectors` name any grain."""
        found = np.zeros(len(sectors), bool)
        places, which = np.unique(sectors[wanted], return_inverse=True)  # hostile directories name one table often
        found[wanted] = np.array([self._is_used(int(sector)) for sector in places], bool)[which]
        return found

    def _is_used(self, sector: int) -> bool:
        return bool(self._file.read_at(sector_bytes(sector), self.header.gtes_per_gt * 4).strip(b"\0"))

    def _inside(self, directory: Entries) -> npt.NDArray[np.bool_]:
        inside: npt.NDArray[np.bool_] = directory <= self._file_size // SECTOR_SIZE - self.header.gt_sectors
        return inside

    def _instead_of(self, grain: int, entry: int) -> int:
        other = self._redundant_entry(grain)
        if other > GTE_ZEROED and sector_bytes(other) < self._file_size:
            line = f"{self._path}: grain table entry {entry} of grain {grain}: lies outside the file"
            self.notes.add("table entry", f"{line}; the redundant entry {other} is used", case=grain)
            return other
        return super()._instead_of(grain, entry)

    def _redundant_entry(self, grain: int) -> int:
        """Return the entry in the other copy, 0 where there is none or where the extent is open for writing."""
        if self._writable or not self._redundant_at:
            return 0
        table, index = divmod(grain, self.header.gtes_per_gt)
        sector = int.from_bytes(self._file.read_at(self._redundant_at + 4 * table, 4), "little")
        if not sector or not self._inside(np.array([sector]))[0]:
            return 0
        return int.from_bytes(self._file.read_at(sector_bytes(sector) + 4 * index, 4), "little")
