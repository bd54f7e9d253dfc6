"""What the servers of a running guest do for a delete: the frozen link goes up into the image above it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap import OnProgress, open_chain
from qemu_vmdk_snap.domain.delete.plan import folders_of
from qemu_vmdk_snap.domain.delete.work import Deleted, work_of
from qemu_vmdk_snap.domain.journal.record import Intent
from qemu_vmdk_snap.domain.needs.needed import place_in, same_file
from qemu_vmdk_snap.domain.served.merge import merge_in_server
from qemu_vmdk_snap.domain.served.server import statuses
from qemu_vmdk_snap.domain.state import inactive_xml
from qemu_vmdk_snap.domain.xml.served import served_disks
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt


def merge_served(domain: libvirt.virDomain, intent: Intent, on_progress: OnProgress, *, bandwidth: int = 0) -> None:
    """Let the servers of a running guest merge what they have in their chains, one disk after the other.

    Each copies at most `bandwidth` bytes a second; 0 is no limit.

    Raises:
        DomainError: one cannot; those before it have.
    """
    works = [one for one in work_of(intent) if one.served]
    if works and domain.isActive():
        disks = served_disks(inactive_xml(domain))
        for one in works:
            merge_in_server(domain.name(), disks[one.target], Path(one.frozen), on_progress, bandwidth=bandwidth)


def require_in_servers(domain: str, deleted: Iterable[Deleted], bandwidth: int) -> None:
    """Refuse a limit on what is copied where anything but a server copies: it would not be kept.

    Raises:
        DomainError: it is so with a disk.
    """
    for one in [work for snapshot in deleted for work in snapshot.work] if bandwidth else ():
        if one.mode in ("merge", "copy", "exchange") and not one.served:
            reason = "no server of a running guest's disk merges it, so there is no limit on its bandwidth"
            raise DomainError(domain, f"disk {one.target}: {reason}")


def is_begun_by_server(domain: libvirt.virDomain, intent: Intent) -> bool:
    """Return whether a server has merged its disk already, or moved another branch."""
    works = [one for one in work_of(intent) if one.served]
    found = statuses(domain.name(), inactive_xml(domain)) if works else {}
    for one in works:
        said = found.get(one.target)
        if said is None:
            continue
        if place_in(map(Path, said["chain"]), one.frozen) is None:
            return True
        for image in map(Path, one.moving):
            with open_chain(image, trusted_dirs=folders_of(intent), lock=False) as chain:
                if chain.depth < 2 or not same_file(chain.links[1].path, Path(one.frozen)):
                    return True
    return False
