"""Filling a new COWD extent in one pass."""

from __future__ import annotations

from qemu_vmdk_snap.units import byte_sectors
from qemu_vmdk_snap.vmdk.cowd.header import CowdHeader
from qemu_vmdk_snap.vmdk.grain.bulk import BulkSparse


class BulkCowd(BulkSparse):
    """Fills a COWD extent, whose header counts the sectors in use."""

    def finish(self) -> None:
        """Store the last tables and the count of used sectors."""
        super().finish()
        used = byte_sectors(self.end)
        self._file.write_at(CowdHeader.offset_of("free_sector"), used.to_bytes(4, "little"))
