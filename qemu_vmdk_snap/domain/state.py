"""A domain's persistent XML, snapshots and volumes, and whether it may be changed."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.xml.named import folders_named
from qemu_vmdk_snap.domain.xml.served import NAMESPACE, PREFIX, direct_view, notes_element, served_view
from qemu_vmdk_snap.errors import DomainError, NoSnapshot, VmdkSnapError
from qemu_vmdk_snap.light import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import libvirt

_POOLS_OF_FILES: Final = ("dir", "fs", "netfs", "logical")
"""Types of pools whose volumes are files of the target folder, by name."""


def check_state(domain: libvirt.virDomain) -> None:
    """Accept a domain that is shut off, running or paused, and is defined.

    Raises:
        DomainError: it is transient, or would resume from saved memory that belongs to the disks as they are.
    """
    if not domain.isPersistent():
        reason = (
            "is transient: without a persistent XML nothing would name its overlays: define it first (virsh define)"
        )
        raise DomainError(domain.name(), reason)
    if domain.hasManagedSaveImage():
        reason = "has a saved state, which would resume on the frozen disks: start it, or virsh managedsave-remove it"
        raise DomainError(domain.name(), reason)


def is_running(conn: libvirt.virConnect, domain: str) -> bool:
    """Return whether the domain has a guest, running or paused.

    Raises:
        DomainError: there is no such domain.
    """
    return bool(find_domain(conn, domain).isActive())


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
    """Return the persistent XML with its secrets, as it must be to be defined again: see `define`.

    A served disk appears as the VMDK file that is behind it (`xml.served`).
    """
    import libvirt

    text: str = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    return direct_view(text)


def define(conn: libvirt.virConnect, text: str) -> None:
    """Define the domain by XML as `inactive_xml` returns it; what a running guest's XML says of served disks follows.

    That goes into memory that is saved, and tells at its restoring which state of the disks it belongs to.
    """
    import libvirt

    domain = conn.defineXML(served_view(text))
    notes = notes_element(served_view(text))
    if notes is not None and domain.isActive():
        kind, flags = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
        domain.setMetadata(kind, notes, PREFIX, NAMESPACE, flags)


def volume_resolver(conn: libvirt.virConnect, domain: str) -> xml.VolumePath:
    """Return a function that finds the file of a storage volume on this connection."""

    def resolve(pool: str, volume: str) -> Path:
        with libvirt_errors(domain, f"find volume {volume!r} of pool {pool!r}"):
            found = conn.storagePoolLookupByName(pool)
            if not found.isActive():
                return volume_by_pool_xml(domain, found.XMLDesc(0), pool, volume)
            return Path(found.storageVolLookupByName(volume).path())

    return resolve


def named_folders(conn: libvirt.virConnect, domain: libvirt.virDomain) -> list[Path]:
    """Return the folders of all files that the domain's persistent XML and its snapshots name.

    Raises:
        DomainError: libvirt reports an error.
    """
    with libvirt_errors(domain.name(), "read its XML and snapshots"):
        texts = [inactive_xml(domain), *(snapshot.getXMLDesc(0) for snapshot in domain.listAllSnapshots())]
    return folders_named(lenient(volume_resolver(conn, domain.name())), *texts)


def lenient(volume_path: xml.VolumePath) -> xml.VolumePath:
    """Return a resolver for which a volume that cannot be found is a path that does not exist."""

    def resolve(pool: str, volume: str) -> Path:
        try:
            return volume_path(pool, volume)
        except VmdkSnapError:
            return Path(f"/volume {volume!r} of pool {pool!r}, which cannot be found")

    return resolve


def volume_by_pool_xml(domain: str, text: str, pool: str, volume: str) -> Path:
    """Return where the volume is once the pool is active, by the XML of the pool.

    Raises:
        DomainError: its kind of pool has other places for volumes.
    """
    import xml.etree.ElementTree as ET

    root = ET.fromstring(text)
    target = root.findtext("target/path")
    if root.get("type") not in _POOLS_OF_FILES or not target:
        raise DomainError(domain, f"cannot find volume {volume!r}: pool {pool!r} is not active")
    return Path(target, volume)
