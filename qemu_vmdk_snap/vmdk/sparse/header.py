"""Sector 0 of a hosted sparse extent (`KDMV`), and the rules that hold between its fields.

Source: VMware Virtual Disk Format 5.0, "Hosted Sparse Extents"; limits as QEMU 7.2 block/vmdk.c has them.
"""

import struct
from pathlib import Path

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.light import Annotated, Final, dataclass
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, byte_sectors, sector_bytes
from qemu_vmdk_snap.vmdk.ondisk import U8, U16, U32, U64, Must, OnDisk, Wire, power_of_two

MAGIC: Final = b"KDMV"
NEWLINE_PROBE: Final = b"\n \r\n"
GD_AT_END: Final = 0xFFFF_FFFF_FFFF_FFFF
"""The gdOffset of a stream whose real header is the footer at the end of the file."""

GTES_PER_GT: Final = 512
MAX_GRAIN_SECTORS: Final = 0x200000  # QEMU's limit: 1 GiB
MAX_GD_ENTRIES: Final = 32 << 20  # QEMU's limit
COMPRESS_NONE: Final = 0
COMPRESS_DEFLATE: Final = 1

_MOVED_SECTORS: Final = (0, -1, 1, -2, 2)
"""How many whole sectors an edit of the descriptor may have moved the rest, besides the odd bytes."""
_LOOKED_AT: Final = 128


class HeaderFlag:  # plain numbers: an IntFlag takes longer to define than a small image to read
    """The bits of `flags`."""

    NEWLINE_TEST: Final = 1 << 0
    REDUNDANT_GD: Final = 1 << 1
    ZEROED_GRAINS: Final = 1 << 2
    COMPRESSED: Final = 1 << 16
    MARKERS: Final = 1 << 17


_KNOWN_FLAGS: Final = (
    HeaderFlag.NEWLINE_TEST
    | HeaderFlag.REDUNDANT_GD
    | HeaderFlag.ZEROED_GRAINS
    | HeaderFlag.COMPRESSED
    | HeaderFlag.MARKERS
)


@dataclass(frozen=True, slots=True)
class SparseExtentHeader(OnDisk):
    """The header of a hosted sparse extent: 512 bytes; offsets and sizes count sectors."""

    magic: Annotated[bytes, Wire("4s"), Must(lambda v: v == MAGIC, "must be b'KDMV'")]
    version: Annotated[int, Wire("I"), Must(lambda v: v in (1, 2, 3), "must be 1, 2 or 3")]
    flags: U32
    capacity: U64
    grain_size: Annotated[
        int,
        Wire("Q"),
        Must(lambda v: power_of_two(v) and v <= MAX_GRAIN_SECTORS, "must be a power of two from 1 to 0x200000"),
    ]
    descriptor_offset: U64
    descriptor_size: U64
    gtes_per_gt: Annotated[int, Wire("I"), Must(lambda v: 0 < v <= GTES_PER_GT, "must be from 1 to 512")]
    rgd_offset: U64
    gd_offset: U64
    overhead: U64
    unclean_shutdown: U8
    newline_probe: Annotated[bytes, Wire("4s")]
    compression: U16
    reserved: Annotated[bytes, Wire("433s")]

    @property
    def gt_coverage(self) -> int:
        """Sectors of the guest's disk that one grain table covers."""
        return self.grain_size * self.gtes_per_gt

    @property
    def gd_entries(self) -> int:
        """Entries of the grain directory, rounded up: the last table may be covered in part."""
        return -(-self.capacity // self.gt_coverage)

    @property
    def gt_sectors(self) -> int:
        """Sectors that one grain table takes in the file."""
        return byte_sectors(self.gtes_per_gt * 4)

    @property
    def redundant(self) -> bool:
        """Whether the file keeps a second copy of the directory and the tables."""
        return bool(self.flags & HeaderFlag.REDUNDANT_GD) and self.rgd_offset != 0

    @property
    def is_extent(self) -> bool:
        """Whether the file contains an extent: with a capacity of 0 it only contains a descriptor, as in QEMU."""
        return bool(self.capacity) or not self.descriptor_offset

    @property
    def compressed(self) -> bool:
        """Whether grains are stored deflated."""
        return bool(self.flags & HeaderFlag.COMPRESSED)


def check_header(header: SparseExtentHeader, path: Path, file_size: int, *, tolerant: bool = False) -> None:
    """Check the fields against each other: the parts named by the header must fit into a file of `file_size` bytes.

    `tolerant` lets one of the two copies of the directory be outside the file, for reading only.

    Raises:
        FormatError: a count or an offset is out of range; nothing has been allocated for it.
        Unsupported: an incompatible flag, or a compression, that this package does not know.
    """
    _check_flags(header, path)
    if header.gd_entries > MAX_GD_ENTRIES:
        rule = f"must need at most {MAX_GD_ENTRIES} grain directory entries, not {header.gd_entries}"
        raise FormatError(path, header.offset_of("capacity"), "capacity", header.capacity, rule)
    if header.descriptor_offset:
        # A file with only a descriptor may end with the text.
        _check_inside(header, "descriptor_offset", header.descriptor_size if header.is_extent else 1, path, file_size)
    if not header.is_extent:
        return
    if header.gd_offset == GD_AT_END and header.compressed:
        return
    gd_sectors = byte_sectors(header.gd_entries * 4)
    fields = ["gd_offset", "rgd_offset"] if header.redundant else ["gd_offset"]
    inside = [_is_inside(header, field, gd_sectors, file_size) for field in fields]
    if not all(inside) and not (tolerant and any(inside)):
        _check_inside(header, fields[inside.index(False)], gd_sectors, path, file_size)


def refuse_moved(header: SparseExtentHeader, file: BlockFile) -> None:
    """Refuse a file whose embedded descriptor was changed in length, so that all places after it are wrong.

    An editor of text (`sed -i`) does that: the tables then lie some bytes from where the header says.

    Raises:
        FormatError: it was; nothing can be read through the tables.
    """
    extra = file.size() % SECTOR_SIZE
    if not extra or not header.descriptor_offset or not header.is_extent or header.compressed:
        return
    if _leads_to_tables(header, file, 0):
        return
    for moved in sorted((extra + sector_bytes(sectors) for sectors in _MOVED_SECTORS), key=abs):
        if _leads_to_tables(header, file, moved):
            rule = f"must fill {header.descriptor_size} sectors: it was edited in place (sed -i, for one), "
            rule += f"and everything after it moved by {moved} bytes: edit it back to its old length"
            at = sector_bytes(header.descriptor_offset)
            raise FormatError(file.path, at, "length of the embedded descriptor", f"{moved:+}", rule)


def _leads_to_tables(header: SparseExtentHeader, file: BlockFile, moved: int) -> bool:
    """Return whether each directory, read `moved` bytes from its place, names only tables in the file."""
    last = file.size() // SECTOR_SIZE - header.gt_sectors
    places = [header.gd_offset, header.rgd_offset] if header.redundant else [header.gd_offset]
    for place in places:
        at = sector_bytes(place) + moved
        inside = 0 <= at < file.size()  # the system rejects offsets beyond the largest file
        raw = file.read_at(at, 4 * min(header.gd_entries, _LOOKED_AT)) if inside else b""
        entries = [entry for (entry,) in struct.iter_unpack("<I", raw[: len(raw) // 4 * 4])]
        if not entries or not all(0 < entry <= last for entry in entries):
            return False
    return True


def _check_flags(header: SparseExtentHeader, path: Path) -> None:
    # The technote's low 16 bits are compatible, the high 16 bits are not: an unknown one there changes the meaning.
    unknown = header.flags & 0xFFFF_0000 & ~_KNOWN_FLAGS
    if unknown:
        raise Unsupported(path, f"byte 0x8: flags = {header.flags:#x}: unknown incompatible bits {unknown:#x}")
    if header.compressed and header.compression != COMPRESS_DEFLATE:
        raise Unsupported(path, f"byte 0x4d: compression = {header.compression}: only 1 (deflate) is known")
    if header.flags & HeaderFlag.NEWLINE_TEST and header.newline_probe != NEWLINE_PROBE:
        rule = "must be b'\\n \\r\\n': the file was damaged by a text-mode transfer"
        raise FormatError(path, header.offset_of("newline_probe"), "newline_probe", header.newline_probe, rule)


def _is_inside(header: SparseExtentHeader, field: str, sectors: int, file_size: int) -> bool:
    start: int = getattr(header, field)
    return start != 0 and (start + sectors) * SECTOR_SIZE <= file_size


def _check_inside(header: SparseExtentHeader, field: str, sectors: int, path: Path, file_size: int) -> None:
    start = getattr(header, field)
    if not _is_inside(header, field, sectors, file_size):
        rule = f"must leave {sectors} sectors inside the file of {file_size} bytes"
        raise FormatError(path, header.offset_of(field), field, start, rule)
