"""The disks that take no part in a revert: each keeps its current element, and no frozen file becomes writable.

Also what a revert replaces of the current XML, for the report.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection

from qemu_vmdk_snap.domain.xml import spans

_DISK = ["domain", "devices", "disk"]
_IDENTITY = ("name", "uuid", "metadata", "devices")


def with_disks_of_today(then: str, today: str, taking_part: Collection[str]) -> str:
    """Return the XML `then` with the current element of each disk that takes no part and still exists, by target."""
    now = {target: text for target, text in _disks(today) if target not in taking_part}
    raw = then.encode()
    pieces, last = [], 0
    for start, end in spans(raw, _DISK):
        text = now.get(_target(raw[start:end]))
        if text is not None:
            pieces += [raw[last:start], text]
            last = end
    return b"".join([*pieces, raw[last:]]).decode()


def replaced_by(then: str, today: str) -> list[str]:
    """Return what only the current XML has, not `then`: names of elements, and targets; disks in both are equal."""
    old, new = ET.fromstring(today), ET.fromstring(then)
    found = {tag for tag in _tags(old) | _tags(new) if tag not in _IDENTITY and _texts(old, tag) != _texts(new, tag)}
    devices_old, devices_new = old.find("devices"), new.find("devices")
    if devices_old is not None and devices_new is not None:
        tags = (_tags(devices_old) | _tags(devices_new)) - {"disk"}
        found |= {tag for tag in tags if _texts(devices_old, tag) != _texts(devices_new, tag)}
    gone = {target for target, _ in _disks(today)} - {target for target, _ in _disks(then)}
    return [*sorted(found), *(f"disk {target}" for target in sorted(gone))]


def _disks(text: str) -> list[tuple[str, bytes]]:
    raw = text.encode()
    return [(_target(raw[start:end]), raw[start:end]) for start, end in spans(raw, _DISK)]


def _target(element: bytes) -> str:
    target = ET.fromstring(element).find("target")
    return "" if target is None else target.get("dev", "")


def _tags(element: ET.Element) -> set[str]:
    return {child.tag for child in element}


def _texts(element: ET.Element, tag: str) -> Counter[str]:
    return Counter(ET.canonicalize(ET.tostring(child), strip_text=True) for child in element.findall(tag))
