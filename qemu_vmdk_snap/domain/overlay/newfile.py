"""New overlays for a domain: durable, with the attributes that let QEMU open them, and shown in storage pools."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt

    from qemu_vmdk_snap.domain.overlay.planned import PlannedDisk


def make_overlay(domain: str, disk: PlannedDisk) -> tuple[int, int]:
    """Make the empty overlay of a disk, durable, with owner, mode, ACL and label of its base; return (device, inode).

    Raises:
        DomainError: it cannot be given the owner or the label; no file is left.
        FileExistsError: the name exists.
    """
    engine.create_overlay(disk.overlay, disk.frozen, mode=0o600)
    # An overlay must be writable, also on a base that was made read-only to protect it.
    return follow_base(domain, disk.overlay, disk.frozen)


def follow_base(domain: str, path: Path, model: Path, mode: int = stat.S_IWUSR) -> tuple[int, int]:
    """Give the new file `path` owner, mode, ACL and label of `model`, durably; return its device and inode.

    `mode` are bits that are set besides those of `model`.

    Raises:
        DomainError: it cannot be given the owner or the label; no file is left.
    """
    try:
        with contextlib.ExitStack() as stack:
            base = _opened(model, os.O_RDONLY, stack)
            fd = _opened(path, os.O_RDWR | os.O_NOFOLLOW, stack)
            made = os.fstat(fd)
            try:
                engine.copy_attributes(base, fd, access_only=True, mode=mode)
            except OSError as error:
                raise DomainError(domain, f"{path}: {error.strerror}") from error
            os.fsync(fd)
    except BaseException:
        path.unlink()
        raise
    return made.st_dev, made.st_ino


def _opened(path: Path, flags: int, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def refresh_pools(conn: libvirt.virConnect, files: Iterable[Path]) -> None:
    """Refresh the storage pools of folders in which files changed; a pool that cannot be refreshed is ignored."""
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
