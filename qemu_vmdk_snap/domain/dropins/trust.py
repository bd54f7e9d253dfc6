"""Who could change a file that is about to be run or followed with our rights: root and this user, or others."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, NamedTuple

_MOST_PLACES: Final = 400
"""How many folders and links lead to a file at most: more are a loop of links."""


class Distrust(NamedTuple):
    """What others could change."""

    place: Path
    reason: str


def distrust(path: Path, owners: Collection[int] = ()) -> Distrust | None:
    """Return how others could change what `path` leads to; None where nobody could.

    Looked at are the file, every symbolic link on the way, and every folder up to /: each belongs to root, to this user
    or to one of `owners`, and nobody else may write it. A folder like /tmp, where others may make files but not rename
    ours, is accepted in the path, but not at its end.

    Raises:
        OSError: the path leads nowhere.
    """
    for place, facts in _places(path):
        reason = _reason(facts, owners, sticky=place != path)
        if reason is not None:
            return Distrust(place, reason)
    return None


def distrust_tree(folder: Path, owners: Collection[int] = ()) -> Distrust | None:
    """Return how others could change anything below the folder, or the way to it; None where nobody could.

    Raises:
        OSError: it cannot be looked through.
    """
    problem = distrust(folder, owners)
    if problem is not None:
        return problem
    for home, folders, files in os.walk(folder, onerror=_raise):
        for name in (*folders, *files):
            place = Path(home, name)
            facts = place.lstat()
            if stat.S_ISLNK(facts.st_mode):
                problem = distrust(place, owners)
                if problem is not None:
                    return problem
            reason = _reason(facts, owners, sticky=False)
            if reason is not None:
                return Distrust(place, reason)
    return None


def _reason(facts: os.stat_result, owners: Collection[int], *, sticky: bool) -> str | None:
    me = os.geteuid()
    if facts.st_uid not in {0, me, *owners}:
        return f"belongs to user {facts.st_uid}"
    if stat.S_ISLNK(facts.st_mode) or (sticky and stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_ISVTX):
        return None
    # A user's own group, which distributions make for each user, has no other member; root's is a group like others.
    own_group = facts.st_uid == facts.st_gid == me != 0
    if facts.st_mode & stat.S_IWOTH or (facts.st_mode & stat.S_IWGRP and not own_group):
        return "may be written by others than its owner"
    return None


def _places(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the file, the folders on the way to it, and the same of what each symbolic link on it leads to."""
    waiting, seen = [Path(os.path.abspath(path))], set[Path]()  # noqa: PTH100 - pathlib has none that keeps links
    while waiting and len(seen) < _MOST_PLACES:
        place = waiting.pop()
        for one in (place, *place.parents):
            if one in seen:
                continue
            seen.add(one)
            facts = one.lstat()
            yield one, facts
            if stat.S_ISLNK(facts.st_mode):
                leads = Path(os.path.realpath(one.parent), one.readlink(), place.relative_to(one))
                waiting.append(Path(os.path.normpath(leads)))
    path.stat()  # fails where a link leads nowhere, or in a loop


def _raise(error: OSError) -> None:
    raise error
