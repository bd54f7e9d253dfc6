"""The hosted sparse extent (`KDMV`): grains behind a directory and tables, each of the two kept twice.

    | header | descriptor | RGD | redundant GTs | GD | GTs | pad | grain | grain | ...
    sector 0   1..20        21                               overhead

Where the primary directory or an entry cannot be followed and the redundant copy can, an extent that is only read is
read by way of the copy, and `notes` tells of it. An extent that is written must be sound.

Source: VMware Virtual Disk Format 5.0, "Hosted Sparse Extents".
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.extent import Extent, ExtentSpec
from qemu_vmdk_snap.vmdk.grains import GTE_UNALLOCATED, GTE_ZEROED, MAX_FILE_SECTORS, Copy, GrainExtent
from qemu_vmdk_snap.vmdk.header import HeaderFlag, SparseExtentHeader, check_header
from qemu_vmdk_snap.vmdk.tables import GrainTables

__all__ = ["GTE_UNALLOCATED", "GTE_ZEROED", "MAX_FILE_SECTORS", "SparseExtent", "open_extent", "read_header"]


_MAX_NOTES: Final = 64


def read_header(file: BlockFile, path: Path, *, tolerant: bool = False) -> SparseExtentHeader:
    """Return the checked header of the sparse extent in `file`; `tolerant` as in `check_header`."""
    header = SparseExtentHeader.parse(file.read_at(0, SECTOR_SIZE), path=path)
    check_header(header, path, file.size(), tolerant=tolerant)
    return header


def open_extent(spec: ExtentSpec) -> Extent:
    """Open a hosted sparse extent: plain, or compressed (streamOptimized).

    Raises:
        FormatError: the header, or what it names, cannot be.
        Unsupported: write access to version 3, or to a compressed extent.
    """
    file = spec.file
    if file is None:
        raise FormatError(spec.path, spec.line.at, "extent", spec.line.type, "must name a file")
    if (
        file.read_at(0, 4) == b"COWD"
    ):  # QEMU takes a COWD file under the type SPARSE, and VMware's old products wrote so
        from qemu_vmdk_snap.vmdk import cowd

        return cowd.open_extent(spec)
    header = read_header(file, spec.path, tolerant=not spec.writable)
    if header.compressed:
        from qemu_vmdk_snap.vmdk import stream

        return stream.open_stream(spec, file, header)
    if spec.writable and header.version > 2:
        raise Unsupported(
            spec.path, f"version {header.version} extents are read-only: who else tracks their changes is unknown"
        )
    if header.capacity < spec.line.sectors:
        rule = f"must be at least the {spec.line.sectors} sectors that the descriptor gives the extent"
        raise FormatError(spec.path, header.offset_of("capacity"), "capacity", header.capacity, rule)
    return SparseExtent(file, spec.path, header, sector_bytes(spec.line.sectors), writable=spec.writable)


class SparseExtent(GrainExtent):
    """One open hosted sparse extent."""

    def __init__(
        self, file: BlockFile, path: Path, header: SparseExtentHeader, capacity: int, *, writable: bool
    ) -> None:
        self.header = header
        self._file, self._path, self._file_size = file, path, file.size()
        super().__init__(
            file,
            path,
            self._read_copies(),
            capacity=capacity,
            grain_bytes=sector_bytes(header.grain_size),
            has_zeroed=bool(header.flags & HeaderFlag.ZEROED_GRAINS),
            writable=writable,
        )
        self._prefer_good_tables()

    def cut(self, end: int) -> None:
        """Give back, durably, what is behind byte `end` of the file; the caller knows that nothing in use is there."""
        self._file.truncate(end)
        self._file.flush()
        self._file_size = end

    def clear(self) -> None:
        """Forget every grain, durably, and give their space back: the parent answers everywhere."""
        self.flush()
        zeros = bytes(self.tables.table_bytes)
        ends = [self.header.overhead]
        for tables, _ in reversed(self._copies):
            for table in np.flatnonzero(tables.directory).tolist():
                sector = tables.table_sector(table)
                ends.append(sector + self.header.gt_sectors)
                if self._file.next_data(sector_bytes(sector)) < sector_bytes(sector) + len(zeros):
                    self._file.write_at(sector_bytes(sector), zeros)
        self._file.flush()  # barrier: no table names a grain any more when the space goes
        self.cut(min(self._file_size, sector_bytes(max(ends))))
        self._copies = self._read_copies()

    def _read_copies(self) -> list[Copy]:
        header = self.header
        offsets = [("gd_offset", header.gd_offset)]
        if header.redundant:
            offsets.append(("rgd_offset", header.rgd_offset))
        copies: list[Copy] = []
        broken: FormatError | None = None
        for field, sector in offsets:
            length = header.gd_entries * 4
            inside = sector and sector_bytes(sector) + length <= self._file_size
            raw = self._file.read_at(sector_bytes(sector), length) if inside else b""
            if len(raw) != length:
                rule = f"must leave {length} bytes inside the file of {self._file_size} bytes"
                broken = FormatError(self._path, header.offset_of(field), field, sector, rule)
                continue
            tables = GrainTables(self._file, self._path, raw, entries_per_table=header.gtes_per_gt)
            copies.append(Copy(tables, sector_bytes(sector)))
        if broken is not None and not copies:
            raise broken
        self._broken_directory = broken
        return copies

    def _prefer_good_tables(self) -> None:
        """Read by way of the redundant copy what the primary directory cannot lead to."""
        if self._broken_directory is not None:
            self.notes.append(f"{self._broken_directory}; the other copy of the directory is used")
        if len(self._copies) < 2:
            return
        (primary, at), (redundant, _) = self._copies
        usable = self._inside(redundant.directory) & (redundant.directory != 0)
        wrong = np.flatnonzero((~self._inside(primary.directory) | (primary.directory == 0)) & usable)
        for table in wrong.tolist():
            sector = primary.table_sector(table)
            if not sector and not redundant.entries(table * self.header.gtes_per_gt, self._last_of(table)).any():
                continue
            rule = "names no grain table" if not sector else f"lies outside the file of {self._file_size} bytes"
            where = at + 4 * table
            if self._writable:  # a new table would be stored over the good copy
                rule += (
                    ", while the redundant directory leads to one: repair the image (check -r all) before it is written"
                )
                raise FormatError(self._path, where, f"grain directory entry {table}", sector, rule)
            self.notes.append(
                f"{self._path}: byte {where:#x}: grain directory entry {table} = {sector}: {rule}; "
                "the redundant table is used"
            )
            primary.place_table(table, redundant.table_sector(table))

    def _last_of(self, table: int) -> int:
        return (table + 1) * self.header.gtes_per_gt

    def _inside(self, directory: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        inside: npt.NDArray[np.bool_] = (directory + self.header.gt_sectors) * SECTOR_SIZE <= self._file_size
        return inside

    def _instead_of(self, grain: int, entry: int) -> int:
        if not self._writable and len(self._copies) > 1:
            other = self._copies[1].tables.entry(grain)
            if other > GTE_ZEROED and sector_bytes(other) < self._file_size:
                note = f"{self._path}: grain table entry {entry} of grain {grain}: lies outside the file"
                if len(self.notes) < _MAX_NOTES:
                    self.notes.append(f"{note}; the redundant entry {other} is used")
                return other
        return super()._instead_of(grain, entry)
