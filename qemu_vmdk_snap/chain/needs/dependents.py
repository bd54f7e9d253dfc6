"""Who needs this file? The one authority that is asked before a file is removed, emptied, merged into or overwritten.

Images name their parents, not their children, so children are searched for: every file of the folders in question is
read for what it needs, by its head, once for a command. "Nobody" is an answer only if everything could be read:

- a file is its device and inode number; symbolic links, hard links and linked folders lead to the same one;
- whatever a file is called, and whether or not the CIDs fit, it depends on what it names;
- a name counts in each way in which some reader resolves it: as written, from the folder of the file and from that of
  the file that a symbolic link leads to, and its last part beside it;
- what cannot be read, a damaged header, a name whose file is not there, a link to a place that is not mounted: each may
  depend on the file, and is in the answer.

Files in other folders are not seen. Callers name the folders: those of the chain, those that the user allows, those
that libvirt knows of.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from qemu_vmdk_snap.chain.needs.claims import NOTHING, Claims, Reference, read_claims
from qemu_vmdk_snap.chain.resolver import Confined
from qemu_vmdk_snap.errors import CidMismatch, StillNeeded
from qemu_vmdk_snap.light import dataclass, field
from qemu_vmdk_snap.storage.identity import Identity, identity_if_known, identity_of
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT

How = Literal["parent", "extent", "data", "unknown", "name"]

_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Dependent(NamedTuple):
    """A file that needs, or may need, the one in question."""

    path: Path
    how: How
    """As its parent, as an extent or data file of its own; `name`: another name of the very file; `unknown`: it may."""
    reason: str
    """Why, as the end of a sentence about `path`."""
    parent_cid: int | None = None
    """Of a VMDK overlay: the CID that its parent is to have."""
    identity: Identity | None = None


class _File(NamedTuple):
    path: Path
    identity: Identity | None
    claims: Claims


@dataclass(slots=True)
class Census:
    """The claims of all files of some folders, read once: see the glossary in CONTRIBUTING.md."""

    folders: tuple[Path, ...]
    files: list[_File] = field(default_factory=list)
    _found: dict[str, Identity | None] = field(default_factory=dict)
    _extents: set[Identity] | None = None

    @classmethod
    def of(cls, folders: Iterable[Path | str]) -> Census:
        """Look at every file in `folders`, not below them.

        Raises:
            StillNeeded: a folder cannot be listed, so a file in it may depend on anything.
        """
        real: dict[Identity | None, Path] = {}
        for folder in folders:
            home = Path(os.path.realpath(folder))
            real.setdefault(identity_if_known(home), home)
        census = cls(tuple(real.values()))
        seen: dict[Identity, Claims] = {}
        for folder in census.folders:
            census.files += _look_through(folder, seen)
        return census

    def dependents(self, files: Collection[Path | str], *, but: Collection[Identity] = ()) -> list[Dependent]:
        """Return what needs or may need one of `files` (an image's own: descriptor and extents), by path.

        The files themselves are left out, and those in `but`, which the caller handles.
        """
        wanted = {one for path in files if (one := identity_of(path)) is not None}
        cids = {file.claims.cid for file in self.files if file.identity in wanted} - {None}
        found: list[Dependent] = []
        for file in self.files:
            if file.identity is not None and (file.identity in wanted or file.identity in but):
                continue
            dependent = self._judge(file, wanted, cids)
            if dependent is not None:
                found.append(dependent)
        return sorted(found, key=lambda one: (one.how == "unknown", one.path))

    def other_names(self, path: Path | str) -> list[Dependent]:
        """Return the other names of a file that is about to be changed in place; their users see the change.

        Hard links outside the folders cannot be named, and are reported by their number.
        """
        path = Path(path)
        facts = path.stat()
        if facts.st_nlink < 2:
            return []
        mine = Identity(facts.st_dev, facts.st_ino)
        names = {file.path for file in self.files if file.identity == mine and not file.path.is_symlink()}
        others = sorted(names - {path})
        found = [Dependent(one, "name", "is another name (a hard link) of the same file", None, mine) for one in others]
        hidden = facts.st_nlink - len(names | {path})
        if hidden > 0:
            reason = f"has {hidden} more names (hard links) elsewhere, whose users would see the change"
            found.append(Dependent(path, "name", reason, None, mine))
        return found

    def _judge(self, file: _File, wanted: Collection[Identity], cids: Collection[int | None]) -> Dependent | None:
        claims = file.claims
        for name in claims.names:
            if self._leads_to(file.path, name, wanted):
                what = {"parent": "its parent", "extent": "an extent of its own", "data": "its data file"}[name.role]
                return Dependent(file.path, name.role, f"names it as {what}", claims.parent_cid, file.identity)
        if claims.problem is not None and not (claims.blank and file.identity in self._known_extents()):
            return Dependent(file.path, "unknown", f"{claims.problem}: it may depend on it", None, file.identity)
        if claims.nameless_parent and (claims.parent_cid in cids or not self._has_cid(claims.parent_cid)):
            reason = f"has a parent (CID {claims.parent_cid:08x}) and does not name it: it may depend on it"
            return Dependent(file.path, "unknown", reason, None, file.identity)
        for name in claims.names:
            if name.role == "parent" and not self._exists(file.path, name):
                reason = f"names a parent {name.texts[0]!r} that cannot be found: it may depend on it"
                return Dependent(file.path, "unknown", reason, None, file.identity)
        return None

    def _known_extents(self) -> set[Identity]:
        """Return the files that a descriptor names as extents: the descriptor says what they need."""
        if self._extents is None:
            places = (place for file in self.files for one in file.claims.names for place in _extent(file.path, one))
            self._extents = {found for place in places if (found := self._identity_at(place)) is not None}
        return self._extents

    def _has_cid(self, cid: int | None) -> bool:
        return any(file.claims.cid == cid for file in self.files)

    def _leads_to(self, owner: Path, name: Reference, wanted: Collection[Identity]) -> bool:
        return any(self._identity_at(candidate) in wanted for candidate in candidates(owner, name))

    def _exists(self, owner: Path, name: Reference) -> bool:
        """Return whether the name leads to a file."""
        return any(self._identity_at(candidate) is not None for candidate in candidates(owner, name))

    def _identity_at(self, candidate: str) -> Identity | None:
        if candidate not in self._found:
            self._found[candidate] = identity_if_known(candidate)
        return self._found[candidate]


def require_unneeded(
    subject: Path,
    files: Collection[Path],
    census: Census,
    *,
    handled: Collection[Path] = (),
    orphans: Collection[Path] = (),
) -> None:
    """Require that nothing needs `files`, the files of the image `subject`, except what is `handled` or given up.

    `orphans` are files that the user gives up by name: each may lose what it needs.

    Raises:
        StillNeeded: something needs one of them, or may; it names what.
    """
    refuse(subject, census.dependents(files, but=_identities([*handled, *orphans])))


def require_nobody_new(subject: Path, files: Collection[Path], census: Census) -> None:
    """Require that nothing new needs `files` since `census` was made.

    Called when the operation record exists and nothing has changed yet: `create_overlay` looks for such a record when
    the overlay has its name, so one of the two sees the other.

    Raises:
        StillNeeded: something has.
    """
    known = {(one.path, one.how) for one in census.dependents(files)}
    now = Census.of(census.folders).dependents(files)
    refuse(subject, [one for one in now if (one.path, one.how) not in known])


def require_unshared(subject: Path, files: Collection[Path], census: Census, *, orphans: Collection[Path] = ()) -> None:
    """Require that only overlays need `files`, which are about to be emptied.

    Raises:
        StillNeeded: an extent belongs to another image too, or may, or has another name.
    """
    found = census.dependents(files, but=_identities(orphans))
    refuse(subject, [one for one in found if one.how != "parent"])
    require_one_name(subject, files, census, orphans=orphans)


def require_one_name(subject: Path, files: Collection[Path], census: Census, *, orphans: Collection[Path] = ()) -> None:
    """Require that each of `files`, which are about to be changed in place, has one name (no other hard link).

    Raises:
        StillNeeded: one has more, which the user has not given up by naming one of them.
    """
    given_up = _identities(orphans)
    names = [name for path in files for name in census.other_names(path)]
    refuse(subject, [name for name in names if name.identity not in given_up])


def refuse(subject: Path, dependents: Sequence[Dependent]) -> None:
    """Raise StillNeeded for `subject` where there are dependents."""
    if dependents:
        raise StillNeeded(subject, tuple((one.path, one.reason) for one in dependents))


def children_of(
    subject: Path | str,
    files: Collection[Path | str],
    census: Census,
    *,
    named: Collection[Path | str] = (),
    orphans: Collection[Path | str] = (),
) -> list[Dependent]:
    """Return the VMDK overlays that name `subject` as their parent: those that an operation may write and move.

    One that is not called .vmdk may be another program's work in progress: it is moved where the user has `named` it.

    Raises:
        StillNeeded: something else needs its `files`, or may, and the user has not given it up.
    """
    known = _identities(named)
    children: list[Dependent] = []
    others: list[Dependent] = []
    for one in census.dependents([Path(file) for file in files], but=_identities(orphans)):
        if one.how != "parent" or one.parent_cid in (None, NO_PARENT):
            others.append(one)
        elif one.path.suffix.lower() == ".vmdk" or one.identity in known:
            children.append(one)
        else:
            others.append(one._replace(reason=f"{one.reason}, and is not called .vmdk: name it (--child) to move it"))
    refuse(Path(subject), others)
    return children


def require_fit(subject: Path | str, cid: int, children: Iterable[Dependent]) -> None:
    """Raise CidMismatch for the first child whose parentCID is not `cid`: repairable while the parent exists."""
    for child in children:
        if child.parent_cid is not None and child.parent_cid != cid:
            raise CidMismatch(child.path, Path(subject), child.parent_cid, cid)


def search_folders(paths: Iterable[Path], resolver: object) -> set[Path]:
    """Return where dependents of `paths` are looked for: beside them, and in the folders that the user allows."""
    folders = {path.parent for path in paths} | {Path(os.path.realpath(path)).parent for path in paths}
    allowed = resolver.trusted if isinstance(resolver, Confined) else ()
    return folders | {folder for folder in allowed if folder.is_dir() and folder != Path("/")}


def _look_through(folder: Path, seen: dict[Identity, Claims]) -> Iterator[_File]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entries, key=lambda entry: entry.name)
        for entry in names:
            file = _look_at(entry, seen)
            if file is not None:
                yield file
    except OSError as error:
        reason = f"cannot be listed ({error.strerror}), and a file in it may depend on it"
        raise StillNeeded(folder, ((folder, reason),)) from error


def _look_at(entry: os.DirEntry[str], seen: dict[Identity, Claims]) -> _File | None:
    path = Path(entry.path)
    try:
        if not entry.is_file():
            return _dangling(path) if entry.is_symlink() and not entry.is_dir() else None
        facts = entry.stat()
        identity = Identity(facts.st_dev, facts.st_ino)
    except OSError as error:
        return _unseen(path, None, error)
    if identity in seen:
        return _File(path, identity, seen[identity])
    try:
        descriptor = os.open(entry.path, _OPEN)
    except FileNotFoundError:
        return None  # it has just been removed
    except OSError as error:
        return _unseen(path, identity, error)
    try:
        claims = read_claims(descriptor)
    except OSError as error:
        return _unseen(path, identity, error)
    finally:
        os.close(descriptor)
    seen[identity] = claims
    return _File(path, identity, claims) if claims is not NOTHING or facts.st_nlink > 1 else None


def _unseen(path: Path, identity: Identity | None, error: OSError) -> _File:
    return _File(path, identity, Claims(problem=f"cannot be read ({error.strerror})"))


def _dangling(path: Path) -> _File | None:
    """Return the entry for a symbolic link that leads nowhere: to a missing name, or a place that is not mounted."""
    target = path.parent / os.readlink(path)  # noqa: PTH115
    if target.parent.is_dir():
        return None
    reason = f"is a symbolic link into {target.parent}, which is not there"
    return _File(path, None, Claims(problem=reason))


def candidates(owner: Path, name: Reference) -> Iterator[str]:
    """Yield every path that any reader tries for a name in `owner`."""
    homes = [str(owner.parent)]
    if owner.is_symlink():
        homes.append(os.path.dirname(os.path.realpath(owner)))  # noqa: PTH120
    for home in homes:
        for text in name.texts:
            plain = text.replace("\\", "/")
            for candidate in (text, plain, plain.removeprefix("file:"), plain.rsplit("/", 1)[-1]):
                if candidate and "\0" not in candidate:
                    yield os.path.join(home, candidate)  # noqa: PTH118


def _extent(owner: Path, name: Reference) -> Iterator[str]:
    return candidates(owner, name) if name.role == "extent" else iter(())


def _identities(paths: Iterable[Path | str]) -> set[Identity]:
    return {one for path in paths if (one := identity_if_known(path)) is not None}
