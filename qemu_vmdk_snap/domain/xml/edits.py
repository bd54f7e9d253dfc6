"""Undoing a change of the disks in an XML that was edited since: what the change did not touch stays."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

from qemu_vmdk_snap.domain.xml import parse_snapshot, spans, with_description

_DISK = ["domain", "devices", "disk"]
_CHANGED = ("source", "backingStore")


def with_disks_back(today: str, before: str, after: str, tops: Mapping[Path, str]) -> str:
    """Return the XML `today` with the files that the disks had `before`.

    `tops` are the new tops of the change, and the target that each disk had then. A disk that is still as it is in
    `after` gets its old element, byte for byte; of one that was edited only the files change.
    """
    old, new = _by_target(before), _by_target(after)
    raw = today.encode()
    pieces, last = [], 0
    for start, end in spans(raw, _DISK):
        source = ET.fromstring(raw[start:end]).find("source")
        target = None if source is None else tops.get(Path(source.get("file", "")))
        if target is None or target not in old:
            continue
        unedited = target in new and same_xml(raw[start:end].decode(), new[target].decode())
        pieces += [raw[last:start], old[target] if unedited else _on_files_of(raw[start:end], old[target])]
        last = end
    return b"".join([*pieces, raw[last:]]).decode()


def same_xml(one: str, other: str) -> bool:
    """Return whether two texts are the same XML, however it is indented and quoted."""
    return ET.canonicalize(one, strip_text=True) == ET.canonicalize(other, strip_text=True)


def keeping_description(recorded: str, today: str) -> str:
    """Return the recorded XML of a snapshot with the description that the snapshot has today."""
    description = parse_snapshot(today).description
    return recorded if parse_snapshot(recorded).description == description else with_description(recorded, description)


def _by_target(domain_xml: str) -> dict[str, bytes]:
    raw = domain_xml.encode()
    found = {}
    for start, end in spans(raw, _DISK):
        target = ET.fromstring(raw[start:end]).find("target")
        if target is not None:
            found[target.get("dev", "")] = raw[start:end]
    return found


def _on_files_of(edited: bytes, old: bytes) -> bytes:
    element, model = ET.fromstring(edited), ET.fromstring(old)
    element.set("type", model.get("type", "file"))
    place = 0
    for name in _CHANGED:
        there = element.find(name)
        if there is not None:
            place = list(element).index(there)
            element.remove(there)
    place = min(place, len(element))
    for name in reversed(_CHANGED):
        wanted = model.find(name)
        if wanted is not None:
            element.insert(place, wanted)
    return ET.tostring(element, encoding="unicode").encode()
