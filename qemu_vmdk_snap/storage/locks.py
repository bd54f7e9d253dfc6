"""QEMU's image locks, so that QEMU and this package exclude each other.

QEMU takes shared open-file-description locks on single bytes of the image: byte 100 + n says "I use permission n", byte
200 + n says "I do not share permission n". A user that wants n checks that nobody locks 200 + n, and one that does not
share n checks that nobody locks 100 + n. Source: QEMU 7.2, block/file-posix.c, raw_apply_lock_bytes and
raw_check_lock_bytes.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from pathlib import Path

from qemu_vmdk_snap import log
from qemu_vmdk_snap.errors import LockBusy
from qemu_vmdk_snap.light import Final

_log = log.of(__name__)

_USED: Final = 100
_UNSHARED: Final = 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3
_NAMES: Final = {_CONSISTENT_READ: "consistent read", _WRITE: "write", _RESIZE: "resize"}
_FLOCK: Final = struct.Struct("hhxxxxqqixxxx")  # type, whence, start, len, pid: struct flock of 64-bit Linux
WHOLE_FILE: Final = _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0)
"""An exclusive lock on a whole file that is no image, for F_OFD_SETLK and F_OFD_GETLK."""
UNLOCKED: Final = _FLOCK.pack(fcntl.F_UNLCK, 0, 0, 0, 0)[:2]
"""How the answer of F_OFD_GETLK begins where nobody has such a lock."""
_NO_OFD_LOCKS: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def lock_image(fd: int, path: Path, *, writable: bool, share_writes: bool = False) -> None:
    """Hold `fd` as QEMU holds an image: for reading (nobody may write), or for writing (nobody else may).

    `share_writes` lets others write meanwhile, as `qemu-img -U` does; a lock against reading still excludes this one.
    Closing the descriptor releases the locks. A file system without such locks is used unlocked, as QEMU does.

    Raises:
        LockBusy: the image is open elsewhere, in this or another process, with a conflicting lock.
    """
    used = (_CONSISTENT_READ, _WRITE, _RESIZE) if writable else (_CONSISTENT_READ,)
    unshared = () if share_writes else (_WRITE, _RESIZE)
    try:
        for byte in [*(_USED + n for n in used), *(_UNSHARED + n for n in unshared)]:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
    except OSError as error:
        if error.errno in _NO_OFD_LOCKS:
            return
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise LockBusy(path, "image") from error
        raise
    # First lock, then check: of two that start together both may fail, but never both succeed.
    for n in used:
        _check(fd, path, _UNSHARED + n, n)
    for n in unshared:
        _check(fd, path, _USED + n, n)
    _log.debug("%s: locked for %s", path, "writing" if writable else "reading")


def keep_from_writers(fd: int) -> None:
    """Turn the write lock of `lock_image` into a read lock: others may read again, and nobody may write.

    No lock is released between the two, so no writer can come in between.
    """
    for n in (_WRITE, _RESIZE):
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, _USED + n, 1, 0))
        except OSError as error:
            if error.errno not in _NO_OFD_LOCKS:
                raise


def let_go(fd: int) -> None:
    """Give up every lock that `lock_image` gave, for another descriptor of the same file that holds its own."""
    for byte in (*(_USED + n for n in _NAMES), *(_UNSHARED + n for n in _NAMES)):
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, byte, 1, 0))
        except OSError as error:
            if error.errno not in _NO_OFD_LOCKS:
                raise


def _check(fd: int, path: Path, byte: int, permission: int) -> None:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
        kind = "shared" if byte >= _UNSHARED else "exclusive"
        raise LockBusy(path, f"{kind} {_NAMES[permission]}")
