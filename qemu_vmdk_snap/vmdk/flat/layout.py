"""Making a new flat extent: byte n of the file is byte n of the disk, a hole until it is written or reserved."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import sector_bytes
from qemu_vmdk_snap.vmdk.grain.new_extent import Wanted

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.grain.bulk import BulkWriter


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """A planned flat extent."""

    sectors: int
    reserve: bool

    @property
    def grain_bytes(self) -> int:
        """0: there are no grains."""
        return 0

    @property
    def fixed_bytes(self) -> int:
        """The whole capacity."""
        return sector_bytes(self.sectors)

    def create(self, file: BlockFile) -> None:
        """Set the length of the file, and reserve its space if wanted."""
        file.truncate(self.fixed_bytes)
        descriptor = file.fileno()
        if self.reserve and descriptor is not None:
            os.posix_fallocate(descriptor, 0, self.fixed_bytes)

    def writer(self, file: BlockFile) -> BulkWriter:
        """Return the writer that fills the file."""
        from qemu_vmdk_snap.vmdk.grain.bulk import BulkFlat  # NumPy: not needed to make an empty image

        return BulkFlat(file, self.fixed_bytes)


def plan_extent(wanted: Wanted) -> FlatLayout:
    """Return the layout of a flat extent."""
    return FlatLayout(wanted.sectors, wanted.reserve)
