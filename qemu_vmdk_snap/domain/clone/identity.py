"""The XML of a clone: another name, UUID, MAC addresses and UEFI variables; the rest is that of the original."""

from __future__ import annotations

import secrets
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

from qemu_vmdk_snap.domain.xml import relink, root_of, with_domain_name
from qemu_vmdk_snap.domain.xml.elements import each_element
from qemu_vmdk_snap.domain.xml.kept import with_kept_branches
from qemu_vmdk_snap.domain.xml.nvram import with_nvram
from qemu_vmdk_snap.domain.xml.served import served_disks, without_served

_OUI: Final = "52:54:00"
"""What QEMU and libvirt begin the addresses with that they make up."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a clone from its original."""

    name: str
    uuid: str
    macs: tuple[str, ...]
    """One for each network interface, in their order."""
    nvram: Path | None
    """Its file of UEFI variables; None where the original has none."""


def new_identity(domain_xml: str, name: str, nvram: Path | None) -> Identity:
    """Return an identity for a clone of the domain."""
    count = len(root_of(domain_xml).findall("./devices/interface"))
    return Identity(name, str(uuid4()), tuple(_new_mac() for _ in range(count)), nvram)


def with_identity(domain_xml: str, new: Identity) -> str:
    """Return the XML of the domain under the new identity."""
    text = with_kept_branches(with_domain_name(domain_xml, new.name), {})
    text = without_served(text, served_disks(text))  # the sockets are those of the original
    text = each_element(text, ["domain", "uuid"], lambda element: _say(element, new.uuid))
    entry = ["domain", "sysinfo", "system", "entry"]
    text = each_element(text, entry, lambda element: element.get("name") == "uuid" and _say(element, new.uuid))
    text = each_element(text, ["domain", "genid"], lambda element: _say(element, str(uuid4())))
    macs = iter(new.macs)

    def interface(element: ET.Element) -> bool:
        mac = element.find("mac")
        if mac is None:
            mac = ET.Element("mac")
            element.insert(0, mac)
        mac.set("address", next(macs))
        return True

    text = each_element(text, ["domain", "devices", "interface"], interface)
    if new.nvram is not None:
        return with_nvram(text, new.nvram)
    return each_element(text, ["domain", "os", "nvram"], lambda element: _say(element, ""))


def with_copies(domain_xml: str, copies: Mapping[Path, Path]) -> str:
    """Return the XML with each of these tops, and the chain below it, replaced by one file without a parent."""

    def closed(element: ET.Element) -> bool:
        source = element.find("source")
        if source is None or Path(source.get("file", "")) not in copies.values():
            return False
        store = element.find("backingStore")
        if store is not None:
            element.remove(store)
        element.insert(list(element).index(source) + 1, ET.Element("backingStore"))
        return True

    text = relink(domain_xml, lambda files: [copies[files[0]]] if files[0] in copies else files)
    return each_element(text, ["domain", "devices", "disk"], closed)


def shared_with_original(domain_xml: str) -> list[str]:
    """Return what both would use at once, in words: what a clone cannot be given another one of."""
    root = root_of(domain_xml)
    found = [f"the {device.get('type')} host device" for device in root.findall("./devices/hostdev")]
    for kind in ("serial", "parallel", "console", "channel"):
        for element in root.findall(f"./devices/{kind}/source"):
            path = element.get("path")
            if path and path not in found:
                found.append(path)
    found += [share.get("dir", "") for share in root.findall("./devices/filesystem/source") if share.get("dir")]
    graphics = [one for one in root.findall("./devices/graphics") if one.get("autoport") == "no"]
    return list(dict.fromkeys(found + [f"the {one.get('type')} port {one.get('port')}" for one in graphics]))


def _say(element: ET.Element, text: str) -> bool:
    element.text = text
    return True


def _new_mac() -> str:
    return ":".join([_OUI, *(f"{byte:02x}" for byte in secrets.token_bytes(3))])
