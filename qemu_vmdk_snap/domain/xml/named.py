"""Which files the XML of a domain or a snapshot names: each source of each disk, at any depth, in whatever form."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.domain.xml import VolumePath
from qemu_vmdk_snap.errors import VmdkSnapError
from qemu_vmdk_snap.light import NamedTuple


class NamedFile(NamedTuple):
    """One source in the XML."""

    path: Path
    raw: bool
    """Whether its format is raw in the XML: then it needs no other file, whatever it contains."""


class NamedChain(NamedTuple):
    """The files of one disk, the top first, as far as the XML spells them out."""

    disk: str
    """Its target, as `vda`."""
    files: tuple[NamedFile, ...]
    closed: bool
    """Whether the XML spells out the chain down to its end."""
    role: str = "disk"
    """`disk`; `overlay`: what a snapshot has put on top; `extra`: a source beside the chain (a mirror, a data file);
    `memory`: the file with the guest's memory."""
    problem: tuple[Path, str] | None = None
    """A volume whose file is not known, as POOL/VOLUME, and why."""


def named_chains(text: str, volume_path: VolumePath) -> list[NamedChain]:
    """Return every chain that the XML names; in that of a snapshot those of both domains and the overlays."""
    root = ET.fromstring(text)
    found: list[NamedChain] = []
    for domain in [root] if root.tag == "domain" else [root.find("domain"), root.find("inactiveDomain")]:
        for element in [] if domain is None else domain.findall("./devices/disk"):
            target = element.find("target")
            name = "" if target is None else target.get("dev", "")
            found.append(_chain(element, name, volume_path, "disk"))
            found += _extras(element, name, volume_path)
    if root.tag != "domain":
        for element in root.findall("./disks/disk"):
            found.append(_chain(element, element.get("name", ""), volume_path, "overlay"))
        memory = root.find("memory")
        if memory is not None and memory.get("file"):
            found.append(NamedChain("", (NamedFile(Path(memory.get("file", "")), True),), True, "memory"))
    return [chain for chain in found if chain.files or chain.problem]


def frozen_files(snapshot_text: str, volume_path: VolumePath) -> list[Path]:
    """Return the files that the snapshot froze: the tops of the disks that took part in it."""
    root = ET.fromstring(snapshot_text)
    taking_part = {
        disk.get("name", "") for disk in root.findall("./disks/disk") if disk.get("snapshot", "external") != "no"
    }
    chains = named_chains(snapshot_text, volume_path)
    return [
        chain.files[0].path for chain in chains if chain.role == "disk" and chain.files and chain.disk in taking_part
    ]


def folders_named(volume_path: VolumePath, *texts: str) -> list[Path]:
    """Return the folders of all files that these XML texts name: who wrote them allows parents to lie there."""
    chains = [chain for text in texts for chain in named_chains(text, volume_path)]
    return sorted({file.path.parent for chain in chains for file in chain.files if file.path.is_absolute()})


def source_path(source: ET.Element, volume_path: VolumePath) -> Path | None:
    """Return the file or device that a `<source>` names; None where it names none.

    Raises:
        VmdkSnapError: it is a volume that cannot be found.
    """
    name = source.get("file") or source.get("dev")
    if name:
        return Path(name)
    if source.get("volume"):
        return volume_path(source.get("pool", ""), source.get("volume", ""))
    return None


def _chain(element: ET.Element, disk: str, volume_path: VolumePath, role: str) -> NamedChain:
    files: list[NamedFile] = []
    problem: tuple[Path, str] | None = None
    node: ET.Element | None = element
    closed = True
    while node is not None:
        raw = _format(node) == "raw"
        source = node.find("source")
        try:
            path = None if source is None else source_path(source, volume_path)
        except VmdkSnapError as error:
            path, problem = None, problem or _lost(source, error)
        if path is not None:
            files.append(NamedFile(path, raw))
        store = node.find("backingStore")
        closed = raw or source is None or path is None
        if store is not None and not len(store) and store.get("type") is None:
            closed, store = True, None
        node = store
    return NamedChain(disk, tuple(files), closed, role, problem)


def _lost(source: ET.Element | None, error: VmdkSnapError) -> tuple[Path, str]:
    values = {} if source is None else source.attrib
    return Path(values.get("pool", ""), values.get("volume", "")), f"is not found ({error})"


def _format(node: ET.Element) -> str:
    told = node.find("driver" if node.tag == "disk" else "format")
    return "" if told is None else told.get("type", "")


def _extras(element: ET.Element, disk: str, volume_path: VolumePath) -> Iterator[NamedChain]:
    """Yield the sources of a disk that are not part of its chain."""
    chain: set[int] = set()
    node: ET.Element | None = element
    while node is not None:
        source = node.find("source")
        chain |= set() if source is None else {id(source)}
        node = node.find("backingStore")
    for source in element.iter("source"):
        if id(source) in chain:
            continue
        try:
            path = source_path(source, volume_path)
        except VmdkSnapError as error:
            yield NamedChain(disk, (), False, "extra", _lost(source, error))
            continue
        if path is not None:
            yield NamedChain(disk, (NamedFile(path, False),), False, "extra")
