"""Who needs a file: looked up before a file is merged into, copied up or unlinked.

Built once for a command, of two parts. What libvirt knows: every source in the XML of every domain (live, persistent,
saved) and of every snapshot of the connection, and all that these files lead to. What the files say: a census of every
folder that one of them is in. A file is identified by device and inode number, not by name.

It fails closed: a chain with a file that cannot be read may need anything, unless the XML spells out the whole chain
and the file in question is not in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from qemu_vmdk_snap import Census, Followed, Identity, StillNeeded, follow, identity_if_known, identity_of
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.state import inactive_xml, volume_resolver
from qemu_vmdk_snap.domain.xml import VolumePath
from qemu_vmdk_snap.domain.xml.named import NamedChain, NamedFile, named_chains
from qemu_vmdk_snap.domain.xml.served import direct_view
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt


class Holder(NamedTuple):
    """A chain, and who names it."""

    uuid: str
    """Of the domain."""
    owner: str
    """As text for a message: `domain b`, `snapshot s1 of domain a`."""
    snapshot: str | None
    chain: NamedChain


class Walk(NamedTuple):
    """The files of a chain, the top first: those that the XML spells out, then those that the files lead to."""

    spelled: tuple[Path, ...]
    files: tuple[Path, ...]
    unseen: tuple[Path, str] | None
    """What could not be read, and why: there may be more files."""


def same_file(one: Path, other: Path) -> bool:
    """Return whether both paths lead to one file; for files that do not exist the names count."""
    if one == other:
        return True
    mine = identity_if_known(one)
    return mine is not None and mine == identity_if_known(other)


def place_in(files: Iterable[Path], wanted: Path | str | None) -> int | None:
    """Return where in `files` the wanted file is, under whatever name."""
    if wanted is None:
        return None
    path = Path(wanted)
    return next((number for number, file in enumerate(files) if same_file(file, path)), None)


def real_file(path: Path) -> Path:
    """Return the file itself where `path` is a symbolic link to it, or leads through one."""
    return Path(os.path.realpath(path))


class Given(NamedTuple):
    """Files that the user gives up by name; a missing one is known by its name alone."""

    paths: tuple[Path, ...] = ()

    def has(self, path: Path) -> bool:
        """Return whether the file was given up."""
        return place_in(self.paths, Path(os.path.abspath(path))) is not None  # noqa: PTH100 - `..` counts as text


NOTHING: Final = Given()


@dataclass(slots=True)
class Needed:
    """What every domain and snapshot of a connection names, and the census of the folders around."""

    holders: list[Holder]
    census: Census
    walker: Walker

    @classmethod
    def read(cls, conn: libvirt.virConnect, domain: libvirt.virDomain, *, folders: Iterable[Path] = ()) -> Needed:
        """Read everything once, for a command on `domain`; `folders` are searched as well.

        Raises:
            DomainError: libvirt cannot list what is named.
            StillNeeded: a folder cannot be listed.
        """
        return cls.of([*_holders(conn, domain)], folders)

    @classmethod
    def of(cls, holders: Iterable[Holder], folders: Iterable[Path] = ()) -> Needed:
        """Return the same for these holders, and the folders around.

        Raises:
            StillNeeded: a folder cannot be listed.
        """
        holders, walker = [*holders], Walker()
        return cls(holders, Census.of(walker.folders(holders, folders)), walker)

    def of_others(self, uuid: str) -> list[Holder]:
        """Return what other domains name."""
        return [holder for holder in self.holders if holder.uuid != uuid]

    def of_domain(self, uuid: str) -> list[Holder]:
        """Return what the domain itself names, its snapshots included."""
        return [holder for holder in self.holders if holder.uuid == uuid]

    def in_use(self, uuid: str) -> list[Holder]:
        """Return every chain except those that nobody reads: the overlays in the domain's own snapshots."""
        return [holder for holder in self.holders if holder.uuid != uuid or holder.chain.role != "overlay"]

    def files_of(self, holders: Iterable[Holder]) -> list[Path]:
        """Return the existing files of their chains, each once."""
        found: dict[Identity, Path] = {}
        for holder in holders:
            for path in self.walker.walk(holder.chain).files:
                if (known := identity_if_known(path)) is not None:
                    found.setdefault(known, path)
        return sorted(found.values())

    def frozen(self, uuid: str) -> list[Path]:
        """Return every file that a snapshot of the domain names as a disk, or in its backing chain."""
        own = [one for one in self.of_domain(uuid) if one.snapshot is not None and one.chain.role == "disk"]
        return [file.path for holder in own for file in holder.chain.files]

    def holding(
        self,
        files: Collection[Path],
        holders: Iterable[Holder],
        orphans: Given,
        *,
        settled: Callable[[Holder, Walk], bool] = lambda *_: False,
        apart: Callable[[Holder], bool] = lambda _: False,
    ) -> Iterator[tuple[Path | str, str]]:
        """Yield who of the holders needs one of the files, or may: (who, the end of the sentence).

        `settled` returns whether the operation handles a chain that has one of them. `apart` says of a chain
        whose files cannot all be looked at whether it can have nothing to do with them.
        """
        wanted = {one for path in files if (one := identity_if_known(path)) is not None}
        for holder in holders:
            walk = self.walker.walk(holder.chain)
            top = next(iter(walk.spelled), None)
            at = next((n for n, one in enumerate(self.walker.identities(holder.chain)) if one in wanted), None)
            if at is not None:
                if not any(map(orphans.has, walk.files[: at + 1])) and not settled(holder, walk):
                    yield holder.owner, _how(holder, top, walk.files[at])
            elif walk.unseen is None or _is_past(holder, top) or apart(holder):
                continue
            elif not (top and orphans.has(top)) and not orphans.has(walk.unseen[0]):
                path, reason = walk.unseen
                yield path, f"{reason}, and is of the {_disk(holder)} of {holder.owner}: it may depend on it"

    def require_unneeded(
        self,
        subject: Path,
        files: Collection[Path],
        holders: Iterable[Holder],
        *,
        handled: Collection[Path] = (),
        orphans: Given = NOTHING,
    ) -> None:
        """Require that nothing needs `files`, those of the image `subject`, except the `handled`.

        Raises:
            StillNeeded: something needs one of them, or may; it names what.
        """
        require_none(subject, [*self.holding(files, holders, orphans), *self.around(files, handled, orphans)])

    def around(
        self, files: Collection[Path], handled: Collection[Path], orphans: Given
    ) -> Iterator[tuple[Path | str, str]]:
        """Yield the files that need one of `files`, or may, besides the `handled`."""
        but = {one for path in handled if (one := identity_if_known(path)) is not None}
        for found in self.census.dependents(files, but=but):
            if not orphans.has(found.path):
                yield found.path, found.reason


@dataclass(slots=True)
class Walker:
    """Follows chains, each file once."""

    _followed: dict[Identity, Followed] = field(default_factory=dict)
    _walked: dict[int, tuple[NamedChain, Walk, list[Identity | None]]] = field(default_factory=dict)
    """By the object: many snapshots of a long chain name it again and again."""

    def walk(self, chain: NamedChain) -> Walk:
        """Return the files of the chain."""
        return self._known(chain)[1]

    def identities(self, chain: NamedChain) -> list[Identity | None]:
        """Return which file each of them was when they were walked over."""
        return self._known(chain)[2]

    def _known(self, chain: NamedChain) -> tuple[NamedChain, Walk, list[Identity | None]]:
        if id(chain) not in self._walked:
            walk = self._walk(chain)
            self._walked[id(chain)] = chain, walk, [identity_if_known(path) for path in walk.files]
        return self._walked[id(chain)]

    def _walk(self, chain: NamedChain) -> Walk:
        spelled = tuple(file.path for file in chain.files)
        files: list[Path] = list(spelled)
        unseen = chain.problem
        for file in chain.files:
            found, problem = self._below(file)
            files += [path for path in found if path not in files]
            unseen = unseen or problem
        # A missing file of a chain that is spelled out hides nothing. One that cannot be read may be any file.
        hides = unseen is not None and (not chain.closed or chain.problem is not None or self._hidden(chain))
        return Walk(spelled, tuple(files), unseen if hides else None)

    def folders(self, holders: Iterable[Holder], more: Iterable[Path]) -> set[Path]:
        """Return the folders that the files of all chains are in, as they are named and as they are."""
        folders = {*more}
        for holder in holders:
            for path in self.walk(holder.chain).files:
                folders |= {path.parent, real_file(path).parent}
        return {folder for folder in folders if folder.is_dir() and not _is_of_devices(real_file(folder))}

    def _below(self, file: NamedFile) -> tuple[tuple[Path, ...], tuple[Path, str] | None]:
        try:
            known = identity_of(file.path)
        except OSError as error:
            return (), (file.path, f"cannot be looked at ({error.strerror})")
        if known is None:
            return (), None if file.raw else (file.path, "does not exist")
        if file.raw:
            return (), None
        if known not in self._followed:
            self._followed[known] = follow(file.path)
        followed = self._followed[known]
        return followed.files[1:], followed.problem

    @staticmethod
    def _hidden(chain: NamedChain) -> bool:
        for file in chain.files:
            try:
                identity_of(file.path)
            except OSError:
                return True
        return False


def require_none(subject: Path, found: Collection[tuple[Path | str, str]]) -> None:
    """Raise StillNeeded for `subject` if something that needs it was found."""
    if found:
        raise StillNeeded(subject, tuple(found))


def same_chain(one: Holder, other: Holder) -> bool:
    """Return whether both name the same files in the same order."""
    mine, others = one.chain.files, other.chain.files
    return len(mine) == len(others) and all(same_file(a.path, b.path) for a, b in zip(mine, others, strict=True))


def _is_past(holder: Holder, top: Path | None) -> bool:
    """Return whether this is a snapshot's overlay that is gone, as after a delete: nothing reads it."""
    if holder.chain.role != "overlay" or top is None:
        return False
    try:
        return identity_of(top) is None
    except OSError:
        return False


def _is_of_devices(folder: Path) -> bool:
    """Return whether the folder has devices, which are not looked at; /dev/shm has files."""
    return folder.is_relative_to("/dev") and not folder.is_relative_to("/dev/shm")


def _disk(holder: Holder) -> str:
    return "memory" if holder.chain.role == "memory" else f"disk {holder.chain.disk}"


def _how(holder: Holder, top: Path | None, file: Path) -> str:
    if holder.chain.role == "overlay":
        return f"names it as the overlay of {_disk(holder)}"
    if top is None or same_file(top, file):
        return f"has it as its {_disk(holder)} ({file})"
    return f"has it below its {_disk(holder)} ({top})"


def holders_in(text: str, uuid: str, owner: str, volume_path: VolumePath, snapshot: str | None = None) -> list[Holder]:
    """Return what one XML names."""
    return [Holder(uuid, owner, snapshot, chain) for chain in named_chains(text, volume_path)]


def is_named(conn: libvirt.virConnect, asker: libvirt.virDomain, path: Path) -> bool:
    """Return whether any domain or snapshot of the connection names the file, on behalf of a command on `asker`.

    Raises:
        DomainError: libvirt cannot list what is named.
    """
    return any(
        place_in((file.path for file in holder.chain.files), path) is not None for holder in _holders(conn, asker)
    )


def _holders(conn: libvirt.virConnect, asker: libvirt.virDomain) -> Iterator[Holder]:
    import libvirt

    asking = asker.name()
    volume_path = volume_resolver(conn, asking)
    with libvirt_errors(asking, "see what the domains of this connection name"):
        domains = conn.listAllDomains()
    for domain in domains:
        try:
            yield from _of_domain(domain, volume_path)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                continue  # it has just been removed
            raise DomainError(asking, f"cannot see what domain {domain.name()} names: {error}") from error
    store = IntentStore.of(conn)
    for uuid in store.uuids():
        if uuid != asker.UUIDString():
            yield from _pending(store, uuid, volume_path)


def _of_domain(domain: libvirt.virDomain, volume_path: VolumePath) -> Iterator[Holder]:
    uuid, owner = domain.UUIDString(), f"domain {domain.name()}"
    persistent: list[Holder] = []
    if domain.isPersistent():
        persistent = holders_in(inactive_xml(domain), uuid, owner, volume_path)
        yield from persistent
    if domain.isActive():
        # Once a live snapshot was taken through the monitor, libvirt's live XML names old tops: those that the
        # persistent one has in a chain are known already.
        named = [file.path for holder in persistent for file in holder.chain.files]
        for holder in holders_in(direct_view(domain.XMLDesc(0)), uuid, owner, volume_path):
            if not holder.chain.files or place_in(named, holder.chain.files[0].path) is None:
                yield holder
    if domain.hasManagedSaveImage():
        saved = direct_view(domain.managedSaveGetXMLDesc(0))
        yield from holders_in(saved, uuid, f"the saved state of {owner}", volume_path)
    for snapshot in domain.listAllSnapshots():
        name = snapshot.getName()
        yield from holders_in(snapshot.getXMLDesc(0), uuid, f"snapshot {name} of {owner}", volume_path, name)


def _pending(store: IntentStore, uuid: str, volume_path: VolumePath) -> Iterator[Holder]:
    """Yield what an unfinished operation is about to name."""
    try:
        intent = store.read(uuid)
    except VmdkSnapError:
        return  # a damaged record: the commands of its own domain refuse
    if intent is None:
        return
    for text in (intent.old_xml, intent.new_xml):
        if text:
            yield from holders_in(
                text, uuid, f"the unfinished {intent.operation} of domain {intent.domain}", volume_path
            )
