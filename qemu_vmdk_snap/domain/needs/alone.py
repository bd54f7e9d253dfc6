"""Which images are a domain's alone: those that it, or one of its snapshots, has or had as the top of a disk.

What is only below them was never written by the domain: the base of a clone, a template. It is left where it is, as is
whatever is read-only, shared, a CD or a floppy.
"""

from __future__ import annotations

import contextlib
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_vmdk_snap import confined, open_chain, open_link, open_posix, own_files
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.needs.needed import Given, Needed, place_in, real_file, require_none
from qemu_vmdk_snap.domain.xml.form import out_of_form
from qemu_vmdk_snap.domain.xml.kept import kept_branches
from qemu_vmdk_snap.domain.xml.named import source_path


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is the domain's alone."""

    path: Path
    """As the XML names it."""
    files: tuple[Path, ...]
    """All files of it, that with the descriptor last."""
    parent: Path | None = None
    """What backs it."""
    vmdk: bool = True
    """Whether it is a VMDK; of any other format only its one file is known."""


@dataclass(frozen=True, slots=True)
class Alone:
    """The images of a domain, those that are backed by others first, and the images below that are not its alone."""

    images: tuple[Image, ...]
    below: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        """Return every file of the images, each once."""
        return list(dict.fromkeys(file for image in self.images for file in image.files))


def images_alone(domain_xml: str, snapshots: Mapping[str, str], volume_path: xml.VolumePath) -> Alone:
    """Return the images of the domain; `snapshots` are the XML of each.

    Raises:
        DomainError: a volume cannot be found.
        VmdkSnapError, OSError: a chain cannot be opened, or an extent is not known to be the image's own.
    """
    tops: dict[Path, bool] = {}
    for text in (domain_xml, *snapshots.values()):
        for path, is_vmdk in _tops(text, volume_path):
            if path.is_file() and (known := place_in(tops, path)) is None:
                tops[path] = is_vmdk
            elif path.is_file() and known is not None:
                tops[list(tops)[known]] |= is_vmdk
    for path in kept_branches(domain_xml):
        if path.is_file() and place_in(tops, path) is None:
            tops[path] = True
    named = [*tops, *(file for text in (domain_xml, *snapshots.values()) for file in xml.files_in(text))]
    folders = sorted({folder for path in named for folder in (path.parent, real_file(path).parent)})
    images: dict[Path, Image] = {}
    below: list[Path] = []
    for path, is_vmdk in tops.items():
        if not is_vmdk:
            images[path] = Image(path, (path,), None, vmdk=False)
            continue
        links = _links(path, folders, named)
        lowest = max(at for at, link in enumerate(links) if place_in(tops, link) is not None)
        for at, link in enumerate(links):
            if at > lowest:
                below.append(link)
            elif place_in(images, link) is None:
                images[link] = _image(link, links[at + 1] if at + 1 < len(links) else None, folders)
    return Alone(tuple(_children_first(list(images.values()))), tuple(_others(below, images)))


def require_alone(needed: Needed, uuid: str, alone: Alone, orphans: Given) -> None:
    """Return if nobody but the domain needs one of its images, and nothing around them does.

    Raises:
        StillNeeded: something does, or may; it names what.
    """
    files = alone.files
    for image in alone.images:
        found = [*needed.holding(image.files, needed.of_others(uuid), orphans)]
        require_none(image.path, [*found, *needed.around(image.files, files, orphans)])


@contextlib.contextmanager
def all_locked(alone: Alone) -> Iterator[None]:
    """Keep everybody from every VMDK image.

    Raises:
        LockBusy: somebody has one open.
    """
    folders = sorted({folder for file in alone.files for folder in (file.parent, real_file(file).parent)})
    with contextlib.ExitStack() as held:
        for image in alone.images:
            if image.vmdk:
                link = open_link(image.path, opener=open_posix, writable=True, resolver=confined(folders))
                held.callback(link.close)
        yield


def _tops(text: str, volume_path: xml.VolumePath) -> Iterator[tuple[Path, bool]]:
    """Yield the file of each disk that the guest could write, and whether it is a VMDK."""
    root = xml.root_of(out_of_form(text))
    homes = [root] if root.tag == "domain" else [root.find("domain"), root.find("inactiveDomain")]
    for element in [disk for home in homes if home is not None for disk in home.findall("./devices/disk")]:
        if element.get("device", "disk") != "disk" or element.get("type") not in ("file", "volume"):
            continue
        if element.find("readonly") is not None or element.find("shareable") is not None:
            continue
        path = _path(element, volume_path)
        driver = element.find("driver")
        if path is not None:
            yield path, driver is not None and driver.get("type") == "vmdk"
    for element in root.findall("./disks/disk") if root.tag != "domain" else []:
        path = _path(element, volume_path)
        if path is not None and element.get("snapshot", "external") == "external":
            driver = element.find("driver")
            yield path, driver is None or driver.get("type") == "vmdk"


def _path(element: ET.Element, volume_path: xml.VolumePath) -> Path | None:
    source = element.find("source")
    return None if source is None else source_path(source, volume_path)


def _links(path: Path, folders: Sequence[Path], named: Sequence[Path]) -> list[Path]:
    """Return the links of the chain, as the XML names them where it does."""
    with open_chain(path, trusted_dirs=folders, lock=False) as chain:
        found = [link.path for link in chain.links]
    places = [place_in(named, link) for link in found]
    return [path, *(link if at is None else named[at] for link, at in zip(found[1:], places[1:], strict=True))]


def _image(path: Path, parent: Path | None, folders: Sequence[Path]) -> Image:
    link = open_link(path, opener=open_posix, writable=False, resolver=confined(folders), lock=False)
    try:
        return Image(path, tuple(own_files(link)), parent)
    finally:
        link.close()


def _children_first(images: list[Image]) -> Iterator[Image]:
    while images:
        parents = [image.parent for image in images if image.parent is not None]
        free = [image for image in images if place_in(parents, image.path) is None] or list(images)
        yield from free
        images = [image for image in images if image not in free]


def _others(below: Sequence[Path], images: Mapping[Path, Image]) -> Iterator[Path]:
    seen: list[Path] = []
    for path in below:
        if place_in([*images, *seen], path) is None:
            seen.append(path)
            yield path
