"""Snapshots from libvirt's own snapshot metadata and the files on disk. There is no other registry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.state import find_snapshot, lenient, volume_resolver
from qemu_vmdk_snap.domain.xml.named import folders_named
from qemu_vmdk_snap.domain.xml.origin import maker_of
from qemu_vmdk_snap.errors import NoSnapshot, VmdkSnapError
from qemu_vmdk_snap.light import TYPE_CHECKING, dataclass

if TYPE_CHECKING:
    import libvirt


@dataclass(frozen=True, slots=True)
class DiskState:
    """One disk of a snapshot, in the XML and on disk."""

    target: str
    mode: str
    """`external`, `internal`, `manual` or `no`, in libvirt's words."""
    overlay: Path | None
    """The overlay that was created with the snapshot."""
    frozen: Path | None
    """The frozen file: the disk at the time of the snapshot."""
    frozen_bytes: int | None
    """The size of the frozen file on its file system; None if it is missing or not in the snapshot."""
    overlay_bytes: int | None
    depth: int | None
    """How many links the frozen chain has; None if it cannot be opened."""
    missing: tuple[Path, ...]
    problem: str | None
    """Why the frozen chain cannot be read, in one line."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types; sizes are bytes."""
        return {
            "target": self.target,
            "snapshot": self.mode,
            "frozen": None if self.frozen is None else str(self.frozen),
            "overlay": None if self.overlay is None else str(self.overlay),
            "frozen-size": self.frozen_bytes,
            "overlay-size": self.overlay_bytes,
            "chain-depth": self.depth,
            "missing": [str(path) for path in self.missing],
            "problem": self.problem,
        }


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One snapshot of a domain."""

    domain: str
    name: str
    creation_time: int
    """Seconds since 1970."""
    state: str
    parent: str | None
    children: tuple[str, ...]
    descendants: int
    current: bool
    description: str | None
    memory: str
    disks: tuple[DiskState, ...]
    memory_file: Path | None = None
    """The file with the guest's memory of then."""
    foreign: str | None = None
    """What kind of snapshot it is, where it was not made here: virsh's own commands are there for it."""

    @property
    def location(self) -> str:
        """Return `external` or `internal`, as virsh's snapshot-info decides it."""
        modes = {disk.mode for disk in self.disks} | {self.memory}
        return "external" if "external" in modes else "internal"

    def as_dict(self) -> dict[str, object]:
        """Return the snapshot with JSON's own types, as `snapshot info --output=json` shows it."""
        return {
            "domain": self.domain,
            "name": self.name,
            "creation-time": self.creation_time,
            "state": self.state,
            "location": self.location,
            "parent": self.parent,
            "children": list(self.children),
            "descendants": self.descendants,
            "current": self.current,
            "description": self.description,
            "foreign": self.foreign,
            "disks": [disk.as_dict() for disk in self.disks],
            **({} if self.memory_file is None else {"memory": str(self.memory_file)}),
        }


def list_domains(conn: libvirt.virConnect) -> list[str]:
    """Return the names of all domains of the connection, in their order.

    Raises:
        DomainError: libvirt reports an error.
    """
    with libvirt_errors("-", "list the domains"):
        return sorted(domain.name() for domain in conn.listAllDomains())


def list_snapshots(conn: libvirt.virConnect, domain: str) -> list[SnapshotInfo]:
    """Return every snapshot of the domain, whoever made it, in virsh's order: by name, whatever the case.

    Raises:
        DomainError: there is no such domain, or libvirt reports an error.
    """
    import libvirt

    found = find_domain(conn, domain)
    name = found.name()
    volume_path = lenient(volume_resolver(conn, name))
    with libvirt_errors(name, "list its snapshots"):
        texts = [snapshot.getXMLDesc(0) for snapshot in found.listAllSnapshots()]
        parsed = [xml.parse_snapshot(text, volume_path) for text in texts]
        persistent = found.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) if found.isPersistent() else found.XMLDesc(0)
        current = found.snapshotCurrent().getName() if found.hasCurrentSnapshot() else None
    parsed.sort(key=lambda snapshot: (snapshot.name.casefold(), snapshot.name))
    with engine.allowing(*folders_named(volume_path, persistent, *texts), below=False):
        return [_info(name, snapshot, parsed, current) for snapshot in parsed]


def snapshot_info(conn: libvirt.virConnect, domain: str, snapshot: str | None = None) -> SnapshotInfo:
    """Return one snapshot of the domain, the current one if none is named.

    Raises:
        DomainError: the domain has no such snapshot, or no current one.
    """
    for info in list_snapshots(conn, domain):
        if info.name == snapshot or (snapshot is None and info.current):
            return info
    reason = "has no current snapshot" if snapshot is None else f"has no snapshot {snapshot!r}"
    raise NoSnapshot(domain, reason, snapshot=snapshot)


def snapshot_xml(conn: libvirt.virConnect, domain_name: str, snapshot: str, *, secure: bool = False) -> str:
    """Return the XML of a snapshot as libvirt keeps it; `secure`: with passwords.

    Raises:
        DomainError: there is no such domain or snapshot, or libvirt refuses.
    """
    import libvirt

    domain = find_domain(conn, domain_name)
    with libvirt_errors(domain.name(), f"read its snapshot {snapshot!r}"):
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE if secure else 0
        return str(find_snapshot(domain, snapshot).getXMLDesc(flags))


def tree_lines(snapshots: Sequence[SnapshotInfo]) -> Iterator[str]:
    """Yield the tree of the snapshots as virsh draws it; one whose parent is not among them is a root."""
    names = {snapshot.name for snapshot in snapshots}
    for snapshot in snapshots:
        if snapshot.parent not in names:
            yield snapshot.name
            yield from _branch(snapshot, snapshots, "")
            yield ""


def _branch(snapshot: SnapshotInfo, snapshots: Sequence[SnapshotInfo], indent: str) -> Iterator[str]:
    children = [child for child in snapshots if child.parent == snapshot.name]
    if children:
        yield f"{indent}  |"
    for child in children:
        last = child is children[-1]
        yield f"{indent}  +- {child.name}"
        below = indent + ("   " if last else "  |") + " "
        yield from _branch(child, snapshots, below)
        if not last and any(other.parent == child.name for other in snapshots):
            yield f"{indent}  |"


def _info(
    domain: str, snapshot: xml.SnapshotXml, everyone: Sequence[xml.SnapshotXml], current: str | None
) -> SnapshotInfo:
    return SnapshotInfo(
        domain=domain,
        name=snapshot.name,
        creation_time=snapshot.creation_time,
        state=snapshot.state,
        parent=snapshot.parent,
        children=tuple(other.name for other in everyone if other.parent == snapshot.name),
        descendants=len(_descendants(snapshot.name, everyone)),
        current=snapshot.name == current,
        description=snapshot.description,
        memory=snapshot.memory,
        disks=tuple(_disk_state(disk) for disk in snapshot.disks),
        memory_file=snapshot.memory_file,
        foreign=maker_of(snapshot),
    )


def _descendants(name: str, everyone: Sequence[xml.SnapshotXml]) -> set[str]:
    found: set[str] = set()
    frontier = {name}
    while frontier:
        frontier = {other.name for other in everyone if other.parent in frontier} - found
        found |= frontier
    return found


def _disk_state(disk: xml.SnapshotDisk) -> DiskState:
    if disk.mode != "external" or disk.frozen is None:
        return DiskState(disk.target, disk.mode, disk.overlay, disk.frozen, None, None, None, (), None)
    files = [path for path in (disk.frozen, disk.overlay) if path is not None]
    depth, problem = _depth(disk)
    return DiskState(
        target=disk.target,
        mode=disk.mode,
        overlay=disk.overlay,
        frozen=disk.frozen,
        frozen_bytes=_allocated(disk.frozen),
        overlay_bytes=None if disk.overlay is None else _allocated(disk.overlay),
        depth=depth,
        missing=tuple(path for path in files if not path.exists()),
        problem=problem,
    )


def _depth(disk: xml.SnapshotDisk) -> tuple[int | None, str | None]:
    """Return the number of links of the frozen chain, or why it is unknown."""
    if disk.frozen is None:
        return None, None
    try:
        # Without locks: a guest may be writing to the overlay above, never to these links.
        with engine.open_chain(disk.frozen, trusted_dirs=[path.parent for path in disk.backing], lock=False) as chain:
            return chain.depth, None
    except VmdkSnapError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename or disk.frozen}: {error.strerror}"


def _allocated(path: Path) -> int | None:
    try:
        return path.stat().st_blocks * 512  # st_blocks counts 512 bytes whatever the file system's block is
    except OSError:
        return None
