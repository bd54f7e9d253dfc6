"""Files that an operation makes before they get their names, each in a folder whose name nobody else can have.

So that a file is known to be the operation's at every moment, a kill between two steps included:

    1  the record names the folder, which is random, and the file that is to come
    2  the folder is made, and in it the file, complete and durable
    3  the record has its device and inode
    4  it gets its name, never over another file
    5  the folder goes
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def make_staged(staged: Path, make: Callable[[Path], object]) -> tuple[int, int]:
    """Make the folder and let `make` make the file in it; return device and inode of the file."""
    staged.parent.mkdir(mode=0o700)
    make(staged)
    facts = staged.stat()
    return facts.st_dev, facts.st_ino


def publish_staged(staged: Path, path: Path) -> None:
    """Give the file its name; done again it does no harm.

    Raises:
        FileExistsError: something else bears the name.
    """
    if staged.exists():
        if not (path.exists() and path.samefile(staged)):
            path.hardlink_to(staged)
        sync_folder(path.parent)
    drop_staged(staged)


def drop_staged(staged: Path) -> None:
    """Remove what was made in the folder, whole or not, and the folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for inside in staged.parent.iterdir():
            inside.unlink()
        staged.parent.rmdir()


def is_ours(path: Path, work: Mapping[str, Any]) -> bool:
    """Return whether the file that bears the name is the one that the record tells of."""
    identity = work.get("identity")
    if not isinstance(identity, (list, tuple)) or not os.path.lexists(path):
        return False
    facts = path.lstat()
    # After a restart of the machine devices may have other numbers.
    return bool(facts.st_ino == identity[1])


def sync_folder(folder: Path) -> None:
    """Return when the names in the folder are durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
