"""Writing the chain of a disk again, in the XML of a domain or of a snapshot, where it differs from its files."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.domain.xml.splice import spans, spliced

_PLACES: Final = (
    ["domain", "devices", "disk"],
    ["domainsnapshot", "domain", "devices", "disk"],
    ["domainsnapshot", "inactiveDomain", "devices", "disk"],
)


def with_chains(text: str, chains: Mapping[str, Sequence[Path]]) -> str:
    """Return the XML with these files on the disks named by target, the top first; each chain is closed at its end."""
    raw = text.encode()
    for path in _PLACES:
        raw = spliced(raw, spans(raw, path), lambda disk: _respell(disk, chains))
    return raw.decode()


def _respell(disk: ET.Element, chains: Mapping[str, Sequence[Path]]) -> bool:
    target, source = disk.find("target"), disk.find("source")
    chain = chains.get("" if target is None else target.get("dev", ""))
    if not chain or source is None:
        return False
    driver = disk.find("driver")
    if driver is not None:
        driver.set("type", "vmdk")
    disk.set("type", "file")
    for name in ("pool", "volume", "mode", "index", "dev"):
        source.attrib.pop(name, None)
    source.set("file", str(chain[0]))
    for old in disk.findall("backingStore"):
        disk.remove(old)
    store = above = ET.Element("backingStore")
    for path in chain[1:]:
        above.set("type", "file")
        ET.SubElement(above, "format", {"type": "vmdk"})
        ET.SubElement(above, "source", {"file": str(path)})
        above = ET.SubElement(above, "backingStore")
    disk.insert(list(disk).index(source) + 1, store)
    return True
