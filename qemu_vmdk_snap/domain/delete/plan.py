"""What deleting snapshots will do to the files and the XML, worked out before anything is changed, several in a row."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qemu_vmdk_snap import Link, children_of, confined, open_chain, open_link, open_posix, require_fit
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.delete.work import Work, change_of, work_of
from qemu_vmdk_snap.domain.journal.overlays import is_empty
from qemu_vmdk_snap.domain.journal.record import Intent, Merge
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
from qemu_vmdk_snap.domain.served.server import statuses
from qemu_vmdk_snap.domain.state import inactive_xml, volume_resolver
from qemu_vmdk_snap.domain.xml.kept import kept_branches
from qemu_vmdk_snap.domain.xml.nvram import frozen_nvram
from qemu_vmdk_snap.domain.xml.origin import refuse_foreign
from qemu_vmdk_snap.errors import DomainError, NoSnapshot, NotWhileRunning, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

Scope = Literal["one", "children", "children-only"]


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
    served: dict[str, list[Path]] = field(default_factory=dict)
    """Of a running guest: target -> chain that its server serves, the top first."""
    moved: tuple[tuple[Path, Path | None], ...] = ()
    """Images that would have another parent; the last entry of an image counts."""
    gone: tuple[Path, ...] = ()
    grown: tuple[tuple[Path, int], ...] = ()
    """Bytes that images would have got."""
    _named: list[Path] | None = field(default=None, init=False)

    @classmethod
    def read(cls, conn: libvirt.virConnect, domain: libvirt.virDomain, orphans: Collection[Path] = ()) -> State:
        """Return the current state; `orphans` are files that the user gives up."""
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
                _served_chains(domain) if domain.isActive() else {},
            )

    def after(self, intent: Intent) -> State:
        """Return what would be there after the delete."""
        left = {**self.snapshots, **dict(intent.snapshots)}
        for name in intent.names:
            del left[name]
        moved, gone, grown = [*self.moved], [*self.gone], [*self.grown]
        for one in work_of(intent):
            onto = one.frozen if one.mode == "merge" else one.parent
            moved += [(Path(image), None if onto is None else Path(onto)) for image in one.moving]
            moved += [(Path(image), None if one.parent is None else Path(one.parent)) for image in one.copied]
            grown += [(Path(image), one.size) for image in ([one.frozen] if one.mode == "merge" else one.moving)]
            gone += [one.removed] if one.removed else []
        for merge in intent.merges:
            moved.append((Path(merge.links[0]), None if merge.below is None else Path(merge.below)))
            grown.append((Path(merge.links[0]), merge.size))
            gone += map(Path, merge.links[1:])
        return replace(
            self,
            domain_xml=intent.new_xml,
            snapshots=left,
            moved=tuple(moved),
            gone=tuple(gone),
            grown=tuple(grown),
        )

    def holders(self, besides: Collection[str]) -> list[Holder]:
        """Return what the domain and its snapshots name, without those that go, and what a live disk has."""
        names = {name: f"snapshot {name} of domain {self.name}" for name in self.snapshots}
        found = holders_in(self.domain_xml, self.uuid, f"domain {self.name}", self.volume_path)
        for name, text in self.snapshots.items():
            if name not in besides:
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
        if self._named is None:  # many questions, and long XML
            self._named = sorted(set().union(*map(xml.files_in, (self.domain_xml, *self.snapshots.values()))))
        return self._named

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


def _served_chains(domain: libvirt.virDomain) -> dict[str, list[Path]]:
    found = statuses(domain.name(), inactive_xml(domain))
    return {target: [*map(Path, said["chain"])] for target, said in found.items() if said is not None}


def memory_of(state: State, names: Collection[str], name: str) -> Path | None:
    """Return the file with the snapshot's memory, which none but those that go have.

    Raises:
        DomainError: it could not be deleted.
    """
    memory = xml.parse_snapshot(state.snapshots[name]).memory_file
    others = (text for other, text in state.snapshots.items() if other not in names)
    if memory is None or any(xml.parse_snapshot(text).memory_file == memory for text in others):
        return None
    if memory.exists() and not os.access(memory.parent, os.W_OK | os.X_OK):
        raise DomainError(state.name, f"{memory.parent} may not be written, so the memory {memory} cannot be deleted")
    return memory


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


def require_ours(domain: libvirt.virDomain, names: Sequence[str]) -> None:
    """Accept snapshots that were all made here: none is deleted where another one of them cannot be.

    Raises:
        DomainError: one was not.
    """
    with libvirt_errors(domain.name(), "read its snapshots"):
        texts = {one.getName(): one.getXMLDesc(0) for one in domain.listAllSnapshots()}
    for name in names:
        refuse_foreign(domain.name(), xml.parse_snapshot(texts[name]))


def make_intent(state: State, name: str, *, metadata: bool) -> Intent:
    """Return the record of a delete; nothing has changed yet.

    Raises:
        DomainError: there is no such snapshot, or its files are in use.
    """
    if name not in state.snapshots:
        raise NoSnapshot(state.name, f"has no snapshot {name!r}", snapshot=name)
    work: list[Work] = []
    if not metadata:
        planner = Planner(state, [name])
        saved = xml.parse_snapshot(state.snapshots[name], state.volume_path)
        refuse_foreign(state.name, saved)
        for disk in saved.disks:
            work += planner.plan(disk) if disk.mode == "external" else []
    return intent_of(state, [name], work, metadata=metadata)


def intent_of(
    state: State,
    names: Sequence[str],
    work: Sequence[Work],
    merges: Sequence[Merge] = (),
    *,
    metadata: bool = False,
) -> Intent:
    """Return the record of the deletes of these snapshots in one step."""
    texts = {other: text for other, text in state.snapshots.items() if other not in names}
    change = change_of(work, merges)
    parents = {other: xml.parse_snapshot(text).parent for other, text in state.snapshots.items()}
    changed = {other: xml.relink(text, change) for other, text in texts.items()}
    for other in texts:
        parent = parents[other]
        while parent is not None and parent in names:
            parent = parents[parent]
        if parent != parents[other]:
            changed[other] = xml.with_parent(changed[other], parent)
    for other in set().union(*(_descendants(name, parents) for name in names)) - set(names):
        changed[other] += "\n"  # libvirt itself changes their XML when it forgets one above them
    gone = names if work or merges else ()  # where libvirt alone is to forget them, every file stays
    return Intent(
        uuid=state.uuid,
        domain=state.name,
        snapshot=names[0],
        overlays=(),
        old_xml=state.domain_xml,
        new_xml=xml.relink(state.domain_xml, change),
        snapshot_xml=state.snapshots[names[0]],
        operation="delete",
        current=state.current,
        work=tuple(one.as_record() for one in work),
        snapshots=tuple((other, text) for other, text in changed.items() if text != texts[other]),
        merges=tuple(merges),
        nvram=tuple(str(copy) for name in gone if (copy := frozen_nvram(state.snapshots[name])) is not None),
        also=tuple(names[1:]),
        memories=() if metadata else tuple(str(file) for name in names if (file := memory_of(state, names, name))),
    )


def _descendants(name: str, parents: Mapping[str, str | None]) -> set[str]:
    found: set[str] = set()
    while more := {one for one, parent in parents.items() if parent == name or parent in found} - found:
        found |= more
    return found


class Planner:
    """Finds out what can be done with the files of one domain."""

    def __init__(self, state: State, names: Collection[str]) -> None:
        self._state = state
        others = [text for name, text in state.snapshots.items() if name not in names]
        self._domain_files = sorted(xml.files_in(state.domain_xml))
        texts = [xml.domain_of(text) for text in others]
        self._frozen = self._tops_of(*texts)
        self._tops = self._tops_of(state.domain_xml)
        self._named = sorted(set(self._domain_files).union(*(xml.files_in(text) for text in texts)))
        self._holders = state.holders(besides=names)

    def _tops_of(self, *texts: str) -> list[Path]:
        disks = [disk for text in texts for disk in xml.list_disks(text, self._state.volume_path)]
        return [disk.path for disk in disks if disk.path is not None]

    def plan(self, disk: xml.SnapshotDisk) -> list[Work]:
        """Return what happens to the disk, step by step.

        Raises:
            DomainError: its file is in use where nothing can be done about it.
            StillNeeded: something else needs one of the files that would be changed or deleted, or may need it.
            CidMismatch: an overlay does not fit the file that it would be merged into, or lose.
        """
        if disk.frozen is None:
            raise DomainError(self._state.name, f"disk {disk.target} of the snapshot has no file: try --metadata")
        frozen = disk.frozen
        if self.is_kept(frozen):
            return [Work(disk.target, "keep", str(frozen))]
        folders = self.folders(frozen)
        state = self._state
        children, parent = state.children(frozen, folders), state.parent(frozen, folders)
        if (target := self._server_of(frozen)) is not None:
            work = self._by_server(target, frozen, children, parent)
            self._require_unneeded(work, folders, ())
            return [work]
        empty = self.empty(children, folders)
        children = [child for child in children if child not in empty]
        self._check(disk.target, [frozen, *children])
        dropped = [Work(disk.target, "empty", str(one), parent=str(frozen)) for one in empty]
        work = self._work(disk.target, frozen, children, parent, folders)
        self._require_unneeded(work, folders, empty)
        return [*dropped, work]

    def is_kept(self, frozen: Path) -> bool:
        """Return whether the file is a disk of another snapshot, or of the domain."""
        return place_in([*self._frozen, *self._tops], frozen) is not None

    def folders(self, frozen: Path) -> set[Path]:
        """Return where the files of the domain lie, and this one."""
        folders = {file.parent for file in self._named} | {frozen.parent}
        return folders | {real_file(folder) for folder in folders} | {real_file(file).parent for file in self._named}

    def empty(self, children: Sequence[Path], folders: Collection[Path]) -> list[Path]:
        """Return the overlays without data that a revert has left, which nothing names and nothing is backed by."""
        left = kept_branches(self._state.domain_xml)
        found = []
        for child in children:
            if place_in(left, child) is None or place_in(self._named, child) is not None:
                continue
            with contextlib.suppress(VmdkSnapError, OSError):
                if not self._state.children(child, folders):
                    with open_one(child, folders, lock=False) as link:
                        found += [child] if is_empty(link) else []
        return found

    def _work(
        self, target: str, frozen: Path, children: Sequence[Path], parent: Path | None, folders: Collection[Path]
    ) -> Work:
        state = self._state
        orphans = tuple(map(str, state.orphans.paths))
        below = None if parent is None else str(parent)
        if not children:
            return Work(target, "drop", str(frozen), parent=below, orphans=orphans)
        child, how = self._cheapest(frozen, children, parent)
        if child is None:
            moving = tuple(map(str, children))
            return Work(target, "copy", str(frozen), None, moving, below, state.size(frozen), orphans=orphans)
        above = state.children(child, folders)
        self._check(target, above)
        others = tuple(str(one) for one in children if one != child)
        work = Work(target, "merge", str(frozen), str(child), tuple(map(str, above)), below, orphans=orphans)
        if how == "siblings":
            return replace(work, size=state.size(child), siblings=others)
        return replace(work, size=state.size(child), copied=others, copy_size=state.size(frozen) if others else 0)

    def _cheapest(self, frozen: Path, children: Sequence[Path], parent: Path | None) -> tuple[Path | None, str]:
        """Return the child that is merged down, and what becomes of the others: `siblings` or `copied`.

        None: the data goes up into all of them.
        """
        size, count = self._state.size(frozen), len(children)
        ways: list[tuple[int, int, Path | None, str]] = []
        if parent is not None or count > 1 or place_in(self._named, children[0]) is None:
            ways.append((size * count, 2, None, ""))
        for child in children:
            if place_in(self._named, child) is None:
                continue  # nothing would say under which name it is found then
            own = self._state.size(child)
            ways.append((own + size * (count - 1), 0, child, "copied"))
            if count > 1 and place_in(self._frozen, child) is not None:  # never written, as those backed by it must be
                ways.append((own * count, 1, child, "siblings"))
        _, _, best, how = min(ways, key=lambda way: way[:2])
        return best, how

    def _server_of(self, frozen: Path) -> str | None:
        """Return the target of the running guest whose server has the file in its chain."""
        chains = self._state.served.items()
        return next((target for target, chain in chains if place_in(chain, frozen) is not None), None)

    def _by_server(self, target: str, frozen: Path, children: Sequence[Path], parent: Path | None) -> Work:
        """Return the work of a server: what the file holds goes up into the image above, and the guest writes on."""
        state, chain = self._state, self._state.served[target]
        at = place_in(chain, frozen)
        above = None if not at else place_in(children, chain[at - 1])
        if above is None:
            raise DomainError(state.name, f"disk {target}: its server does not serve {frozen} as the parent of another")
        into = children[above]
        others = [child for child in children if child is not into]
        self._check(target, others)
        below, orphans = None if parent is None else str(parent), tuple(map(str, state.orphans.paths))
        size, moving = state.size(frozen), (str(into), *map(str, others))
        return Work(target, "copy", str(frozen), None, moving, below, size, orphans=orphans, served=True)

    def _require_unneeded(self, work: Work, folders: Collection[Path], dropped: Collection[Path]) -> None:
        """Ask who else needs what the work changes or removes; overlays have been judged already."""
        state = self._state
        images = [Path(name) for name in (work.frozen, work.child) if name is not None]
        files = files_of(images, folders)
        holders = [*self._holders, *state.needed.of_others(state.uuid)]

        def settled(holder: Holder, walk: Walk) -> bool:
            return holder.uuid == state.uuid and _keeps_reading(work, walk, holder, state.gone)

        handled = [*images, *map(Path, (*work.moving, *work.siblings, *work.copied)), *dropped, *state.gone]
        apart = self.other_disks(work.target)
        found = [*state.needed.holding(files, holders, state.orphans, settled=settled, apart=apart)]
        found += state.needed.around(files, handled, state.orphans)
        if work.mode == "merge":
            found += self.other_names(files)
        require_none(Path(work.frozen), found)

    def other_disks(self, target: str) -> Callable[[Holder], bool]:
        """Return what says of a chain whether it is of another disk in one of the domain's own snapshots.

        Where such a disk has lost its folder, that snapshot is broken, and has nothing to do with this disk.
        """
        uuid = self._state.uuid
        return lambda holder: holder.uuid == uuid and holder.snapshot is not None and holder.chain.disk != target

    def other_names(self, files: Collection[Path]) -> list[tuple[Path, str]]:
        """Return the other names of files whose users would see a change, and what to say of each."""
        state = self._state
        names = [name for file in files for name in state.needed.census.other_names(file)]
        return [(name.path, name.reason) for name in names if not state.orphans.has(name.path)]

    def _check(self, target: str, files: Iterable[Path]) -> None:
        for file in files:
            used = place_in(self._domain_files, file) is not None
            if self._state.saved and used:
                reason = f"has a saved state, whose memory belongs to {file} as it is"
                raise DomainError(self._state.name, f"{reason}: start it, or virsh managedsave-remove it")
            if self._state.running and used:
                raise NotWhileRunning(self._state.name, f"disk {target}: the running guest uses {file}")


def files_of(images: Iterable[Path], folders: Collection[Path]) -> list[Path]:
    """Return every file of the images."""
    files: list[Path] = []
    for image in images:
        with open_one(image, folders, lock=False) as link:
            files += [file.path for file in link.files]
    return files


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
    if work.child and same_file(above, Path(work.child)):
        return True
    handled = (*work.siblings, *work.copied) if work.child else work.moving
    return place_in(map(Path, handled), above) is not None


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
    work = work_of(intent)
    named = [Path(name) for one in work for name in (one.frozen, one.child, one.parent, *one.handled) if name]
    named += [Path(name) for one in intent.merges for name in (*one.links, one.image, one.upper)]
    files = xml.files_in(intent.old_xml) | xml.files_in(intent.snapshot_xml) | set(named)
    return sorted({folder for file in files for folder in (file.parent, real_file(file).parent)})
