"""What libvirt says of a domain: its persistent XML, its snapshots, its volumes, and whether it may be changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.errors import DomainError, NoSnapshot

if TYPE_CHECKING:
    import libvirt


def check_state(domain: libvirt.virDomain) -> None:
    """Accept a domain that is shut off, running or paused, and is defined.

    Raises:
        DomainError: it is transient, or would resume from saved memory that belongs to the disks as they are.
    """
    if not domain.isPersistent():
        reason = "is transient: without a persistent XML nothing would name its overlays: virsh define it first"
        raise DomainError(domain.name(), reason)
    if domain.hasManagedSaveImage():
        reason = "has a saved state, which would resume on the frozen disks: start it, or virsh managedsave-remove it"
        raise DomainError(domain.name(), reason)


def find_snapshot(domain: libvirt.virDomain, name: str) -> libvirt.virDomainSnapshot:
    """Return the domain's snapshot of that name.

    Raises:
        DomainError: there is none.
    """
    for snapshot in domain.listAllSnapshots():
        if snapshot.getName() == name:
            return snapshot
    raise NoSnapshot(domain.name(), f"has no snapshot {name!r}", snapshot=name)


def inactive_xml(domain: libvirt.virDomain) -> str:
    """Return the persistent XML with its secrets, as it must be to be defined again."""
    import libvirt

    text: str = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    return text


def volume_resolver(conn: libvirt.virConnect, domain: str) -> xml.VolumePath:
    """Return what finds the file of a storage volume on this connection."""

    def resolve(pool: str, volume: str) -> Path:
        with libvirt_errors(domain, f"find volume {volume!r} of pool {pool!r}"):
            return Path(conn.storagePoolLookupByName(pool).storageVolLookupByName(volume).path())

    return resolve
