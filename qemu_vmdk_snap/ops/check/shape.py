"""What a check and a repair of tables need from a header, the same for hosted sparse and COWD extents."""

from __future__ import annotations

from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.units import byte_sectors
from qemu_vmdk_snap.vmdk.cowd.header import HEADER_BYTES, CowdHeader
from qemu_vmdk_snap.vmdk.runs import Int64s
from qemu_vmdk_snap.vmdk.sparse.header import HeaderFlag, SparseExtentHeader


@dataclass(frozen=True, slots=True)
class TableShape:
    """Where the directories are and how tables are read; places and sizes in sectors."""

    capacity: int
    grain_size: int
    gtes_per_gt: int
    gt_sectors: int
    gd_entries: int
    gd_offset: int
    gd_field: int
    """Byte of the header that holds `gd_offset`."""
    rgd_offset: int | None
    """None where there is no second copy of the tables."""
    fixed: tuple[tuple[int, int], ...]
    """(sector, sectors) of the metadata besides directories and tables."""
    lowest: int
    """The smallest table entry that is a place."""
    on_demand: bool
    """Whether tables may be missing."""
    used: range
    """From which sector on unnamed space is leaked, except what `first_use` leaves out."""

    @property
    def gd_sectors(self) -> int:
        """Sectors of one directory."""
        return byte_sectors(self.gd_entries * 4)

    def first_use(self, tables: Int64s) -> int:
        """Return the sector before which unnamed space is not leaked; `tables` are the places of all."""
        if not self.on_demand:
            return self.used.start
        return int(tables.min(initial=self.used.stop))  # a directory that was moved leaves free space before them


def shape_of(header: SparseExtentHeader | CowdHeader) -> TableShape:
    """Return the shape from a header that was checked before."""
    if isinstance(header, CowdHeader):
        fixed: tuple[tuple[int, int], ...] = ((0, byte_sectors(HEADER_BYTES)),)
        entries, redundant, lowest = header.tables, None, 1
        # ESXi extends the file in large steps: past the sectors in use nothing is leaked.
        used = range(0, header.free_sector)
    else:
        # Without a descriptor its size has no meaning.
        text = header.descriptor_size if header.descriptor_offset else 0
        fixed = ((0, 1), (header.descriptor_offset, text))
        entries, redundant = header.gd_entries, header.rgd_offset if header.redundant else None
        lowest = 2 if header.flags & HeaderFlag.ZEROED_GRAINS else 1
        used = range(header.overhead, 1 << 62)
    return TableShape(
        capacity=header.capacity,
        grain_size=header.grain_size,
        gtes_per_gt=header.gtes_per_gt,
        gt_sectors=header.gt_sectors,
        gd_entries=entries,
        gd_offset=header.gd_offset,
        gd_field=header.offset_of("gd_offset"),
        rgd_offset=redundant,
        fixed=fixed,
        lowest=lowest,
        on_demand=isinstance(header, CowdHeader),
        used=used,
    )
