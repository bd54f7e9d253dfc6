"""Owner, mode and extended attributes (access lists, labels) of a file that takes another's place, or joins it."""

from __future__ import annotations

import os
import stat

from qemu_vmdk_snap.light import Final

_ACCESS: Final = ("system.posix_acl_access", "security.selinux")
"""Extended attributes that decide who may open a file. libvirt's own (trusted.libvirt.*) belong to one file only."""


def copy_attributes(source: int, target: int, *, access_only: bool = False, mode: int = 0) -> None:
    """Give the file open as `target` the owner, the mode and the extended attributes of that open as `source`.

    `access_only` leaves out the extended attributes that do not decide who may open the file. `mode` has bits that are
    added. What is already equal is not set: that would need a privilege for nothing.

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
    for name in _attributes_of(source, access_only=access_only):
        value = os.getxattr(source, name)
        if _attribute(target, name) == value:
            continue
        try:
            os.setxattr(target, name, value)
        except OSError as error:
            raise OSError(error.errno, f"cannot give a new file the attribute {name} ({error.strerror})") from error
    os.fchmod(target, stat.S_IMODE(was.st_mode) | mode)  # last: an access list changes the mode


def _attributes_of(source: int, *, access_only: bool) -> list[str]:
    try:
        there = os.listxattr(source)
    except OSError:
        return []  # a file system without any
    return [name for name in there if not access_only or name in _ACCESS]


def _attribute(target: int, name: str) -> bytes | None:
    try:
        return os.getxattr(target, name)
    except OSError:
        return None
