"""What deleting snapshots will do to the files and the XML, worked out before anything is changed, several in a row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qemu_vmdk_snap import Census, Link, confined, open_chain, open_link, open_posix
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.journal.record import Intent
from qemu_vmdk_snap.domain.qemu.merge import node_of, written_here
from qemu_vmdk_snap.domain.state import inactive_xml, volume_resolver
from qemu_vmdk_snap.errors import DomainError, NoSnapshot

if TYPE_CHECKING:
    import libvirt

Scope = Literal["one", "children", "children-only"]


@dataclass(frozen=True, slots=True)
class Work:
    """What happens to one disk of a deleted snapshot."""

    target: str
    mode: Literal["merge", "copy", "drop", "keep"]
    frozen: str
    """F."""
    child: str | None = None
    """C, where the mode is merge."""
    moving: tuple[str, ...] = ()
    """merge: the children of C, which move to F; copy: those of F, which move to its parent."""
    parent: str | None = None
    """What F stands on."""
    size: int = 0
    """About so many bytes are copied."""
    live: bool = False
    """Whether the running guest writes to C, and goes over to F."""

    @property
    def removed(self) -> Path | None:
        """The image that is deleted."""
        name = {"merge": self.child, "copy": self.frozen, "drop": self.frozen, "keep": None}[self.mode]
        return None if name is None else Path(name)

    def change(self, files: Sequence[Path]) -> list[Path]:
        """Return the files of a disk (the top first) as they are afterwards."""
        if self.mode == "merge" and Path(self.child or "") in files:
            files = [file for file in files if file != Path(self.frozen)]
            return [Path(self.frozen) if file == Path(self.child or "") else file for file in files]
        if self.mode == "copy" and list(files) == [Path(self.frozen)]:
            return [Path(self.moving[0])]  # the overlay that a snapshot names as its own
        return [file for file in files if file != self.removed]

    def lines(self) -> list[str]:
        """Return every file operation, one line each."""
        if self.mode == "keep":
            return [f"keep {self.frozen}: another snapshot, or the domain, has it too"]
        lines = [f"merge {self.child} into {self.frozen} ({self.size} bytes)"] if self.mode == "merge" else []
        onto = self.frozen if self.mode == "merge" else self.parent
        for image in self.moving:
            copied = f" ({self.size} bytes copied)" if self.mode == "copy" else ""
            where = f"move {image} onto {onto}" if onto else f"make {image} a base"
            lines.append(where + copied)
        return [*lines, f"delete {self.removed}"]


@dataclass(frozen=True, slots=True)
class Deleted:
    """One snapshot that is gone (or would be)."""

    name: str
    work: tuple[Work, ...]

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        disks = [{"target": work.target, "mode": work.mode, "operations": work.lines()} for work in self.work]
        return {"snapshot": self.name, "disks": disks}


@dataclass(slots=True)
class State:
    """A domain with its snapshots, and the images as they are, or as they would be after some deletes."""

    name: str
    uuid: str
    running: bool
    domain_xml: str
    """The persistent XML."""
    snapshots: dict[str, str]
    """name -> XML, secrets included."""
    current: str | None
    vcpus_run: bool
    foreign: dict[Path, str]
    """Files that other domains use, and which domain."""
    volume_path: xml.VolumePath
    written: dict[str, str]
    """Of a running guest: the nodes that QEMU has written to, and their files; see `live_merge`."""
    moved: dict[Path, Path | None] = field(default_factory=dict)
    """Images that would have another parent."""
    gone: set[Path] = field(default_factory=set)
    grown: dict[Path, int] = field(default_factory=dict)
    """Bytes that images would have got."""

    @classmethod
    def read(cls, conn: libvirt.virConnect, domain: libvirt.virDomain) -> State:
        """Return what is there now."""
        import libvirt

        secure = libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
        with libvirt_errors(domain.name(), "read its snapshots"):
            return cls(
                domain.name(),
                domain.UUIDString(),
                bool(domain.isActive()),
                inactive_xml(domain),
                {one.getName(): one.getXMLDesc(secure) for one in domain.listAllSnapshots()},
                domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None,
                bool(domain.isActive() and domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING),
                _used_by_others(conn, domain),
                volume_resolver(conn, domain.name()),
                written_here(domain) if domain.isActive() else {},
            )

    def after(self, intent: Intent) -> State:
        """Return what would be there after the delete."""
        left = {**self.snapshots, **dict(intent.snapshots)}
        del left[intent.snapshot]
        moved, gone, grown = dict(self.moved), set(self.gone), dict(self.grown)
        for one in work_of(intent):
            onto = one.frozen if one.mode == "merge" else one.parent
            moved |= {Path(image): None if onto is None else Path(onto) for image in one.moving}
            for image in [one.frozen] if one.mode == "merge" else one.moving:
                grown[Path(image)] = grown.get(Path(image), 0) + one.size
            gone |= {one.removed} if one.removed else set()
        return replace(self, domain_xml=intent.new_xml, snapshots=left, moved=moved, gone=gone, grown=grown)

    def parent(self, image: Path, folders: Collection[Path]) -> Path | None:
        """Return what the image stands on."""
        if image in self.moved:
            return self.moved[image]
        with open_one(image, folders, lock=False) as link:
            hint = link.hint
        if hint is None:
            return None
        with open_chain(image, trusted_dirs=sorted(folders), lock=False) as chain:
            return chain.links[1].path

    def children(self, image: Path, folders: Collection[Path]) -> list[Path]:
        """Return what stands on the image."""
        found = [one.path for one in Census.of(folders).dependents([image])]
        stay = [path for path in found if self.moved.get(path, image) == image and path not in self.gone]
        return stay + [path for path, onto in self.moved.items() if onto == image and path not in {*stay, *self.gone}]

    def size(self, image: Path) -> int:
        """Return the bytes that the image takes up on its file system, about."""
        blocks = image.stat().st_blocks * 512  # 512 bytes whatever the file system's block is
        return blocks + self.grown.get(image, 0)


def preview(state: State, names: Sequence[str]) -> list[Deleted]:
    """Return what deleting the snapshots, in this order, would do; see `delete` for what it raises."""
    found = []
    for name in names:
        intent = make_intent(state, name, metadata=False)
        found.append(Deleted(name, work_of(intent)))
        state = state.after(intent)
    return found


def chosen(domain: libvirt.virDomain, names: Sequence[str], scope: Scope) -> list[str]:
    """Return the snapshots in question, every child before its parent.

    Raises:
        DomainError: one of them is not there.
    """
    with libvirt_errors(domain.name(), "list its snapshots"):
        parents = {s.getName(): xml.parse_snapshot(s.getXMLDesc(0)).parent for s in domain.listAllSnapshots()}
    for name in names:
        if name not in parents:
            raise NoSnapshot(domain.name(), f"has no snapshot {name!r}", snapshot=name)
    wanted = set(names)
    if scope != "one":
        below = set().union(*(_descendants(name, parents) for name in names))
        wanted = below if scope == "children-only" else wanted | below

    def depth(name: str) -> int:
        steps, parent = 0, parents.get(name)
        while parent is not None and steps <= len(parents):
            steps, parent = steps + 1, parents.get(parent)
        return steps

    return sorted(wanted, key=lambda name: (-depth(name), name))


def work_of(intent: Intent) -> tuple[Work, ...]:
    """Return the work that a record tells of."""
    return tuple(Work(**{**one, "moving": tuple(one["moving"])}) for one in intent.work)


def make_intent(state: State, name: str, *, metadata: bool) -> Intent:
    """Return the record of a delete; nothing has changed yet.

    Raises:
        DomainError: there is no such snapshot, or its files are in use.
    """
    if name not in state.snapshots:
        raise NoSnapshot(state.name, f"has no snapshot {name!r}", snapshot=name)
    texts = {other: text for other, text in state.snapshots.items() if other != name}
    mine = state.snapshots[name]
    work: tuple[Work, ...] = ()
    if not metadata:
        planner = _Planner(state, texts)
        saved = xml.parse_snapshot(mine, state.volume_path)
        work = tuple(planner.plan(disk) for disk in saved.disks if disk.mode == "external")
    change = change_of(work)
    parents = {other: xml.parse_snapshot(text).parent for other, text in {**texts, name: mine}.items()}
    changed = {other: xml.relink(text, change) for other, text in texts.items()}
    for other, parent in parents.items():
        if parent == name:
            changed[other] = xml.with_parent(changed[other], parents[name])
    for other in _descendants(name, parents):  # libvirt itself changes their XML when it forgets this one
        changed[other] += "\n"
    return Intent(
        uuid=state.uuid,
        domain=state.name,
        snapshot=name,
        overlays=(),
        old_xml=state.domain_xml,
        new_xml=xml.relink(state.domain_xml, change),
        snapshot_xml=mine,
        operation="delete",
        live=any(one.live for one in work),
        resume=state.vcpus_run,
        current=state.current,
        work=tuple({**asdict(one), "moving": list(one.moving)} for one in work),
        snapshots=tuple((other, text) for other, text in changed.items() if text != texts[other]),
    )


def _descendants(name: str, parents: Mapping[str, str | None]) -> set[str]:
    found: set[str] = set()
    while more := {one for one, parent in parents.items() if parent == name or parent in found} - found:
        found |= more
    return found


class _Planner:
    """Finds out what can be done with the files of one domain."""

    def __init__(self, state: State, others: Mapping[str, str]) -> None:
        self._state = state
        self._domain_files = xml.files_in(state.domain_xml)
        texts = [xml.domain_of(text) for text in others.values()]
        self._frozen = {disk.path for text in texts for disk in xml.list_disks(text, state.volume_path)}
        self._named = self._domain_files.union(*(xml.files_in(text) for text in texts))
        self._tops = {disk.path for disk in xml.list_disks(state.domain_xml, state.volume_path)}

    def plan(self, disk: xml.SnapshotDisk) -> Work:
        """Return what happens to the disk.

        Raises:
            DomainError: its file is in use where nothing can be done about it.
        """
        if disk.frozen is None:
            raise DomainError(self._state.name, f"disk {disk.target} of the snapshot has no file: try --metadata")
        frozen = disk.frozen
        if frozen in self._frozen or frozen in self._tops:
            return Work(disk.target, "keep", str(frozen))
        folders = {file.parent for file in self._named} | {frozen.parent}
        state = self._state
        parent, children = state.parent(frozen, folders), state.children(frozen, folders)
        live = self._goes_live(frozen, children)
        if not live:
            self._refuse_unwritten(disk.target, frozen, children)
            self._check(disk.target, [frozen, *children])
        below = None if parent is None else str(parent)
        if not children:
            return Work(disk.target, "drop", str(frozen), parent=below)
        if live or self._merges(frozen, children, parent):
            above = state.children(children[0], folders)
            self._check(disk.target, above)
            size = state.size(children[0])
            return Work(disk.target, "merge", str(frozen), str(children[0]), tuple(map(str, above)), below, size, live)
        moving = tuple(map(str, children))
        return Work(disk.target, "copy", str(frozen), None, moving, below, state.size(frozen))

    def _goes_live(self, frozen: Path, children: Sequence[Path]) -> bool:
        """Return whether QEMU can merge into the file: only the guest's active overlay stands on it."""
        return self._below_active(frozen, children) and node_of(frozen, self._state.written) is not None

    def _below_active(self, frozen: Path, children: Sequence[Path]) -> bool:
        if not self._state.running or len(children) != 1 or children[0] not in self._tops:
            return False
        return children[0] not in self._state.foreign and frozen not in self._state.foreign

    def _refuse_unwritten(self, target: str, frozen: Path, children: Sequence[Path]) -> None:
        """Tell why the newest snapshot of a running guest, too, may have to wait; see `live_merge`."""
        if self._below_active(frozen, children):
            reason = f"disk {target}: the guest has not written {frozen} since QEMU opened it, and a live merge into it"
            raise DomainError(
                self._state.name, f"{reason} would change its CID under {children[0]}: shut it down first"
            )

    def _merges(self, frozen: Path, children: Sequence[Path], parent: Path | None) -> bool:
        if len(children) > 1 or children[0] not in self._named:
            return False
        return parent is None or self._state.size(children[0]) <= self._state.size(frozen)

    def _check(self, target: str, files: Iterable[Path]) -> None:
        for file in files:
            if self._state.running and file in self._domain_files:
                reason = f"disk {target}: the running guest uses {file}, and QEMU cannot merge it safely"
                raise DomainError(self._state.name, f"{reason}: shut it down first")
            if file in self._state.foreign:
                raise DomainError(
                    self._state.name, f"disk {target}: {file} belongs to domain {self._state.foreign[file]} too"
                )


def _used_by_others(conn: libvirt.virConnect, domain: libvirt.virDomain) -> dict[Path, str]:
    """Return the files that other domains and their snapshots name, and which domain."""
    found: dict[Path, str] = {}
    uuid = domain.UUIDString()
    with libvirt_errors(domain.name(), "look at the other domains"):
        for other in conn.listAllDomains():
            if other.UUIDString() == uuid:
                continue
            texts = [other.XMLDesc(0), inactive_xml(other), *(s.getXMLDesc(0) for s in other.listAllSnapshots())]
            found |= dict.fromkeys(set().union(*map(xml.files_in, texts)), other.name())
    return found


def change_of(work: Sequence[Work]) -> Callable[[Sequence[Path]], Sequence[Path]]:
    """Return what turns the files of a disk into those that it has afterwards."""

    def change(files: Sequence[Path]) -> Sequence[Path]:
        for one in work:
            files = one.change(files)
        return files

    return change


@contextlib.contextmanager
def open_one(path: Path, folders: Collection[Path], *, lock: bool) -> Iterator[Link]:
    """Open one image without its parents; `lock` keeps everybody else from it."""
    link = open_link(path, opener=open_posix, writable=lock, resolver=confined(sorted(folders)), lock=lock)
    try:
        yield link
    finally:
        link.close()
