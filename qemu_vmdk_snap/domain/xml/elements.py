"""Single elements of an XML text, changed in place: all else stays byte for byte what libvirt gave us."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence

from qemu_vmdk_snap.domain.xml import VolumePath
from qemu_vmdk_snap.domain.xml.splice import spans, spliced

_DISKS = (
    ["domain", "devices", "disk"],
    ["domainsnapshot", "domain", "devices", "disk"],
    ["domainsnapshot", "inactiveDomain", "devices", "disk"],
)


def each_element(text: str, path: Sequence[str], change: Callable[[ET.Element], bool]) -> str:
    """Return the text with every element of the `path` as `change` leaves it, untouched where it returns False."""
    raw = text.encode()
    return spliced(raw, spans(raw, list(path)), change).decode()


def without(text: str, path: Sequence[str], doomed: Callable[[ET.Element], bool]) -> str:
    """Return the text without the elements of the `path` of which `doomed` is true."""
    raw = text.encode()
    pieces, last = [], 0
    for start, end in spans(raw, list(path)):
        if doomed(ET.fromstring(raw[start:end])):
            pieces.append(raw[last:start])
            last = end
    return b"".join([*pieces, raw[last:]]).decode()


def with_files_of_volumes(text: str, volume_path: VolumePath) -> str:
    """Return the XML of a domain or snapshot whose disks are files where they were volumes of a pool.

    Raises:
        DomainError: a volume cannot be found.
    """

    def change(element: ET.Element) -> bool:
        source = element.find("source")
        if element.get("type") != "volume" or source is None:
            return False
        path = volume_path(source.get("pool", ""), source.get("volume", ""))
        for name in ("pool", "volume", "mode"):
            source.attrib.pop(name, None)
        element.set("type", "file")
        source.set("file", str(path))
        return True

    for disks in _DISKS:
        text = each_element(text, disks, change)
    return text
