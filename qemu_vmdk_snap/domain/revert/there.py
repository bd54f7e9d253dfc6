"""Is a domain at a snapshot already? Then a revert would only put empty overlays in the place of empty overlays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.journal.overlays import is_empty
from qemu_vmdk_snap.domain.needs.needed import same_file
from qemu_vmdk_snap.domain.state import volume_resolver
from qemu_vmdk_snap.errors import VmdkSnapError

if TYPE_CHECKING:
    import libvirt

    from qemu_vmdk_snap.domain.overlay.planned import PlannedDisk
    from qemu_vmdk_snap.domain.revert.run import Plan


def is_there(conn: libvirt.virConnect, domain: libvirt.virDomain, plan: Plan) -> bool:
    """Return whether the revert would change nothing that a guest could see.

    That is so where the domain is and stays shut off, the snapshot is the current one, the XML is that of the snapshot,
    and each disk's top is an overlay of the frozen file that holds nothing. What cannot be read is not there.
    """
    if domain.isActive() or plan.state != "shutoff" or plan.intent.current != plan.intent.snapshot or plan.notes:
        return False
    disks = xml.list_disks(plan.intent.old_xml, volume_resolver(conn, domain.name()))
    tops = {disk.target: disk for disk in disks}
    return all(disk.target in tops and _holds_nothing(tops[disk.target], disk) for disk in plan.disks)


def _holds_nothing(today: xml.Disk, planned: PlannedDisk) -> bool:
    if today.path is None or not today.backing or not same_file(today.backing[0], planned.frozen):
        return False
    folders = sorted({path.parent for path in today.backing})
    try:
        with engine.open_chain(today.path, trusted_dirs=folders) as chain:
            if len(chain.links) < 2 or not same_file(chain.links[1].path, planned.frozen):
                return False
            return is_empty(chain.links[0])
    except (VmdkSnapError, OSError):
        return False
