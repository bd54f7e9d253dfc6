"""The header of a COWD extent, and the descriptor of a disk from before descriptors existed.

Source: the COWDisk header of VMware's technote 1.0; libvmdk's "COWD sparse extent".
"""

from pathlib import Path

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.light import Annotated, Final, dataclass
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import byte_sectors, sector_bytes
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor, make_descriptor
from qemu_vmdk_snap.vmdk.ondisk import U32, Must, OnDisk, Wire
from qemu_vmdk_snap.vmdk.sparse.header import MAX_GRAIN_SECTORS

COWD_MAGIC: Final = b"COWD"
HEADER_BYTES: Final = 2048
GTES_PER_GT: Final = 4096
FLAGS: Final = 3
FLAG_ROOT: Final = 1
"""The disk has no parent (the parent of a delta is named in its descriptor)."""


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
    def gtes_per_gt(self) -> int:
        """Entries of one grain table."""
        return GTES_PER_GT

    @property
    def gt_sectors(self) -> int:
        """Sectors that one grain table takes in the file."""
        return byte_sectors(GTES_PER_GT * 4)

    @property
    def overhead(self) -> int:
        """The sector after everything that is in use: where the grains of an empty extent begin."""
        return self.free_sector

    @property
    def tables(self) -> int:
        """Grain tables that the capacity needs."""
        return -(-self.capacity // (self.grain_size * GTES_PER_GT))


def read_cowd_header(file: BlockFile, path: Path) -> CowdHeader:
    """Return the checked header of the COWD extent in `file`.

    Raises:
        FormatError: a field is invalid, or the directory does not fit.
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
    """Return a descriptor for a disk from before descriptors existed: its generations serve as CIDs."""
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
