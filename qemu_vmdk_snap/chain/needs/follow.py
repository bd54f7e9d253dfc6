"""Everything that a file needs: parents of any format, extents, data files; read with tolerance.

The counterpart of the search for dependents: what a file needs, wherever that is, whatever the CIDs say, and in each
way in which some reader resolves a name.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

from qemu_vmdk_snap.chain.needs.claims import Claims, Reference, read_claims
from qemu_vmdk_snap.chain.needs.dependents import candidates
from qemu_vmdk_snap.storage.identity import Identity, identity_of

_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Followed(NamedTuple):
    """What was found below a file."""

    files: tuple[Path, ...]
    """The file itself and all that it leads to, nearest first; each file once."""
    problem: tuple[Path, str] | None
    """A file that could not be followed, and why, as the end of a sentence: there may be more."""


def follow(path: Path | str) -> Followed:
    """Return every file that `path` needs, as far as it can be read."""
    path = Path(path)
    files: list[Path] = []
    problem: tuple[Path, str] | None = None
    seen: set[Identity] = set()
    queue = [(path, False)]
    while queue:
        here, is_extent = queue.pop(0)
        try:
            identity = identity_of(here)
            if identity is None:
                problem = problem or (here, "does not exist")
                continue
            if identity in seen:
                continue
            seen.add(identity)
            files.append(here)
            claims = _claims(here)
        except OSError as error:
            problem = problem or (here, f"cannot be read ({error.strerror})")
            continue
        if is_extent and claims.blank:
            continue  # the descriptor that names it says what it needs
        below, lost = _below(here, claims)
        queue += below
        problem = problem or (None if lost is None else (here, lost))
    return Followed(tuple(files), problem)


def _claims(path: Path) -> Claims:
    descriptor = os.open(path, _OPEN)
    try:
        kind = os.fstat(descriptor).st_mode
        return read_claims(descriptor) if stat.S_ISREG(kind) or stat.S_ISBLK(kind) else Claims()
    finally:
        os.close(descriptor)


def _below(owner: Path, claims: Claims) -> tuple[list[tuple[Path, bool]], str | None]:
    """Return the files that the claims lead to, each with whether it is an extent, and why there may be more."""
    lost = claims.problem
    if claims.nameless_parent:
        lost = lost or f"has a parent (CID {claims.parent_cid:08x}) and does not name it"
    below: list[tuple[Path, bool]] = []
    for name in claims.names:
        found = [place for text in candidates(owner, name) if _is_file(place := Path(text))]
        below += [(place, name.role == "extent") for place in found]
        if not found and name.role == "parent" and not _remote(name):
            lost = lost or f"names a parent {name.texts[0]!r} that cannot be found"
    return below, lost


def _is_file(path: Path) -> bool:
    """Return whether there is a file; one that cannot be looked at counts."""
    try:
        kind = os.stat(path).st_mode  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return not stat.S_ISDIR(kind)


def _remote(name: Reference) -> bool:
    return all("://" in text for text in name.texts)
