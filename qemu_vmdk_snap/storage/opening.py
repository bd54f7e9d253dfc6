"""Opening an image locked: used by everything that changes it or must not see it change.

Some operations put a new file in an image's place by renaming it over the old one. Who has opened the old file and
locks it after that holds a file without a name: whatever is written there is lost. So the name is looked at again
after locking, and the image opened again if it leads elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.errors import LockBusy
from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener
from qemu_vmdk_snap.storage.identity import identity_of, identity_of_open
from qemu_vmdk_snap.storage.locks import lock_image

_TRIES: Final = 10


def open_locked(path: Path, opener: FileOpener, *, writable: bool, share_writes: bool = False) -> BlockFile:
    """Return `path` open and locked as `lock_image` says; the name leads to the file that is locked.

    Raises:
        LockBusy: the image is open elsewhere with a conflicting lock, or the file is replaced again and again.
        OSError: it cannot be opened.
    """
    for _ in range(_TRIES):
        file = opener(path, writable)
        try:
            descriptor = file.fileno()
            if descriptor is None:  # a disk that a test put under the engine: no other user exists
                return file
            lock_image(descriptor, path, writable=writable, share_writes=share_writes)
            if identity_of(path) == identity_of_open(descriptor):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    raise LockBusy(path, "image")
