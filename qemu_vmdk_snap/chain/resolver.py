"""From a hint in an untrusted file to a path that may be opened.

An image can name any path as its parent or extent. What is opened is confined to the folder of the file that names it,
and to folders that the caller trusts; symbolic links are resolved first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

from qemu_vmdk_snap.errors import CorruptChain, MissingFile
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.vmdk.descriptor import spellings

Resolver = Callable[[Path, str, str], Path]
"""(the file that names it, the name, what it is: "parent" or "extent") -> the path to open."""


_allowed: ContextVar[tuple[tuple[Path, bool], ...]] = ContextVar("allowed", default=())
"""(folder, whether what is below it is allowed too)."""


@contextlib.contextmanager
def allowing(*folders: Path | str, below: bool = True) -> Iterator[None]:
    """Allow these folders to every resolver that is made in the block, in this thread; with `below` all below them too.

    For whoever knows for a whole command where images may lie, as an administrator or the XML of a domain says.
    """
    token = _allowed.set((*_allowed.get(), *((Path(folder).resolve(), below) for folder in folders)))
    try:
        yield
    finally:
        _allowed.reset(token)


class Confined:
    """The resolver that opens beside the naming file, and anywhere below `trusted_dirs` and what `allowing` names."""

    def __init__(self, trusted_dirs: Sequence[Path | str] = ()) -> None:
        allowed = _allowed.get()
        self.trusted = (*map(Path.resolve, map(Path, trusted_dirs)), *(folder for folder, below in allowed if below))
        self._alone = {folder for folder, _ in allowed}

    def __call__(self, owner: Path, name: str, role: str) -> Path:
        """Return the path to open.

        Raises:
            CorruptChain: there is none, or it may not be opened.
        """
        return _resolve(owner, name, role, self)

    def check(self, owner: Path, real: Path, role: str) -> None:
        """Refuse `real`, a path without symbolic links, where `owner` may not name it."""
        if (
            real.parent in self._alone
            or real.parent == owner.parent.resolve()
            or any(real.is_relative_to(folder) for folder in self.trusted)
        ):
            return
        reason = f"its {role} {real} is outside its folder: allow {real.parent} (--allow-dir) to follow it"
        raise CorruptChain(owner, reason)


def confined(trusted_dirs: Sequence[Path | str] = ()) -> Resolver:
    """Return the resolver that opens beside the naming file, and anywhere below `trusted_dirs`."""
    return Confined(trusted_dirs)


def check_opened(resolver: Resolver, owner: Path, file: BlockFile, role: str) -> None:
    """Refuse what was opened for `owner` if the path from `resolver` leads elsewhere by now.

    The kernel knows where the open file is, even if symbolic links changed meanwhile. Resolvers of the caller are not
    checked.

    Raises:
        CorruptChain: it is where the resolver would not have led; nothing was read.
    """
    descriptor = file.fileno()
    if descriptor is not None and isinstance(resolver, Confined):
        resolver.check(owner, Path(f"/proc/self/fd/{descriptor}").readlink(), role)


def unconfined(owner: Path, name: str, role: str) -> Path:
    """Resolve a name wherever it leads: for images whose every writer is trusted."""
    return _resolve(owner, name, role, Confined(["/"]))


def _neighbour(owner: Path, beside: Path, role: str) -> str:
    """Return a hint about a file beside `owner` with its parent's name: in a copied chain it is probably the parent."""
    if role != "parent" or not beside.is_file() or beside.samefile(owner):
        return ""
    words = f"image rebase -u -b {beside.name} {owner}"
    return f"; {beside} has its name: if that is the one, `{words}` makes it the parent"


def _places(home: Path, name: str) -> list[Path]:
    plain = name.replace("\\", "/")
    if plain.startswith("file:") and not (home / plain).exists():
        plain = plain.removeprefix("file:")
    return [home / name, home / plain, home / plain.rsplit("/", 1)[-1]]


def _resolve(owner: Path, name: str, role: str, policy: Confined) -> Path:
    """Try the name as written, as QEMU does, then its last part beside `owner`, as VMware and others do."""
    home = owner.parent
    candidates = [place for spelling in spellings(name) for place in _places(home, spelling)]
    for candidate in candidates:
        if "\0" in name or not os.path.lexists(candidate):
            continue
        real = candidate.resolve()
        try:
            policy.check(owner, real, role)
        except CorruptChain as error:
            raise CorruptChain(owner, error.reason + _neighbour(owner, candidates[2], role)) from None
        return candidate if candidate.parent == home else real
    raise MissingFile(owner, f"its {role} {name!r} does not exist")
