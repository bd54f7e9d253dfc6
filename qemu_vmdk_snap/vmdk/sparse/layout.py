"""Making a new hosted sparse extent: where its parts go, and the bytes of all but the grains.

    | header | descriptor | RGD | redundant GTs | GD | GTs | pad to a grain | grains ...
    sector 0   1..20        21

Every grain table exists from the start, as the format requires: QEMU 7.2 overwrites the header when it writes through a
directory entry of 0. The tables are a hole in the file until they are used. Same places as QEMU's own images.
"""

from __future__ import annotations

import struct

from qemu_vmdk_snap.light import TYPE_CHECKING, Final, dataclass
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, byte_sectors, round_up, sector_bytes
from qemu_vmdk_snap.vmdk.grain.new_extent import Wanted
from qemu_vmdk_snap.vmdk.sparse.header import (
    COMPRESS_NONE,
    GTES_PER_GT,
    MAGIC,
    NEWLINE_PROBE,
    HeaderFlag,
    SparseExtentHeader,
)

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.grain.bulk import BulkWriter

DESCRIPTOR_SECTORS: Final = 20


@dataclass(frozen=True, slots=True)
class SparseLayout:
    """A planned extent: its header, where its redundant and its primary tables begin, the descriptor inside it."""

    header: SparseExtentHeader
    rgt_sector: int
    gt_sector: int
    descriptor: bytes | None = None

    @property
    def grain_bytes(self) -> int:
        """Bytes of a grain."""
        return sector_bytes(self.header.grain_size)

    @property
    def fixed_bytes(self) -> int:
        """Everything before the grains."""
        return sector_bytes(self.header.overhead)

    def create(self, file: BlockFile) -> None:
        """Write the header, the descriptor and the directories, and give the file its full overhead."""
        write_sparse(file, self, self.descriptor)

    def writer(self, file: BlockFile) -> BulkWriter:
        """Return the writer that fills the file."""
        from qemu_vmdk_snap.vmdk.grain.bulk import BulkSparse  # NumPy: not needed to make an empty image

        return BulkSparse(file, self)


def plan_extent(wanted: Wanted) -> SparseLayout:
    """Return the layout of a hosted sparse extent."""
    return plan_sparse(
        wanted.sectors,
        grain_sectors=wanted.grain_sectors,
        zeroed_grains=wanted.zeroed_grains,
        descriptor=wanted.descriptor,
    )


def plan_sparse(sectors: int, *, grain_sectors: int, zeroed_grains: bool, descriptor: bytes | None) -> SparseLayout:
    """Return the layout of an empty extent of `sectors`; `descriptor` is embedded unless it is None."""
    tables = -(-sectors // (grain_sectors * GTES_PER_GT))
    gd_sectors = byte_sectors(tables * 4)
    gts_sectors = tables * byte_sectors(GTES_PER_GT * 4)
    room = 0 if descriptor is None else max(DESCRIPTOR_SECTORS, byte_sectors(len(descriptor) + SECTOR_SIZE))
    rgd = 1 + room
    gd = rgd + gd_sectors + gts_sectors
    flags = HeaderFlag.NEWLINE_TEST | HeaderFlag.REDUNDANT_GD
    header = SparseExtentHeader(
        magic=MAGIC,
        version=2 if zeroed_grains else 1,
        flags=flags | (HeaderFlag.ZEROED_GRAINS if zeroed_grains else 0),
        capacity=sectors,
        grain_size=grain_sectors,
        descriptor_offset=1 if room else 0,
        descriptor_size=room,
        gtes_per_gt=GTES_PER_GT,
        rgd_offset=rgd,
        gd_offset=gd,
        overhead=round_up(gd + gd_sectors + gts_sectors, grain_sectors),
        unclean_shutdown=0,
        newline_probe=NEWLINE_PROBE,
        compression=COMPRESS_NONE,
        reserved=bytes(433),
    )
    return SparseLayout(header, rgd + gd_sectors, gd + gd_sectors, descriptor)


def write_sparse(file: BlockFile, layout: SparseLayout, descriptor: bytes | None) -> None:
    """Write the header, the descriptor and the directories into an empty file and give it its full overhead."""
    header = layout.header
    file.truncate(sector_bytes(header.overhead))
    file.write_at(0, header.serialise())
    if descriptor is not None:
        file.write_at(sector_bytes(header.descriptor_offset), descriptor)
    file.write_at(sector_bytes(header.rgd_offset), _directory(header, layout.rgt_sector))
    file.write_at(sector_bytes(header.gd_offset), _directory(header, layout.gt_sector))


def _directory(header: SparseExtentHeader, first: int) -> bytes:
    count, step = header.gd_entries, header.gt_sectors
    return struct.pack(f"<{count}I", *range(first, first + count * step, step))
