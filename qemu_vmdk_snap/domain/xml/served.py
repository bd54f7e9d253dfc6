"""Disks that a server of ours serves over NBD: the same domain seen in two ways.

libvirt knows such a disk as a raw network disk. What is behind it is told in the domain's own metadata, so that it goes
where the XML goes, survives `virsh edit`, and is found while the server is stopped:

    <served:disks xmlns:served="..." owner="64055:64055">
      <disk target="vda" socket="/run/.../UUID-vda.sock" control="/run/.../UUID-vda.sock.control" type="file">
        <driver name="qemu" type="vmdk"/><source file="/img/a.vmdk"/><backingStore/>
      </disk>
    </served:disks>

The *direct view* has the two exchanged: the `<disk>` of the domain is the VMDK file with its chain, and the note keeps
the network disk. All that works on domain XML works on the direct view; `served_view` is what libvirt gets. Each is the
other exchanged back, so that what a user edits in either stays.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator
from pathlib import Path

from qemu_vmdk_snap.domain.xml import Disk, list_disks, spans
from qemu_vmdk_snap.light import Final, dataclass

NAMESPACE: Final = "urn:qemu-vmdk-snap:served:1"
PREFIX: Final = "served"
_NOTES: Final = ["domain", "metadata", "served:disks"]
_DISK: Final = ["domain", "devices", "disk"]
_EXCHANGED: Final = ("driver", "source", "backingStore")
_NOT_FOR_NBD: Final = ("io",)
"""Attributes of `<driver>` that are about a file."""


@dataclass(frozen=True, slots=True)
class ServedDisk:
    """A disk that is served, and where."""

    target: str
    socket: Path
    control: Path
    """The server's control socket."""


def served_disks(text: str) -> dict[str, ServedDisk]:
    """Return the served disks of a domain's XML, in either view, by target."""
    notes = _notes(text.encode())
    if notes is None:
        return {}
    pairs = ((note, element) for element in _elements(text) for note in notes if _belongs(note, element))
    return {_target(element): _told(note, _target(element)) for note, element in pairs}


def owner_of(text: str) -> str | None:
    """Return `UID:GID` of the QEMU process, which must reach the sockets; None where it is whoever runs the server."""
    notes = _notes(text.encode())
    return None if notes is None else notes.get("owner")


def direct_view(text: str) -> str:
    """Return the XML with each served disk as the VMDK file that is behind it; other texts are returned as they are."""
    return _exchanged(text, "network") if PREFIX in text else text


def served_view(text: str) -> str:
    """Return the XML as libvirt is to know it; other texts are returned as they are."""
    return _exchanged(text, "direct") if PREFIX in text else text


def behind(text: str) -> dict[str, Disk]:
    """Return what is behind each served disk, by target: a `Disk` with its file and its chain."""
    there = served_disks(text)
    return {disk.target: disk for disk in list_disks(direct_view(text)) if disk.target in there}


def with_served(direct: str, disks: Collection[ServedDisk], owner: str | None) -> str:
    """Return the direct view of a domain that has these disks served, besides those that are served already."""
    notes = _notes(direct.encode())
    notes = ET.Element("disks") if notes is None else notes
    notes.attrib.update({} if owner is None else {"owner": owner})
    for disk in disks:
        notes.append(_note_of(disk, _element_of(direct, disk.target)))
    return _with_notes(direct, notes)


def without_served(direct: str, targets: Collection[str]) -> str:
    """Return the direct view of a domain that has these disks served no more."""
    notes = _notes(direct.encode())
    if notes is None:
        return direct
    for note in list(notes):
        if note.get("target") in targets:
            notes.remove(note)
    return _with_notes(direct, notes)


def with_notes_of(view: str, other: str, besides: Collection[str] = ()) -> str:
    """Return a view with the notes of `other`, the same kind of view; its own stay for the targets `besides`."""
    mine, theirs = _notes(view.encode()), _notes(other.encode())
    if mine is None and theirs is None:
        return view
    notes = ET.Element("disks", {} if theirs is None else theirs.attrib)
    notes.attrib.update({} if mine is None or theirs is not None else mine.attrib)
    keep = [note for note in ([] if mine is None else mine) if note.get("target") in besides]
    kept = {note.get("target") for note in keep}
    notes.extend([*keep, *(note for note in ([] if theirs is None else theirs) if note.get("target") not in kept)])
    return _with_notes(view, notes)


def notes_element(text: str) -> str | None:
    """Return the notes as libvirt's function for metadata takes them, without their namespace; None for none."""
    notes = _notes(text.encode())
    return None if notes is None else ET.tostring(notes, encoding="unicode")


def _exchanged(text: str, kind: str) -> str:
    """Exchange note and disk where the disk is of `kind`: `network`, or `direct` for any other type."""
    raw = text.encode()
    notes = _notes(raw)
    if notes is None:
        return text
    pieces, last = [], 0
    found: set[int] = set()
    for start, end in spans(raw, _DISK):
        element = ET.fromstring(raw[start:end])
        note = next((note for note in notes if id(note) not in found and _belongs(note, element)), None)
        if note is None:
            continue
        found.add(id(note))
        if (element.get("type") == "network") is not (kind == "network"):
            continue
        _exchange(note, element)
        before = raw[:start]
        ET.indent(element, level=(len(before) - len(before.rstrip(b" "))) // 2)
        pieces += [raw[last:start], ET.tostring(element, encoding="unicode").encode()]
        last = end
    for note in list(notes):
        if id(note) not in found:
            notes.remove(note)  # its disk is gone, or has been made another one by hand
    return _with_notes(b"".join([*pieces, raw[last:]]).decode(), notes)


def _belongs(note: ET.Element, element: ET.Element) -> bool:
    """Return whether the note is about the disk: a network disk is known by its socket, another one by its target."""
    if element.get("type") == "network":
        host = element.find("source/host")
        return note.get("type") != "network" and host is not None and host.get("socket") == note.get("socket")
    return note.get("type") == "network" and note.get("target") == _target(element)


def _exchange(note: ET.Element, element: ET.Element) -> None:
    note.set("target", _target(element))
    mine, theirs = note.get("type", "file"), element.get("type", "file")
    note.set("type", theirs)
    element.set("type", mine)
    taken = [child for name in _EXCHANGED if (child := element.find(name)) is not None]
    put = [child for name in _EXCHANGED if (child := note.find(name)) is not None]
    for child in taken:
        element.remove(child)
    for child in put:
        note.remove(child)
    for part in (part for child in (*taken, *put) for part in child.iter()):
        part.tail = None
        part.text = (part.text or "").strip() or None
    note.extend(taken)
    for place, child in enumerate(put):
        element.insert(place, child)


def _note_of(disk: ServedDisk, element: ET.Element) -> ET.Element:
    """Return the note of a disk that is to be served: the network disk that libvirt will know."""
    note = ET.Element("disk", {"target": disk.target, "socket": str(disk.socket), "control": str(disk.control)})
    note.set("type", "network")
    driver = element.find("driver")
    words = {} if driver is None else {name: value for name, value in driver.items() if name not in _NOT_FOR_NBD}
    # Not cached by the host, which the server's reads and writes are already: only so is it safe to migrate.
    words = {"name": "qemu", "cache": "none"} | words | {"type": "raw", "error_policy": "stop", "rerror_policy": "stop"}
    ET.SubElement(note, "driver", words)
    source = ET.SubElement(note, "source", {"protocol": "nbd"})
    ET.SubElement(source, "host", {"transport": "unix", "socket": str(disk.socket)})
    return note


def _told(note: ET.Element, target: str) -> ServedDisk:
    socket = note.get("socket", "")
    return ServedDisk(target, Path(socket), Path(note.get("control", f"{socket}.control")))


def _elements(text: str) -> Iterator[ET.Element]:
    raw = text.encode()
    for start, end in spans(raw, _DISK):
        yield ET.fromstring(raw[start:end])


def _element_of(text: str, target: str) -> ET.Element:
    return next(element for element in _elements(text) if _target(element) == target)


def _target(element: ET.Element) -> str:
    target = element.find("target")
    return "" if target is None else target.get("dev", "")


def _notes(raw: bytes) -> ET.Element | None:
    """Return the notes; libvirt keeps the prefix as we wrote it."""
    if NAMESPACE.encode() not in raw:
        return None
    for start, end in spans(raw, _NOTES):
        if NAMESPACE.encode() in raw[start:end]:
            notes = ET.fromstring(raw[start:end])
            for part in notes.iter():  # in a live XML all of it bears the namespace: libvirt has put it there
                part.tag = part.tag.rpartition("}")[2]
            return notes
    return None


def _with_notes(text: str, notes: ET.Element) -> str:
    """Return the XML with these notes and no others; the rest of it stays byte for byte."""
    raw = text.encode()
    for start, end in reversed(spans(raw, _NOTES)):
        if NAMESPACE.encode() in raw[start:end]:
            if len(notes):
                return (raw[:start] + _spelt(notes) + raw[end:]).decode()
            raw = raw[:start] + raw[end:]
    if not len(notes):
        return raw.decode()
    found = spans(raw, ["domain", "metadata"])
    if found and raw[slice(*found[0])].endswith(b"</metadata>"):
        at = found[0][1] - len(b"</metadata>")
        return (raw[:at] + _spelt(notes) + raw[at:]).decode()
    raw = raw[: found[0][0]] + raw[found[0][1] :] if found else raw  # an empty `<metadata/>`
    at = spans(raw, ["domain", "name"])[0][1]
    return (raw[:at] + b"\n  <metadata>" + _spelt(notes) + b"</metadata>" + raw[at:]).decode()


def _spelt(notes: ET.Element) -> bytes:
    for note in notes:
        note.tail = None
    notes.text = None
    inner = "".join(ET.tostring(note, encoding="unicode") for note in notes)
    owner = notes.get("owner")
    told = "" if owner is None else f' owner="{owner}"'  # numbers and a colon
    return f'<{PREFIX}:disks xmlns:{PREFIX}="{NAMESPACE}"{told}>{inner}</{PREFIX}:disks>'.encode()
