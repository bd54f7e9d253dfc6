"""What a domain's disk can be attached to; without any other import, for whoever only asks that."""

from __future__ import annotations

from typing import Final

BUSES: Final = {"ide": "ide", "ahci": "sata", "virtio-blk": "virtio", "virtio-scsi": "scsi"}
"""libvirt's bus for each controller that a domain can have here."""
