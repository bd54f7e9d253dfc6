"""VMware's own lock on a disk: the folder `NAME.vmdk.lck` beside it, with a file for each program that has it open.

VMware's hosted products take no kernel locks, so no other lock shows that a virtual machine is running from the disk. A
program that was killed leaves its folder: the user may remove it.

    disk.vmdk.lck/M41216.lck     one member; D*.lck folders are there while one is taken
"""

from __future__ import annotations

import os
from pathlib import Path

from qemu_vmdk_snap.errors import LockBusy
from qemu_vmdk_snap.light import Final

_SUFFIX: Final = ".lck"


def vmware_lock(path: Path) -> Path | None:
    """Return the file or folder by which a VMware product says that it has the image open, or None.

    Raises:
        OSError: the lock's folder is there, and cannot be looked into.
    """
    folder = path.with_name(path.name + _SUFFIX)
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(_SUFFIX))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return folder / names[0] if names else None


def vmware_lock_note(path: Path) -> str | None:
    """Return the warning for reading the image while VMware may be writing it, or None."""
    try:
        held = vmware_lock(path)
    except OSError as error:
        return f"{path}: cannot determine whether VMware has it open: {error.filename}: {error.strerror}"
    return None if held is None else f"{path}: VMware has it open ({held}): its contents may be inconsistent"


def refuse_vmware_lock(path: Path) -> None:
    """Refuse to write an image that a VMware product has open.

    Raises:
        LockBusy: its lock is there.
        OSError: cannot determine whether it is there.
    """
    held = vmware_lock(path)
    if held is not None:
        words = f"VMware has it open ({held}); if no VMware product runs, remove the folder {held.parent}"
        raise LockBusy(path, "write", words)
