"""New overlays for a domain: made durable, with whatever lets QEMU open their base, and shown in storage pools."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt

    from qemu_vmdk_snap.domain.planned import PlannedDisk

_FOLLOWED: Final = ("system.posix_acl_access", "security.selinux")
"""Extended attributes that decide who may open a file. libvirt's own (trusted.libvirt.*) tell of one file alone."""


def make_overlay(domain: str, disk: PlannedDisk) -> tuple[int, int]:
    """Make the overlay, durable, with owner, mode, ACL and label of its base; return its device and inode.

    Raises:
        DomainError: it cannot be given the owner or the label; it is not left behind.
        FileExistsError: something bears the name.
    """
    base = disk.frozen.stat()
    engine.create_overlay(disk.overlay, disk.frozen, mode=0o600)
    try:
        fd = os.open(disk.overlay, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            made = os.fstat(fd)
            _own(domain, disk, fd, base, made)
            _copy_attributes(domain, disk, fd)
            # An overlay exists to be written, also on a base that was made read-only to protect it.
            os.fchmod(fd, stat.S_IMODE(base.st_mode) | stat.S_IWUSR)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        disk.overlay.unlink()
        raise
    return made.st_dev, made.st_ino


def refresh_pools(conn: libvirt.virConnect, files: Iterable[Path]) -> None:
    """Let the storage pools look again where files came or went; a pool that cannot is let alone."""
    import libvirt

    folders = {file.parent.resolve() for file in files}
    with contextlib.suppress(libvirt.libvirtError):  # the in-process driver has no pools
        for pool in conn.listAllStoragePools(libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE):
            with contextlib.suppress(libvirt.libvirtError):
                if _pool_folder(pool) in folders:
                    pool.refresh()


def _pool_folder(pool: libvirt.virStoragePool) -> Path | None:
    import xml.etree.ElementTree as ET

    text = ET.fromstring(pool.XMLDesc(0)).findtext("target/path")
    return Path(text).resolve() if text else None


def _own(domain: str, disk: PlannedDisk, fd: int, base: os.stat_result, made: os.stat_result) -> None:
    if (base.st_uid, base.st_gid) == (made.st_uid, made.st_gid):
        return
    try:
        os.fchown(fd, base.st_uid, base.st_gid)
    except PermissionError as error:
        reason = f"cannot give {disk.overlay} the owner {base.st_uid}:{base.st_gid} of {disk.frozen}: run it as root"
        raise DomainError(domain, reason) from error


def _copy_attributes(domain: str, disk: PlannedDisk, fd: int) -> None:
    try:
        there = os.listxattr(disk.frozen)
    except OSError:
        return  # a file system without any
    for name in _FOLLOWED:
        if name not in there:
            continue
        value = os.getxattr(disk.frozen, name)
        with contextlib.suppress(OSError):
            if os.getxattr(fd, name) == value:
                continue
        try:
            os.setxattr(fd, name, value)
        except OSError as error:
            reason = f"cannot give {disk.overlay} the {name} of {disk.frozen}: {error.strerror}"
            raise DomainError(domain, reason) from error
