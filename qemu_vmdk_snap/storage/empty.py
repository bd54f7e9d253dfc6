"""An empty regular file whose name a new file may take, as `mktemp` makes one: nothing is lost with it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.storage.identity import Identity, identity_of_open
from qemu_vmdk_snap.storage.locks import lock_image

_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class EmptyFile:
    """Holds the empty file `path`, locked as an image is for writing, until a complete file takes its name."""

    def __init__(self, path: Path) -> None:
        """Open and lock it.

        Raises:
            FileExistsError: it is not empty, has another name as well, or is no regular file.
            LockBusy: another process has it open as an image.
            OSError: it cannot be opened.
        """
        self.path = path
        try:
            self._fd = os.open(path, _FLAGS)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a symbolic link, a socket, a folder
                raise _exists(path) from None
            raise
        try:
            self._require_empty()
            lock_image(self._fd, path, writable=True)
        except BaseException:
            self.close()
            raise
        self.mode = stat.S_IMODE(os.fstat(self._fd).st_mode)

    def give_name(self, temporary: Path) -> None:
        """Rename the complete file `temporary` over it, if it is still there and still empty.

        Raises:
            FileExistsError: it is not; nothing was changed.
        """
        self._require_empty()
        facts = os.lstat(self.path)
        if Identity(facts.st_dev, facts.st_ino) != identity_of_open(self._fd):
            raise _exists(self.path)
        temporary.chmod(self.mode)
        temporary.replace(self.path)

    def close(self) -> None:
        """Let go of it."""
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def _require_empty(self) -> None:
        facts = os.fstat(self._fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size or facts.st_nlink != 1:
            raise _exists(self.path)


def is_empty(path: Path) -> bool:
    """Return whether `path` is an empty regular file, and no symbolic link to one."""
    try:
        facts = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(facts.st_mode) and not facts.st_size


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
