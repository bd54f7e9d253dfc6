"""The COWD extent: vmfsSparse deltas of ESXi, and the disks of VMware's products before 2004 (version 3 of the format).

    | header (4 sectors) | grain directory | grain tables of 4096 entries, grains ...
    sector 0               4

One copy of the tables; they are made on demand, so a directory entry of 0 is normal. The header counts the sectors in
use (`free_sector`): the next writer continues there, so it is raised before a table names a grain past it.

Source: the COWDisk header of VMware's technote 1.0 and libvmdk's "COWD sparse extent"; QEMU 7.2 block/vmdk.c.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, byte_sectors, sector_bytes
from qemu_vmdk_snap.vmdk.cowd.header import GTES_PER_GT, CowdHeader, read_cowd_header
from qemu_vmdk_snap.vmdk.extent import ExtentSpec, Place
from qemu_vmdk_snap.vmdk.grain.extent import Copy, GrainExtent
from qemu_vmdk_snap.vmdk.grain.tables import GrainTables, clear_tables
from qemu_vmdk_snap.vmdk.runs import DATA

_RUN_GRAINS: Final = 128


def open_extent(spec: ExtentSpec) -> CowdExtent:
    """Open a COWD extent; raises FormatError."""
    if spec.file is None:
        raise FormatError(spec.path, spec.line.at, "extent", spec.line.type, "must name a file")
    header = read_cowd_header(spec.file, spec.path)
    if header.capacity < spec.line.sectors:
        rule = f"must be at least the {spec.line.sectors} sectors that the descriptor gives the extent"
        raise FormatError(spec.path, header.offset_of("capacity"), "capacity", header.capacity, rule)
    return CowdExtent(spec.file, spec.path, header, sector_bytes(spec.line.sectors), writable=spec.writable)


class CowdExtent(GrainExtent):
    """One open COWD extent."""

    def __init__(self, file: BlockFile, path: Path, header: CowdHeader, capacity: int, *, writable: bool) -> None:
        self.header = header
        at = sector_bytes(header.gd_offset)
        tables = GrainTables(file, path, file.read_at(at, header.tables * 4), entries_per_table=GTES_PER_GT)
        grain_bytes = sector_bytes(header.grain_size)
        super().__init__(file, path, [Copy(tables, at)], capacity=capacity, grain_bytes=grain_bytes, writable=writable)
        self._free_sector = header.free_sector

    def lookup(self, offset: int) -> Place:
        """Return where the byte at `offset` is; the place may span many of the small grains."""
        place = super().lookup(offset)
        grain, inside = divmod(offset, self._grain_bytes)
        if place.kind == DATA:
            in_file = -(-(self._file_size - place.file_offset + inside) // self._grain_bytes)
            limit = min(_RUN_GRAINS, max(1, in_file))
        else:
            limit = _RUN_GRAINS
        count = self.tables.run_length(grain, self.header.grain_size, limit)
        return place._replace(length=min(count * self._grain_bytes - inside, self._capacity - offset))

    def _note_end(self) -> None:
        # A count that is too high wastes space, one too low loses data to the next writer.
        end = byte_sectors(self._file_size)
        if end > self._free_sector:
            self._file.write_at(self.header.offset_of("free_sector"), end.to_bytes(4, "little"))
            self._free_sector = end

    def clear(self) -> None:
        """Remove every grain, durably, and free its space: the parent is read everywhere.

        If every table exists, they are kept, empty: QEMU 7.2 cannot write through a directory entry of 0.
        """
        self.flush()
        at, length = sector_bytes(self.header.gd_offset), self.header.tables * 4
        directory = self.tables.directory
        end: int = byte_sectors(at + length)
        if directory.all():
            clear_tables(self._file, self.tables)
            end = int(directory.max()) + self.header.gt_sectors
        else:
            self._file.write_at(at, bytes(length))
        self._file.flush()  # barrier: nothing names a grain any more when the space goes
        self._file.write_at(self.header.offset_of("free_sector"), end.to_bytes(4, "little"))
        self._file.truncate(sector_bytes(end))
        self._file.flush()
        self._free_sector, self._file_size = end, sector_bytes(end)
        raw = self._file.read_at(at, length)
        self._copies = [Copy(GrainTables(self._file, self._path, raw, entries_per_table=GTES_PER_GT), at)]

    def _place_at_end(self, length: int, grain: int) -> int:
        self._file_size = max(self._file_size, self._free_sector * SECTOR_SIZE)
        return super()._place_at_end(length, grain)
