"""Making a new COWD extent: where its parts go, and the bytes of all but the grains.

    | header | grain directory | grain tables | grains ...
    sector 0   4

Every grain table exists from the start, though the format makes them on demand: QEMU 7.2 overwrites the header when
it writes through a directory entry of 0. The tables are a hole in the file until they are used. Grains are one sector,
as ESXi has them.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.light import dataclass, replace
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import byte_sectors, sector_bytes
from qemu_vmdk_snap.vmdk.cowd.header import COWD_MAGIC, FLAGS, HEADER_BYTES, CowdHeader
from qemu_vmdk_snap.vmdk.grain.new_extent import Wanted

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.grain.bulk import BulkWriter

GRAIN_SECTORS: Final = 1
MAX_FILE_SECTORS: Final = (1 << 32) - 1
"""All sector numbers have 32 bits."""


@dataclass(frozen=True, slots=True)
class CowdLayout:
    """A planned extent: its header, and the sector where its tables begin."""

    header: CowdHeader
    gt_sector: int

    @property
    def rgt_sector(self) -> int:
        """The same as `gt_sector`: there is one copy."""
        return self.gt_sector

    @property
    def grain_bytes(self) -> int:
        """Bytes of a grain."""
        return sector_bytes(self.header.grain_size)

    @property
    def fixed_bytes(self) -> int:
        """Everything before the grains."""
        return sector_bytes(self.header.overhead)

    def create(self, file: BlockFile) -> None:
        """Write the header and the directory, and extend the file to include its tables."""
        write_cowd(file, self)

    def writer(self, file: BlockFile) -> BulkWriter:
        """Return the writer that fills the file."""
        from qemu_vmdk_snap.vmdk.cowd.writer import BulkCowd  # NumPy: not needed to make an empty image

        return BulkCowd(file, self)


def plan_extent(wanted: Wanted) -> CowdLayout:
    """Return the layout of a COWD extent; raises Unsupported if the size exceeds what the format can store."""
    return plan_cowd(wanted.sectors, wanted.path, geometry=wanted.geometry)


def plan_cowd(sectors: int, path: Path, *, geometry: tuple[int, int, int]) -> CowdLayout:
    """Return the layout of an empty extent of `sectors`; `geometry` is cylinders, heads, sectors.

    Raises:
        Unsupported: the format's 32 bits are too few for so many sectors and their tables.
    """
    header = CowdHeader(
        magic=COWD_MAGIC,
        version=1,
        flags=FLAGS,
        capacity=sectors,
        grain_size=GRAIN_SECTORS,
        gd_offset=0,
        gd_entries=0,
        free_sector=0,
        parent_or_geometry=struct.pack("<3I", *geometry).ljust(1028, b"\0"),
        generation=0,
        name=bytes(60),
        description=bytes(512),
        saved_generation=0,
        reserved=bytes(8),
        unclean_shutdown=0,
        padding=bytes(396),
    )
    return lay_out_anew(header, path)


def lay_out_anew(header: CowdHeader, path: Path) -> CowdLayout:
    """Return the layout of an empty extent whose header equals `header` except for places in the file.

    Raises:
        Unsupported: the format's 32 bits are too few for so many sectors and their tables.
    """
    gd = byte_sectors(HEADER_BYTES)
    gt = gd + byte_sectors(header.tables * 4)
    free = gt + header.tables * header.gt_sectors
    if free + header.capacity > MAX_FILE_SECTORS:
        feature = f"a vmfsSparse extent cannot hold {header.capacity} sectors: its file ends below 2 TiB"
        raise Unsupported(path, feature)
    return CowdLayout(replace(header, gd_offset=gd, gd_entries=header.tables, free_sector=free), gt)


def write_cowd(file: BlockFile, layout: CowdLayout) -> None:
    """Write the header and the directory into an empty file and extend it to include its tables."""
    header = layout.header
    file.truncate(sector_bytes(header.free_sector))
    file.write_at(0, header.serialise())
    tables = range(layout.gt_sector, header.free_sector, header.gt_sectors)
    file.write_at(sector_bytes(header.gd_offset), struct.pack(f"<{len(tables)}I", *tables))
