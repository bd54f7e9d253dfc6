"""Which file a name leads to: a file is its device and inode number, whatever it is called."""

from __future__ import annotations

import os
from pathlib import Path

from qemu_vmdk_snap.light import NamedTuple


class Identity(NamedTuple):
    """A file on this machine, for as long as it is mounted: after a restart the device may have another number."""

    device: int
    inode: int


def identity_of(path: Path | str) -> Identity | None:
    """Return which file `path` leads to, symbolic links followed; None where there is none.

    Raises:
        OSError: this cannot be determined, so there may be one (no permission, an I/O error).
    """
    try:
        facts = os.stat(path)  # noqa: PTH116 - 10,000 of these are made for one command
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Identity(facts.st_dev, facts.st_ino)


def identity_if_known(path: Path | str) -> Identity | None:
    """Return which file `path` leads to; None where there is none, or where this cannot be determined."""
    try:
        return identity_of(path)
    except OSError:
        return None


def identity_of_open(descriptor: int) -> Identity:
    """Return which file the descriptor is open on."""
    facts = os.fstat(descriptor)
    return Identity(facts.st_dev, facts.st_ino)
