"""Domain and snapshot XML, as pure functions from text to text.

A changed domain is spliced, not rewritten: only the `<disk>` elements that change are replaced in the text, so that
everything else (namespaces, qemu:commandline, metadata of other programs) stays byte for byte what libvirt gave us.
Sources: libvirt's formatdomain.html (disks, backingStore) and formatsnapshot.html.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qemu_vmdk_snap.domain.xml.form import domain_out_of_form
from qemu_vmdk_snap.domain.xml.nvram import nvram_out_of_snapshot
from qemu_vmdk_snap.domain.xml.splice import spans as spans
from qemu_vmdk_snap.domain.xml.splice import spliced
from qemu_vmdk_snap.errors import DomainError
from qemu_vmdk_snap.light import NamedTuple, dataclass, field

VolumePath = Callable[[str, str], Path]
"""(pool, volume) -> the file of a storage volume."""


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk of a domain. `refusal` says why it can take no part in a snapshot; None when it can."""

    target: str
    path: Path | None
    """Its file: the top of the chain. None where there is none (network, an empty drive)."""
    backing: tuple[Path, ...] = ()
    """The files below it, as far as the XML spells them out, nearest first."""
    closed: bool = False
    """Whether the XML spells out the chain down to its end."""
    refusal: str | None = None
    opted_out: bool = False
    """Whether the domain says `snapshot='no'` of it: then it takes part only when it is named."""


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """One disk in the XML of a snapshot."""

    target: str
    mode: str
    """`external`, `internal`, `manual` or `no`."""
    overlay: Path | None
    """The file that was put on top of the frozen one."""
    frozen: Path | None
    """The file that the domain had when the snapshot was made."""
    backing: tuple[Path, ...] = ()
    """The files below the frozen one, as far as the domain's XML spelt them out."""
    format: str | None = field(default=None, compare=False)
    """Of the overlay, as the XML says."""


@dataclass(frozen=True, slots=True)
class SnapshotXml:
    """What the XML of a snapshot says."""

    name: str
    state: str
    creation_time: int
    """Seconds since 1970."""
    description: str | None = None
    parent: str | None = None
    memory: str = "no"
    disks: tuple[SnapshotDisk, ...] = field(default=())
    memory_file: Path | None = None
    """Where the guest's memory of then is, if the snapshot has it."""


class NewTop(NamedTuple):
    """How a disk changes: its new top, and the files of the chain below it, nearest first."""

    overlay: Path
    chain: Sequence[Path]


def root_of(text: str) -> ET.Element:
    """Return the root element of an XML text.

    Raises:
        DomainError: it is not XML.
    """
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:  # ValueError: half of a pair of UTF-16
        raise DomainError("XML", f"cannot be read: {error}") from error


def _seconds(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise DomainError("XML", f"creationTime = {text[:40]!r}: must be a number of seconds") from error


def list_disks(domain_xml: str, volume_path: VolumePath | None = None) -> list[Disk]:
    """Return every disk of the domain, in the order of the XML; those that can take no part have a `refusal`."""
    return [_read_disk(element, volume_path) for element in root_of(domain_xml).findall("./devices/disk")]


def stack(domain_xml: str, tops: Mapping[str, NewTop]) -> str:
    """Return the XML with a new top on the disks named by target, and the whole chain below it spelt out.

    libvirt refuses to start a VMDK chain of three and more links unless the format of each is in the XML.

    Raises:
        KeyError: the domain has no disk with such a target.
    """
    raw = domain_xml.encode()
    missing = dict(tops)
    pieces, last = [], 0
    for start, end in _disk_spans(raw):
        element = ET.fromstring(raw[start:end])
        top = missing.pop(_target(element), None)
        if top is not None:
            pieces += [raw[last:start], _stacked(element, top, raw[:start])]
            last = end
    if missing:
        raise KeyError(next(iter(missing)))
    return b"".join([*pieces, raw[last:]]).decode()


def relink(text: str, change: Callable[[Sequence[Path]], Sequence[Path]]) -> str:
    """Return the XML of a domain or a snapshot with other files on its disks.

    `change` gets the files of a disk, the top first, as far as they are spelt out, and returns those that take their
    place. The overlay that a snapshot names is a top, too.
    """
    raw = text.encode()
    for path in (
        ["domain", "devices", "disk"],
        ["domainsnapshot", "domain", "devices", "disk"],
        ["domainsnapshot", "inactiveDomain", "devices", "disk"],
        ["domainsnapshot", "disks", "disk"],
    ):
        raw = spliced(raw, spans(raw, path), lambda element: _relinked(element, change))
    return raw.decode()


def with_parent(snapshot_text: str, parent: str | None) -> str:
    """Return the XML of a snapshot with another parent, or with none."""
    from xml.sax.saxutils import escape

    return _with_element(
        snapshot_text, "parent", None if parent is None else f"<parent><name>{escape(parent)}</name></parent>"
    )


def with_name(snapshot_text: str, name: str) -> str:
    """Return the XML of a snapshot under another name."""
    from xml.sax.saxutils import escape

    return _with_element(snapshot_text, "name", f"<name>{escape(name)}</name>")


def with_description(snapshot_text: str, description: str | None) -> str:
    """Return the XML of a snapshot with another description, or with none."""
    from xml.sax.saxutils import escape

    element = None if description is None else f"<description>{escape(description)}</description>"
    return _with_element(snapshot_text, "description", element)


def with_domain_name(domain_xml: str, name: str) -> str:
    """Return the XML of a domain under another name."""
    from xml.sax.saxutils import escape

    raw = domain_xml.encode()
    start, end = spans(raw, ["domain", "name"])[0]
    return (raw[:start] + f"<name>{escape(name)}</name>".encode() + raw[end:]).decode()


def _with_element(snapshot_text: str, name: str, element: str | None) -> str:
    """Return the text with another child `name` of its root, or without it; all else stays byte for byte."""
    raw, new = snapshot_text.encode(), (element or "").encode()
    for start, end in spans(raw, ["domainsnapshot", name]):
        return (raw[:start] + new + raw[end:]).decode()
    at = raw.index(b">") + 1
    return (raw[:at] + new + raw[at:]).decode()


def _relinked(element: ET.Element, change: Callable[[Sequence[Path]], Sequence[Path]]) -> bool:
    """Change the files of a `<disk>` element; return whether anything is different now."""
    source = element.find("source")
    name = _named_by(source)
    if source is None or not name:
        return False
    below, closed = _backing(element)
    files = [Path(name), *below]
    changed = list(change(files))
    if changed == files or not changed:
        return False
    source.set("file" if source.get("file") else "dev", str(changed[0]))
    source.attrib.pop("index", None)
    old = element.find("backingStore")
    if old is not None:
        place = list(element).index(old)
        element.remove(old)
        store = _chain_element(changed[1:])
        if not closed:
            _open_end(store)
        element.insert(place, store)
    return True


def _open_end(store: ET.Element) -> None:
    """Remove the empty `<backingStore/>` that ends the chain."""
    inner = store.find("backingStore")
    while inner is not None and len(inner):
        store, inner = inner, inner.find("backingStore")
    if inner is not None:
        store.remove(inner)


def snapshot_xml(snapshot: SnapshotXml, domain_xml: str) -> str:
    """Return the XML that registers `snapshot`, with the domain as it was inside."""
    from xml.sax.saxutils import escape, quoteattr  # imports urllib: too slow for a hook at a guest's start

    lines = ["<domainsnapshot>", f"  <name>{escape(snapshot.name)}</name>"]
    if snapshot.description is not None:
        lines.append(f"  <description>{escape(snapshot.description)}</description>")
    lines.append(f"  <state>{snapshot.state}</state>")
    if snapshot.parent is not None:
        lines.append(f"  <parent><name>{escape(snapshot.parent)}</name></parent>")
    lines += [
        f"  <creationTime>{snapshot.creation_time}</creationTime>",
        f"  <memory snapshot='{snapshot.memory}'{_memory_file(snapshot, quoteattr)}/>",
        "  <disks>",
    ]
    for disk in snapshot.disks:
        head = f"    <disk name={quoteattr(disk.target)} snapshot={quoteattr(disk.mode)}"
        if disk.overlay is None:
            lines.append(f"{head}/>")
            continue
        source = quoteattr(str(disk.overlay))
        lines.append(f"{head} type='file'><driver type='vmdk'/><source file={source}/></disk>")
    lines += ["  </disks>", domain_xml.strip(), "</domainsnapshot>", ""]
    return "\n".join(lines)


def _memory_file(snapshot: SnapshotXml, quoted: Callable[[str], str]) -> str:
    return "" if snapshot.memory_file is None else f" file={quoted(str(snapshot.memory_file))}"


def parse_snapshot(text: str, volume_path: VolumePath | None = None) -> SnapshotXml:
    """Return the content of a snapshot's XML, whichever program made the snapshot."""
    root = root_of(text)
    domain = root.find("domain")
    disks = [] if domain is None else domain.findall("./devices/disk")
    frozen = {_target(element): (_file_of(element, volume_path), tuple(_backing(element)[0])) for element in disks}
    memory = root.find("memory")
    return SnapshotXml(
        name=root.findtext("name", ""),
        state=root.findtext("state", "shutoff"),
        creation_time=_seconds(root.findtext("creationTime", "0")),
        description=root.findtext("description"),
        parent=root.findtext("parent/name"),
        memory="no" if memory is None else memory.get("snapshot", "no"),
        disks=tuple(_snapshot_disk(element, frozen) for element in root.findall("./disks/disk")),
        memory_file=None if memory is None or not memory.get("file") else Path(memory.get("file", "")),
    )


def domain_of(snapshot_text: str) -> str:
    """Return the XML of the domain inside that of a snapshot; the persistent one, if both are there.

    It is byte for byte what was registered, but for the disks that took part: they are files again (see `form`); and
    for the UEFI variables, whose file is the one that is written (see `nvram`).

    Raises:
        KeyError: there is none.
    """
    raw = snapshot_text.encode()
    found = spans(raw, ["domainsnapshot", "inactiveDomain"]) or spans(raw, ["domainsnapshot", "domain"])
    if not found:
        raise KeyError("domain")
    text = nvram_out_of_snapshot(domain_out_of_form(raw[slice(*found[0])], raw)).decode()
    if text.startswith("<inactiveDomain"):
        text = "<domain" + text.removeprefix("<inactiveDomain").removesuffix("</inactiveDomain>") + "</domain>"
    return text


def files_in(text: str) -> set[Path]:
    """Return every file that a domain's or snapshot's XML names as the source of a disk, at any depth."""
    names = map(_named_by, root_of(text).iterfind(".//disk//source"))
    return {Path(name) for name in names if name}


def _read_disk(element: ET.Element, volume_path: VolumePath | None) -> Disk:
    path = _file_of(element, volume_path)
    backing, closed = _backing(element)
    return Disk(
        _target(element), path, tuple(backing), closed, _refusal(element, path), element.get("snapshot") == "no"
    )


def _refusal(element: ET.Element, path: Path | None) -> str | None:
    kind, device = element.get("type", ""), element.get("device", "disk")
    driver = element.find("driver")
    image_format = "raw" if driver is None else driver.get("type", "raw")
    source = element.find("source")
    reasons = (
        (device != "disk", f"is a {device}, not a disk"),
        (kind not in ("file", "volume"), f"is of type {kind!r}, not a file"),
        (image_format != "vmdk", f"has the format {image_format}, not vmdk"),
        (path is None, "has no file"),
        (element.find("readonly") is not None, "is read-only"),
        (element.find("shareable") is not None, "is shared with other domains"),
        (element.find("transient") is not None, "is transient: its changes are discarded at shutdown"),
        (path is not None and not path.is_absolute(), "has a relative path"),
        (element.find(".//encryption") is not None, "is encrypted"),
        (source is not None and source.find("slices") is not None, "is a slice of a file"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _target(element: ET.Element) -> str:
    target = element.find("target")
    return "" if target is None else target.get("dev", "")


def _file_of(element: ET.Element, volume_path: VolumePath | None) -> Path | None:
    source = element.find("source")
    if source is None:
        return None
    if element.get("type") == "volume" and volume_path is not None:
        return volume_path(source.get("pool", ""), source.get("volume", ""))
    name = _named_by(source)
    return Path(name) if name else None


def _named_by(source: ET.Element | None) -> str | None:
    """Return the file that a `<source>` names: as a file, or as the device of a disk of type `block`."""
    return None if source is None else source.get("file") or source.get("dev")


def _backing(element: ET.Element) -> tuple[list[Path], bool]:
    """Return the files of the nested `<backingStore>` elements, and whether an empty one ends them."""
    files: list[Path] = []
    store = element.find("backingStore")
    while store is not None and store.get("type") in ("file", "block"):
        files.append(Path(_named_by(store.find("source")) or ""))
        store = store.find("backingStore")
    return files, store is not None and not len(store) and store.get("type") is None


def _disk_spans(raw: bytes) -> list[tuple[int, int]]:
    """Return where in the text each disk of the domain begins and ends."""
    return spans(raw, ["domain", "devices", "disk"])


def _stacked(element: ET.Element, top: NewTop, before: bytes) -> bytes:
    """Return the `<disk>` element with the new top, indented as the text before it."""
    source = element.find("source")
    if source is None:
        raise KeyError(_target(element))
    known, closed = _backing(element)
    old_store = element.find("backingStore")
    keep = closed and known == list(top.chain[1:])  # spelt out already: whatever it says of each file stays
    below = old_store if keep else _chain_element(top.chain[1:])
    store = ET.Element("backingStore", {"type": "file"})
    ET.SubElement(store, "format", {"type": "vmdk"})
    frozen = ET.SubElement(store, "source", {"file": str(top.chain[0])})
    frozen.extend(source)  # labels given to the file by hand hold for the new top and for the frozen one
    if old_store is not None:
        element.remove(old_store)
    if below is not None:
        store.append(below)
    element.set("type", "file")
    for name in ("pool", "volume", "mode", "index", "dev"):
        source.attrib.pop(name, None)
    source.set("file", str(top.overlay))
    element.insert(list(element).index(source) + 1, store)
    margin = len(before) - len(before.rstrip(b" "))
    element.tail = None
    ET.indent(element, level=margin // 2)
    return ET.tostring(element, encoding="unicode").encode()


def _chain_element(chain: Sequence[Path]) -> ET.Element:
    if not chain:
        return ET.Element("backingStore")
    store = ET.Element("backingStore", {"type": "file"})
    ET.SubElement(store, "format", {"type": "vmdk"})
    ET.SubElement(store, "source", {"file": str(chain[0])})
    store.append(_chain_element(chain[1:]))
    return store


def _snapshot_disk(element: ET.Element, frozen: Mapping[str, tuple[Path | None, tuple[Path, ...]]]) -> SnapshotDisk:
    target, mode = element.get("name", ""), element.get("snapshot", "external")
    name = _named_by(element.find("source"))
    driver = element.find("driver")
    overlay_format = None if driver is None else driver.get("type")
    return SnapshotDisk(
        target, mode, Path(name) if name else None, *frozen.get(target, (None, ())), format=overlay_format
    )
