"""The COWD extent: vmfsSparse deltas of ESXi, and the disks of VMware's products before 2004 (version 3 of the format).

    | header (4 sectors) | grain directory | grain tables of 4096 entries, grains ...
    sector 0               4

One copy of the tables; they are made on demand, so a directory entry of 0 is normal. The header counts the sectors in
use (`free_sector`): the next writer goes on there, so it is raised before a table names what lies behind it.

Source: the COWDisk header of VMware's technote 1.0 and libvmdk's "COWD sparse extent"; QEMU 7.2 block/vmdk.c.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, byte_sectors, sector_bytes
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor, make_descriptor
from qemu_vmdk_snap.vmdk.extent import ExtentSpec
from qemu_vmdk_snap.vmdk.grains import Copy, GrainExtent
from qemu_vmdk_snap.vmdk.header import MAX_GRAIN_SECTORS
from qemu_vmdk_snap.vmdk.ondisk import U32, Must, OnDisk, Wire
from qemu_vmdk_snap.vmdk.tables import GrainTables

COWD_MAGIC: Final = b"COWD"
HEADER_BYTES: Final = 2048
GTES_PER_GT: Final = 4096
FLAGS: Final = 3
FLAG_ROOT: Final = 1
"""The disk has no parent of its own accord (a delta's parent stands in its descriptor)."""


@dataclass(frozen=True, slots=True)
class CowdHeader(OnDisk):
    """The header of a COWD extent: 2048 bytes; offsets and sizes count sectors."""

    magic: Annotated[bytes, Wire("4s"), Must(lambda v: v == COWD_MAGIC, "must be b'COWD'")]
    version: Annotated[int, Wire("I"), Must(lambda v: v == 1, "must be 1")]
    flags: U32
    capacity: U32
    grain_size: Annotated[
        int, Wire("I"), Must(lambda v: 0 < v <= MAX_GRAIN_SECTORS, f"must be from 1 to {MAX_GRAIN_SECTORS:#x}")
    ]
    gd_offset: U32
    gd_entries: U32
    free_sector: U32
    parent_or_geometry: Annotated[bytes, Wire("1028s")]
    """Of a root: cylinders, heads, sectors (u32); else the parent's name (1024 bytes) and generation (u32)."""
    generation: U32
    name: Annotated[bytes, Wire("60s")]
    description: Annotated[bytes, Wire("512s")]
    saved_generation: U32
    reserved: Annotated[bytes, Wire("8s")]
    unclean_shutdown: U32
    padding: Annotated[bytes, Wire("396s")]

    @property
    def tables(self) -> int:
        """Grain tables that the capacity needs."""
        return -(-self.capacity // (self.grain_size * GTES_PER_GT))


def read_cowd_header(file: BlockFile, path: Path) -> CowdHeader:
    """Return the checked header of the COWD extent in `file`.

    Raises:
        FormatError: a field cannot be, or the directory does not fit.
    """
    header = CowdHeader.parse(file.read_at(0, HEADER_BYTES), path=path)
    if header.gd_entries < header.tables:
        rule = f"must be at least the {header.tables} that the capacity needs"
        raise FormatError(path, header.offset_of("gd_entries"), "gd_entries", header.gd_entries, rule)
    length = header.tables * 4
    if not header.gd_offset or sector_bytes(header.gd_offset) + length > file.size():
        rule = f"must leave {length} bytes inside the file of {file.size()} bytes"
        raise FormatError(path, header.offset_of("gd_offset"), "gd_offset", header.gd_offset, rule)
    return header


def legacy_descriptor(header: CowdHeader, path: Path) -> Descriptor:
    """Return a descriptor for a disk of the time before there were any: its generations take the place of CIDs."""
    root = bool(header.flags & FLAG_ROOT)
    hint = None if root else header.parent_or_geometry[:1024].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    parent = int.from_bytes(header.parent_or_geometry[1024:], "little")
    text = make_descriptor(
        cid=header.generation,
        parent_cid=NO_PARENT if root else parent,
        create_type="monolithicSparse",
        hint=hint,
        extents=[("RW", header.capacity, "SPARSE", path.name, None)],
        ddb={},
        path=path,
    )
    return Descriptor.parse(text, path=path)


def open_extent(spec: ExtentSpec) -> "CowdExtent":
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

    def flush(self) -> None:
        """Return when all is durable: grains and the count of used sectors, then the tables."""
        end = byte_sectors(self._file_size)
        if self._unsynced and end > self._free_sector:
            # Before the barrier in the flush below: a count that is too high wastes space, one too low loses data.
            self._file.write_at(self.header.offset_of("free_sector"), end.to_bytes(4, "little"))
            self._free_sector = end
        super().flush()

    def _place_at_end(self, length: int, grain: int) -> int:
        self._file_size = max(self._file_size, self._free_sector * SECTOR_SIZE)
        return super()._place_at_end(length, grain)
