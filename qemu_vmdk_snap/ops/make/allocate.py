"""Where a new image goes: over an empty file that nothing needs, and on space that is set aside for it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.storage.blockfile import PosixFile, naming
from qemu_vmdk_snap.storage.durable import NewFiles
from qemu_vmdk_snap.storage.empty import EmptyFile, is_empty
from qemu_vmdk_snap.units import MIB

_STEP: Final = 4 * MIB


def replace_empty(files: NewFiles, path: Path) -> None:
    """Let `path` among the new `files` take the place of an empty file of that name.

    Raises:
        StillNeeded: something needs that file, or may need it.
        LockBusy, OSError: it cannot be held.
    """
    if is_empty(path):
        _require_unneeded(path)
        files.allow_empty(path)


def held_empty(path: Path, stack: contextlib.ExitStack) -> EmptyFile | None:
    """Return the empty file of that name, held until `stack` closes, or None where there is none. Raises as above."""
    if not is_empty(path):
        return None
    _require_unneeded(path)
    empty = EmptyFile(path)
    stack.callback(empty.close)
    return empty


def _require_unneeded(path: Path) -> None:
    from qemu_vmdk_snap.chain.needs.dependents import Census, require_unneeded, search_folders  # rarely needed

    require_unneeded(path, [path], Census.of(search_folders([path], None)))


def preallocate(file: PosixFile, size: int, how: str) -> None:
    """Set aside the space of a raw image of `size` bytes: not at all (off), as the file system can, or by writing it.

    Raises:
        InvalidRequest: there is no such way.
        OSError: there is not so much space.
    """
    if how not in ("off", "falloc", "full"):
        raise InvalidRequest("-o preallocation", f"{how!r} must be off, falloc or full")
    if how == "falloc" and size:
        with naming(file.path):
            os.posix_fallocate(file.fileno(), 0, size)
    if how == "full":
        for offset in range(0, size, _STEP):
            file.write_at(offset, bytes(min(_STEP, size - offset)))
