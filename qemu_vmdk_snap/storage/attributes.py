"""Owner, mode and extended attributes (access lists, labels) of a file that takes another's place, or joins it."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection


def copy_attributes(source: int, target: int, *, names: Collection[str] | None = None, mode: int = 0) -> None:
    """Give the file open as `target` the owner, the mode and the extended attributes of that open as `source`.

    `names` are the extended attributes that are copied; None is for all of them. `mode` has bits that are added. What
    already equal is not set: that would need a privilege for nothing.

    Raises:
        OSError: an attribute cannot be given; the target has some of them.
    """
    was, now = os.fstat(source), os.fstat(target)
    if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        try:
            os.fchown(target, was.st_uid, was.st_gid)
        except OSError as error:
            reason = f"cannot give a new file the owner {was.st_uid}:{was.st_gid} ({error.strerror}): run it as root"
            raise OSError(error.errno, reason) from error
    for name in _attributes_of(source, names):
        value = os.getxattr(source, name)
        if _attribute(target, name) == value:
            continue
        try:
            os.setxattr(target, name, value)
        except OSError as error:
            raise OSError(error.errno, f"cannot give a new file the attribute {name} ({error.strerror})") from error
    os.fchmod(target, stat.S_IMODE(was.st_mode) | mode)  # last: an access list changes the mode


def _attributes_of(source: int, names: Collection[str] | None) -> list[str]:
    try:
        there = os.listxattr(source)
    except OSError:
        return []  # a file system without any
    return [name for name in there if names is None or name in names]


def _attribute(target: int, name: str) -> bytes | None:
    try:
        return os.getxattr(target, name)
    except OSError:
        return None
