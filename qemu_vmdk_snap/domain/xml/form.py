"""The form in which a snapshot is registered: one that libvirt's own delete and revert refuse.

libvirt would merge our overlays by a block job, which QEMU's vmdk driver does not survive, or revert by a qcow2 overlay
and delete the active ones. Before it does, it looks up the disks of the snapshot. Measured with libvirt 9.0 and 11.3:

    <disks>                     the overlay as `/img/a-000001.vmdk/.`, which the delete of 9.0 finds in no chain
    <domain>, <inactiveDomain>  the frozen file as `type='block'`, `source dev=`, which 11.3 does not take for that disk

It is metadata alone: list, info, dumpxml and `--metadata` work as before. The form is put on where a snapshot is
registered and taken off where a domain is defined from it; other readers take `dev` as `file`, and pathlib drops `/.`.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection
from pathlib import Path

from qemu_vmdk_snap.domain.xml.splice import spans, spliced
from qemu_vmdk_snap.errors import VmdkSnapError
from qemu_vmdk_snap.light import Final

_END: Final = "/."
_DOMAINS: Final = ("domain", "inactiveDomain")

VolumePath = Callable[[str, str], Path]


def in_form(text: str, volume_path: VolumePath | None = None) -> str:
    """Return the XML of a snapshot in the form; unchanged, byte for byte, where it has it or is none of ours."""
    raw = text.encode()
    ours = _ours(raw)
    if not ours:
        return text
    raw = spliced(raw, spans(raw, ["domainsnapshot", "disks", "disk"]), lambda disk: _mark(disk, ours))
    for name in _DOMAINS:
        places = spans(raw, ["domainsnapshot", name, "devices", "disk"])
        raw = spliced(raw, places, lambda disk: _as_device(disk, ours, volume_path))
    return raw.decode()


def out_of_form(text: str) -> str:
    """Return the XML of a snapshot whose domains have files again for disks that took part; any other as it is."""
    raw = text.encode()
    ours = _ours(raw)
    for name in _DOMAINS if ours else ():
        raw = spliced(raw, spans(raw, ["domainsnapshot", name, "devices", "disk"]), lambda disk: _as_file(disk, ours))
    return raw.decode()


def domain_out_of_form(domain_xml: bytes, snapshot_xml: bytes) -> bytes:
    """Return the domain inside a snapshot as it is defined: the disks that took part are files again."""
    ours = _ours(snapshot_xml)
    root = domain_xml[1:].split(None, 1)[0].split(b">", 1)[0].decode()
    return spliced(domain_xml, spans(domain_xml, [root, "devices", "disk"]), lambda disk: _as_file(disk, ours))


def _ours(raw: bytes) -> set[str]:
    """Return the targets of the disks that took part, if the snapshot is one of ours: a VMDK overlay on each."""
    found = set()
    for start, end in spans(raw, ["domainsnapshot", "disks", "disk"]):
        disk = ET.fromstring(raw[start:end])
        driver, source = disk.find("driver"), disk.find("source")
        if disk.get("snapshot") != "external":
            continue
        if driver is None or driver.get("type") != "vmdk" or source is None or not source.get("file"):
            return set()
        found.add(disk.get("name", ""))
    return found


def _mark(disk: ET.Element, ours: Collection[str]) -> bool:
    source = disk.find("source")
    if disk.get("name") not in ours or source is None or source.get("file", "").endswith(_END):
        return False
    source.set("file", source.get("file", "") + _END)
    return True


def _as_device(disk: ET.Element, ours: Collection[str], volume_path: VolumePath | None) -> bool:
    source = disk.find("source")
    if source is None or _target(disk) not in ours:
        return False
    if disk.get("type") == "volume" and volume_path is not None:
        try:
            name = str(volume_path(source.attrib.get("pool", ""), source.attrib.get("volume", "")))
        except VmdkSnapError:
            return False  # registered as it is; the next command tries again
        for key in ("pool", "volume", "mode"):
            source.attrib.pop(key, None)
    elif disk.get("type") == "file":
        name = source.attrib.pop("file", "")
    else:
        return False
    if not name:
        return False
    disk.set("type", "block")
    source.set("dev", name)
    return True


def _as_file(disk: ET.Element, ours: Collection[str]) -> bool:
    source = disk.find("source")
    if source is None or disk.get("type") != "block" or _target(disk) not in ours or not source.get("dev"):
        return False
    disk.set("type", "file")
    source.set("file", source.attrib.pop("dev"))
    return True


def _target(disk: ET.Element) -> str:
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")
