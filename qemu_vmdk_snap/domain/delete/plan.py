"""What deleting snapshots will do to the files and the XML, worked out before anything is changed, several in a row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qemu_vmdk_snap import Link, children_of, confined, open_chain, open_link, open_posix, require_fit
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.journal.record import Intent
from qemu_vmdk_snap.domain.needs.needed import (
    Given,
    Holder,
    Needed,
    Walk,
    holders_in,
    place_in,
    real_file,
    require_none,
    same_chain,
    same_file,
)
from qemu_vmdk_snap.domain.qemu.merge import node_of, written_here
from qemu_vmdk_snap.domain.state import inactive_xml, volume_resolver
from qemu_vmdk_snap.errors import DomainError, NoSnapshot, VmdkSnapError

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
    orphans: tuple[str, ...] = ()
    """Files that the user gives up: they may lose what they need."""

    @property
    def removed(self) -> Path | None:
        """The image that is deleted."""
        name = {"merge": self.child, "copy": self.frozen, "drop": self.frozen, "keep": None}[self.mode]
        return None if name is None else Path(name)

    def change(self, files: Sequence[Path]) -> list[Path]:
        """Return the files of a disk (the top first) as they are afterwards, under the names that they have there."""
        changed = list(files)
        if self.mode == "merge" and (above := place_in(files, self.child)) is not None:
            below = place_in(files, self.frozen)
            changed[above] = Path(self.frozen) if below is None else files[below]
            if below is not None:
                del changed[below]
            return changed
        if self.mode == "copy" and len(files) == 1 and same_file(files[0], Path(self.frozen)):
            return [Path(self.moving[0])]  # the overlay that a snapshot names as its own
        gone = place_in(files, self.removed)
        if gone is not None:
            del changed[gone]
        return changed

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

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"target": self.target, "mode": self.mode, "operations": self.lines()}


@dataclass(frozen=True, slots=True)
class Deleted:
    """One snapshot that is gone (or would be)."""

    name: str
    work: tuple[Work, ...]

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"snapshot": self.name, "disks": [work.as_dict() for work in self.work]}


@dataclass(slots=True)
class State:
    """A domain with its snapshots, and the images as they are, or as they would be after some deletes."""

    name: str
    uuid: str
    running: bool
    saved: bool
    """Whether it would resume from saved memory."""
    domain_xml: str
    """The persistent XML."""
    snapshots: dict[str, str]
    """name -> XML, secrets included."""
    current: str | None
    vcpus_run: bool
    needed: Needed
    orphans: Given
    volume_path: xml.VolumePath
    written: dict[str, str]
    """Of a running guest: the nodes that QEMU has written to, and their files; see `live_merge`."""
    moved: tuple[tuple[Path, Path | None], ...] = ()
    """Images that would have another parent; the last entry of an image counts."""
    gone: tuple[Path, ...] = ()
    grown: tuple[tuple[Path, int], ...] = ()
    """Bytes that images would have got."""

    @classmethod
    def read(cls, conn: libvirt.virConnect, domain: libvirt.virDomain, orphans: Collection[Path] = ()) -> State:
        """Return what is there now; `orphans` are files that the user gives up."""
        import libvirt

        secure = libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
        with libvirt_errors(domain.name(), "read its snapshots"):
            return cls(
                domain.name(),
                domain.UUIDString(),
                bool(domain.isActive()),
                bool(domain.hasManagedSaveImage()),
                inactive_xml(domain),
                {one.getName(): one.getXMLDesc(secure) for one in domain.listAllSnapshots()},
                domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None,
                bool(domain.isActive() and domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING),
                Needed.read(conn, domain),
                Given(tuple(orphans)),
                volume_resolver(conn, domain.name()),
                written_here(domain) if domain.isActive() else {},
            )

    def after(self, intent: Intent) -> State:
        """Return what would be there after the delete."""
        left = {**self.snapshots, **dict(intent.snapshots)}
        del left[intent.snapshot]
        moved, gone, grown = [*self.moved], [*self.gone], [*self.grown]
        for one in work_of(intent):
            onto = one.frozen if one.mode == "merge" else one.parent
            moved += [(Path(image), None if onto is None else Path(onto)) for image in one.moving]
            grown += [(Path(image), one.size) for image in ([one.frozen] if one.mode == "merge" else one.moving)]
            gone += [one.removed] if one.removed else []
        return replace(
            self,
            domain_xml=intent.new_xml,
            snapshots=left,
            moved=tuple(moved),
            gone=tuple(gone),
            grown=tuple(grown),
        )

    def holders(self, besides: str) -> list[Holder]:
        """Return what the domain and its snapshots name, without the one that goes, and what a live disk has."""
        names = {name: f"snapshot {name} of domain {self.name}" for name in self.snapshots}
        found = holders_in(self.domain_xml, self.uuid, f"domain {self.name}", self.volume_path)
        for name, text in self.snapshots.items():
            if name != besides:
                found += holders_in(text, self.uuid, names[name], self.volume_path, name)
        # What a snapshot has put on top is the domain's own chain, or a branch that is left: nobody reads it by that.
        found = [holder for holder in found if holder.chain.role != "overlay"]
        live = [
            holder
            for holder in self.needed.of_domain(self.uuid)
            if holder.snapshot is None and not any(same_chain(holder, other) for other in found)
        ]
        return found if self.moved or self.gone else found + live

    def named(self) -> list[Path]:
        """Return every file that the domain and its snapshots name."""
        return sorted(set().union(*map(xml.files_in, (self.domain_xml, *self.snapshots.values()))))

    def by_its_name(self, path: Path) -> Path:
        """Return the path as the XML has it."""
        named = self.named()
        at = place_in(named, path)
        return path if at is None else named[at]

    def parent(self, image: Path, folders: Collection[Path]) -> Path | None:
        """Return what backs the image."""
        for moved, onto in reversed(self.moved):
            if same_file(moved, image):
                return onto
        with open_chain(image, trusted_dirs=sorted(folders), lock=False) as chain:
            return self.by_its_name(chain.links[1].path) if chain.depth > 1 else None

    def children(self, image: Path, folders: Collection[Path]) -> list[Path]:
        """Return the VMDK overlays on the image, which can be moved.

        Raises:
            StillNeeded: something else needs it, or may.
            CidMismatch: one was not made for the image as it is.
        """
        away = [path for path, onto in self.moved if onto is None or not same_file(onto, image)]
        with open_one(image, folders, lock=False) as link:
            files, cid = [file.path for file in link.files], link.cid
        given_up = [*self.orphans.paths, *self.gone, *away]
        found = children_of(image, files, self.needed.census, named=self.named(), orphans=given_up)
        require_fit(image, cid, found)
        onto = [path for path, onto in self.moved if onto is not None and same_file(onto, image)]
        stay = [self.by_its_name(one.path) for one in found]
        return stay + [path for path in onto if place_in([*stay, *self.gone], path) is None]

    def size(self, image: Path) -> int:
        """Return the bytes that the image takes up on its file system, about."""
        blocks = image.stat().st_blocks * 512  # 512 bytes whatever the file system's block is
        return blocks + sum(size for path, size in self.grown if same_file(path, image))


def preview(
    state: State, names: Sequence[str]
) -> tuple[tuple[Deleted, ...], tuple[tuple[str, VmdkSnapError | OSError], ...]]:
    """Return what deleting the snapshots, in this order, would do, and which would be left, and why."""
    deleted: list[Deleted] = []
    failed: list[tuple[str, VmdkSnapError | OSError]] = []
    for name in names:
        try:
            intent = make_intent(state, name, metadata=False)
        except (VmdkSnapError, OSError) as error:
            failed.append((name, error))
            continue
        deleted.append(Deleted(name, work_of(intent)))
        state = state.after(intent)
    return tuple(deleted), tuple(failed)


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
    lists = ("moving", "orphans")
    return tuple(Work(**one | {name: tuple(one.get(name, ())) for name in lists}) for one in intent.work)


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
        planner = _Planner(state, name, texts)
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
        work=tuple({**asdict(one), "moving": list(one.moving), "orphans": list(one.orphans)} for one in work),
        snapshots=tuple((other, text) for other, text in changed.items() if text != texts[other]),
    )


def _descendants(name: str, parents: Mapping[str, str | None]) -> set[str]:
    found: set[str] = set()
    while more := {one for one, parent in parents.items() if parent == name or parent in found} - found:
        found |= more
    return found


class _Planner:
    """Finds out what can be done with the files of one domain."""

    def __init__(self, state: State, name: str, others: Mapping[str, str]) -> None:
        self._state = state
        self._domain_files = sorted(xml.files_in(state.domain_xml))
        texts = [xml.domain_of(text) for text in others.values()]
        self._frozen = self._tops_of(*texts)
        self._tops = self._tops_of(state.domain_xml)
        self._named = sorted(set(self._domain_files).union(*(xml.files_in(text) for text in texts)))
        self._holders = state.holders(besides=name)

    def _tops_of(self, *texts: str) -> list[Path]:
        disks = [disk for text in texts for disk in xml.list_disks(text, self._state.volume_path)]
        return [disk.path for disk in disks if disk.path is not None]

    def plan(self, disk: xml.SnapshotDisk) -> Work:
        """Return what happens to the disk.

        Raises:
            DomainError: its file is in use where nothing can be done about it.
            StillNeeded: something else needs one of the files that would change or go, or may.
            CidMismatch: an overlay does not fit the file that it would be merged into, or lose.
        """
        if disk.frozen is None:
            raise DomainError(self._state.name, f"disk {disk.target} of the snapshot has no file: try --metadata")
        frozen = disk.frozen
        if place_in([*self._frozen, *self._tops], frozen) is not None:
            return Work(disk.target, "keep", str(frozen))
        folders = {file.parent for file in self._named} | {frozen.parent}
        folders |= {real_file(folder) for folder in folders} | {real_file(file).parent for file in self._named}
        state = self._state
        children, parent = state.children(frozen, folders), state.parent(frozen, folders)
        live = self._goes_live(frozen, children)
        if not live:
            self._refuse_unwritten(disk.target, frozen, children)
            self._check(disk.target, [frozen, *children])
        work = self._work(disk.target, frozen, children, parent, folders, live=live)
        self._require_unneeded(work, folders)
        return work

    def _work(
        self,
        target: str,
        frozen: Path,
        children: Sequence[Path],
        parent: Path | None,
        folders: Collection[Path],
        *,
        live: bool,
    ) -> Work:
        state = self._state
        orphans = tuple(map(str, state.orphans.paths))
        below = None if parent is None else str(parent)
        if not children:
            return Work(target, "drop", str(frozen), parent=below, orphans=orphans)
        if live or self._merges(frozen, children, parent):
            above = state.children(children[0], folders)
            self._check(target, above)
            child, moving, size = str(children[0]), tuple(map(str, above)), state.size(children[0])
            return Work(target, "merge", str(frozen), child, moving, below, size, live, orphans)
        moving = tuple(map(str, children))
        return Work(target, "copy", str(frozen), None, moving, below, state.size(frozen), orphans=orphans)

    def _require_unneeded(self, work: Work, folders: Collection[Path]) -> None:
        """Ask who else needs what the work changes or removes; overlays have been judged already."""
        state = self._state
        images = [Path(name) for name in (work.frozen, work.child) if name is not None]
        files: list[Path] = []
        for image in images:
            with open_one(image, folders, lock=False) as link:
                files += [file.path for file in link.files]
        holders = [*self._holders, *state.needed.of_others(state.uuid)]

        def settled(holder: Holder, walk: Walk) -> bool:
            return holder.uuid == state.uuid and _keeps_reading(work, walk, holder, state.gone)

        handled = [*images, *map(Path, work.moving), *state.gone]
        found = [*state.needed.holding(files, holders, state.orphans, settled=settled)]
        found += state.needed.around(files, handled, state.orphans)
        if work.mode == "merge" and not work.live:
            names = [name for file in files for name in state.needed.census.other_names(file)]
            found += [(name.path, name.reason) for name in names if not state.orphans.has(name.path)]
        require_none(Path(work.frozen), found)

    def _goes_live(self, frozen: Path, children: Sequence[Path]) -> bool:
        """Return whether QEMU can merge into the file: only the guest's active overlay is backed by it."""
        return self._below_active(frozen, children) and node_of(frozen, self._state.written) is not None

    def _below_active(self, frozen: Path, children: Sequence[Path]) -> bool:
        return self._state.running and len(children) == 1 and place_in(self._tops, children[0]) is not None

    def _refuse_unwritten(self, target: str, frozen: Path, children: Sequence[Path]) -> None:
        """Tell why the newest snapshot of a running guest, too, may have to wait; see `live_merge`."""
        if self._below_active(frozen, children):
            reason = f"disk {target}: the guest has not written {frozen} since QEMU opened it, and a live merge into it"
            raise DomainError(
                self._state.name, f"{reason} would change its CID under {children[0]}: shut it down first"
            )

    def _merges(self, frozen: Path, children: Sequence[Path], parent: Path | None) -> bool:
        if len(children) > 1 or place_in(self._named, children[0]) is None:
            return False
        return parent is None or self._state.size(children[0]) <= self._state.size(frozen)

    def _check(self, target: str, files: Iterable[Path]) -> None:
        for file in files:
            used = place_in(self._domain_files, file) is not None
            if self._state.saved and used:
                reason = f"has a saved state, whose memory belongs to {file} as it is"
                raise DomainError(self._state.name, f"{reason}: start it, or virsh managedsave-remove it")
            if self._state.running and used:
                reason = f"disk {target}: the running guest uses {file}, and QEMU cannot merge it safely"
                raise DomainError(self._state.name, f"{reason}: shut it down first")


def _keeps_reading(work: Work, walk: Walk, holder: Holder, gone: Collection[Path]) -> bool:
    """Return whether a chain of the domain itself reads afterwards what it reads, once its XML follows the files."""
    files = walk.spelled if holder.chain.closed else [path for path in walk.files if place_in(gone, path) is None]
    below = place_in(files, work.frozen)
    if below is None:
        # The file is not in the chain by the XML; the one that goes may be, which must then be followed to it.
        return place_in(files, work.child) is None
    if below == 0 or work.mode == "drop":
        return False
    above = files[below - 1]
    return same_file(above, Path(work.child)) if work.child else place_in(map(Path, work.moving), above) is not None


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


def folders_of(intent: Intent) -> list[Path]:
    """Return where the images lie: nothing else is opened, whatever the files say of their parents."""
    named = [Path(name) for one in work_of(intent) for name in (one.frozen, one.child, one.parent, *one.moving) if name]
    files = xml.files_in(intent.old_xml) | xml.files_in(intent.snapshot_xml) | set(named)
    return sorted({folder for file in files for folder in (file.parent, real_file(file).parent)})
