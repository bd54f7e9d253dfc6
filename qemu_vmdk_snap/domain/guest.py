"""What a throw-away guest needs to boot on the disks of a domain, or on those of one of its snapshots."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap import DomainBusy, DomainError, InvalidRequest
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.registry import snapshot_info
from qemu_vmdk_snap.domain.state import volume_resolver
from qemu_vmdk_snap.domain.xml import VolumePath, domain_of, files_in, list_disks, root_of

if TYPE_CHECKING:
    import libvirt

_INACTIVE: Final = 2  # VIR_DOMAIN_XML_INACTIVE
_USUAL_MIB: Final = 512
_SCSI: Final = {"lsilogic": "lsi", "vmpvscsi": "pvscsi"}
_BUSES: Final = {"virtio": "virtio-blk", "sata": "ahci", "ide": "ide"}


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """One VMDK disk of a domain."""

    target: str
    path: Path
    """Its top image: that of the domain, or the one that a snapshot has frozen."""
    controller: str
    """What it is attached to, in the words of `harness.boot`."""


@dataclass(frozen=True, slots=True)
class DomainHardware:
    """What a guest like that of the domain is made of."""

    name: str
    snapshot: str | None
    machine: str
    """`pc` or `q35`."""
    memory_mib: int
    uefi: bool
    disks: tuple[DomainDisk, ...]
    left_out: tuple[str, ...]
    """What is no VMDK disk, with the reason, one line each."""
    folders: tuple[Path, ...]
    """Where libvirt says that files of its disks are: parents may be opened there."""


def hardware_of(conn: libvirt.virConnect, domain: str, snapshot: str | None = None) -> DomainHardware:
    """Return what boots like the domain as it is now, or as it was at a snapshot.

    Raises:
        DomainError: there is no such domain or snapshot.
        DomainBusy: the domain runs, and no snapshot is named: its disks change meanwhile.
        InvalidRequest: it has no VMDK disk.
    """
    found = find_domain(conn, domain)
    name = found.name()
    frozen: dict[str, Path | None] = {}
    with libvirt_errors(name, "read the XML of the domain"):
        text = found.XMLDesc(_INACTIVE)
        running = bool(found.isActive())
    places = files_in(text)
    if snapshot is not None:
        info = snapshot_info(conn, name, snapshot)
        frozen = {disk.target: disk.frozen for disk in info.disks}
        with libvirt_errors(name, f"read snapshot {snapshot!r}"):
            then = found.snapshotLookupByName(snapshot).getXMLDesc()
        places |= files_in(then)
        try:
            text = domain_of(then)
        except KeyError:
            raise DomainError(name, f"snapshot {snapshot!r} does not say what the domain was") from None
    elif running:
        raise DomainBusy(name, "runs, and writes to its disks: shut it off, or name one of its snapshots")
    return _hardware(name, snapshot, text, frozen, places, volume_resolver(conn, name))


def _hardware(
    name: str, snapshot: str | None, text: str, frozen: dict[str, Path | None], places: set[Path], volumes: VolumePath
) -> DomainHardware:
    root = root_of(text)
    kept, left_out = [], []
    for disk in list_disks(text, volumes):
        path = frozen.get(disk.target) or disk.path
        if path is None or (disk.refusal is not None and "not vmdk" in disk.refusal):
            left_out.append(f"disk {disk.target} {disk.refusal or 'has no file'}")
            continue
        kept.append(DomainDisk(disk.target, path, _controller(root, disk.target)))
    if not kept:
        raise InvalidRequest(f"domain {name}", "has no VMDK disk")
    os_type = root.find("os/type")
    machine = "" if os_type is None else os_type.get("machine", "")
    return DomainHardware(
        name=name,
        snapshot=snapshot,
        machine="q35" if "q35" in machine else "pc",
        memory_mib=_memory(root),
        uefi=_is_uefi(root),
        disks=tuple(kept),
        left_out=tuple(left_out),
        folders=tuple(sorted({path.parent for path in places if path.is_absolute()})),
    )


def _controller(root: ET.Element, target: str) -> str:
    """Return what the disk of this target is attached to; AHCI where that is nothing a guest here can have."""
    for element in root.iterfind("devices/disk"):
        place = element.find("target")
        if place is None or place.get("dev") != target:
            continue
        bus = place.get("bus", "")
        if bus == "scsi":
            model = root.find("devices/controller[@type='scsi']")
            return _SCSI.get("" if model is None else model.get("model", ""), "virtio-scsi")
        return _BUSES.get(bus, "ahci")
    return "ahci"


def _memory(root: ET.Element) -> int:
    """Return the MiB of memory; libvirt gives them in KiB."""
    text = root.findtext("memory") or ""
    return max(16, int(text) // 1024) if text.strip().isdigit() else _USUAL_MIB


def _is_uefi(root: ET.Element) -> bool:
    system, loader = root.find("os"), root.find("os/loader")
    return (system is not None and system.get("firmware") == "efi") or (
        loader is not None and loader.get("type") == "pflash"
    )
