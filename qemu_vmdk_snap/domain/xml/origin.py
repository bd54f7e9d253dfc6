"""Who made a snapshot: what is not of our making is shown as foreign, and virsh's own commands are there for it."""

from __future__ import annotations

from qemu_vmdk_snap.domain.xml import SnapshotXml
from qemu_vmdk_snap.errors import DomainError


def maker_of(snapshot: SnapshotXml) -> str | None:
    """Return what kind of foreign snapshot it is; None for one that the commands here can revert to and delete.

    Ours have external disks alone, each with a VMDK overlay, also where memory belongs to them; what virsh makes of a
    VMDK disk has a qcow2 overlay.
    """
    modes = {disk.mode for disk in snapshot.disks} - {"no"}
    if "internal" in modes or snapshot.memory == "internal":
        return "internal"
    if "manual" in modes:  # disks that are snapshotted outside libvirt
        return None
    if snapshot.memory not in ("no", "", "external"):
        return f"with memory, {snapshot.memory}"
    formats = {disk.format for disk in snapshot.disks if disk.mode == "external" and disk.format} - {"vmdk"}
    return f"{', '.join(sorted(formats))} overlays" if formats else None


def refuse_foreign(domain: str, snapshot: SnapshotXml) -> None:
    """Accept a snapshot that was made here, whose deletion is more than that of its metadata.

    Raises:
        DomainError: it was not.
    """
    maker = maker_of(snapshot)
    if maker is not None:
        reason = f"snapshot {snapshot.name!r} was not made here ({maker})"
        raise DomainError(domain, f"{reason}: `virsh snapshot-delete` deletes it, --metadata only forgets it")
