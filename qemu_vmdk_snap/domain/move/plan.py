"""Which files go where, and what the XML is then: worked out and checked before anything is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.journal.record import Intent
from qemu_vmdk_snap.domain.needs.alone import Alone, images_alone, require_alone
from qemu_vmdk_snap.domain.needs.needed import Given, Needed, place_in, real_file
from qemu_vmdk_snap.domain.state import check_state, inactive_xml, volume_resolver
from qemu_vmdk_snap.domain.xml.elements import with_files_of_volumes
from qemu_vmdk_snap.domain.xml.kept import kept_branches, with_kept_branches
from qemu_vmdk_snap.errors import DomainError, InvalidRequest

if TYPE_CHECKING:
    import libvirt


@dataclass(frozen=True, slots=True)
class MovedFile:
    """One file, and where it goes."""

    source: Path
    path: Path
    size: int
    """Bytes that it takes up on its file system."""
    mode: Literal["rename", "copy"]
    """Whether it gets another name, or is on another file system and its bytes are copied."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"source": str(self.source), "filename": str(self.path), "size": self.size, "mode": self.mode}


@dataclass(frozen=True, slots=True)
class Plan:
    """A move ready to be made."""

    files: tuple[MovedFile, ...]
    kept: tuple[tuple[Path, str], ...]
    """Images of its chains that stay where they are, and why."""
    alone: Alone
    """The images that go."""
    intent: Intent


def make_plan(conn: libvirt.virConnect, domain: libvirt.virDomain, folder: Path, orphans: Sequence[Path]) -> Plan:
    """Return the plan; nothing has changed.

    Raises:
        InvalidRequest: it is not a folder.
        DomainError: the domain runs, two files would have one name, something bears it, or there is no space.
        StillNeeded: something else needs one of the files where it is, or may.
        VmdkSnapError, OSError: a chain is broken or cannot be looked at.
    """
    import libvirt

    name = domain.name()
    if not folder.is_dir():
        raise InvalidRequest(folder, "is no folder")
    with libvirt_errors(name, "read its state"):
        check_state(domain)
        if domain.isActive():
            raise DomainError(name, "runs: shut it off first")
        text = inactive_xml(domain)
        secure = libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
        snapshots = {one.getName(): one.getXMLDesc(secure) for one in domain.listAllSnapshots()}
        current = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
    volume_path = volume_resolver(conn, name)
    found = images_alone(text, snapshots, volume_path)
    alone, kept = _moving(found, folder)
    require_alone(Needed.read(conn, domain, folders=[folder]), domain.UUIDString(), alone, Given(tuple(orphans)))
    files = tuple(_moved(file, folder) for file in alone.files)
    _check(name, alone, files, folder)
    work = [_work(one) for one in files]
    relink = relinking(work)
    new = {other: relink(with_files_of_volumes(each, volume_path)) for other, each in snapshots.items()}
    new_xml = relink(with_files_of_volumes(text, volume_path))
    intent = Intent(
        uuid=domain.UUIDString(),
        domain=name,
        snapshot="",
        overlays=(),
        old_xml=text,
        new_xml=new_xml,
        snapshot_xml="",
        operation="move",
        current=current,
        work=(*work, *_hints(alone, work)),
        snapshots=tuple(new.items()),
    )
    return Plan(files, kept, alone, intent)


def relinking(work: Iterable[Mapping[str, Any]]) -> Callable[[str], str]:
    """Return what gives the XML of a domain or a snapshot the new names of the files."""
    new = {Path(one["source"]): Path(one["path"]) for one in work if "path" in one}

    def named(path: Path) -> Path:
        if path in new:
            return new[path]
        at = place_in(new, path)  # under another name, as through a link to the folder
        return path if at is None else [*new.values()][at]

    def relink(text: str) -> str:
        changed = xml.relink(text, lambda files: [named(path) for path in files])
        if xml.root_of(text).tag != "domain" or not (kept := kept_branches(changed)):
            return changed
        return with_kept_branches(changed, {named(path): snapshot for path, snapshot in kept.items()})

    return relink


def _moving(found: Alone, folder: Path) -> tuple[Alone, tuple[tuple[Path, str], ...]]:
    """Return the images that are to be moved, and those that stay, and why."""
    kept = [(path, "is only below its disks: it was never written by the domain") for path in found.below]
    images = []
    for image in found.images:
        if not image.vmdk:
            kept.append((image.path, "is no VMDK image"))
        elif any(not file.parent.samefile(folder) for file in image.files):
            images.append(image)
    return Alone(tuple(images), found.below), tuple(kept)


def _moved(file: Path, folder: Path) -> MovedFile:
    facts = file.stat()
    same = facts.st_dev == folder.stat().st_dev
    return MovedFile(file, folder / file.name, facts.st_blocks * 512, "rename" if same else "copy")


def _work(one: MovedFile) -> dict[str, Any]:
    # A copy is made in a folder of this name, which nobody else can have: whatever is in there is ours.
    staged = one.path.parent / f".{uuid4().hex}.qemu-vmdk-snap" / one.path.name
    inode = one.source.stat().st_ino
    return {"source": str(one.source), "path": str(one.path), "staged": str(staged), "inode": inode}


def _hints(alone: Alone, work: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return which image is backed by which afterwards: what each says of its parent must lead there."""
    new = {Path(one["source"]): Path(one["path"]) for one in work}
    found: list[dict[str, Any]] = []
    for image in alone.images:
        if image.parent is not None:
            at = place_in(new, image.parent)
            parent = image.parent if at is None else [*new.values()][at]
            found.append({"image": str(new[image.path]), "parent": str(parent)})
    return found


def _check(domain: str, alone: Alone, files: Sequence[MovedFile], folder: Path) -> None:
    """Refuse what can be known before the first change."""
    homes = sorted({home for one in files for home in (one.source.parent, real_file(one.source).parent)})
    for image in alone.images:
        if image.path.is_symlink():
            raise DomainError(domain, f"{image.path} is a symbolic link to {real_file(image.path)}: it is not moved")
        engine.read_links(image.path, trusted_dirs=[*homes, *(path.parent for path in alone.below)])
    names: dict[str, Path] = {}
    for one in files:
        other = names.setdefault(one.path.name, one.source)
        if other != one.source:
            raise DomainError(domain, f"{other} and {one.source} would have one name in {folder}")
        if os.path.lexists(one.path):
            raise DomainError(domain, f"{one.path} exists already")
    for home in {folder, *(one.source.parent for one in files)}:
        if not os.access(home, os.W_OK | os.X_OK):
            raise DomainError(domain, f"{home} may not be written")
    facts = os.statvfs(folder)
    free, wanted = facts.f_bavail * facts.f_frsize, sum(one.size for one in files if one.mode == "copy")
    if wanted > free:
        raise DomainError(domain, f"the files take {wanted} bytes, and the file system of {folder} has {free} left")
