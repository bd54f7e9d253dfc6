"""The port through which every byte of an image passes, and its POSIX adapter.

Tests put a recorder or a bytearray in its place; nothing above this floor calls `os` on an image.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path

from qemu_vmdk_snap.light import Final, Protocol, Self

Buffer = bytes | bytearray | memoryview
_SYNC_FILE_RANGE_WRITE: Final = 2
_SYNC_FILE_RANGE_ALL: Final = 7
"""Wait for what is being written, write the rest, wait for that."""
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_NOT_OFFERED: Final = (errno.ENOSYS, errno.ESPIPE, errno.EINVAL)
"""What a file system says that has no such call. Anything else is about the data."""


class BlockFile(Protocol):
    """A random-access file; offsets and lengths are bytes. Writes are read back at once, and durable after `flush`."""

    @property
    def path(self) -> Path:
        """The name to show in messages."""

    def size(self) -> int:
        """Return the length of the file."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes at `offset`: fewer only where the file ends."""

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset` on and return how many bytes there were: fewer only where the file ends."""

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`, extending the file where needed."""

    def truncate(self, size: int) -> None:
        """Set the length of the file; what is added reads as zeros."""

    def flush(self) -> None:
        """Return when everything written so far is durable."""

    def begin_flush(self, offset: int, length: int) -> None:
        """Let the system begin to store the range, without waiting: a later `flush` has less to wait for."""

    def drop_behind(self, offset: int, length: int) -> None:
        """Store the range and drop it from the page cache, so that a copy does not evict pages that are in use.

        The range is not durable before `flush`.
        """

    def discard_range(self, offset: int, length: int) -> bool:
        """Make the range a hole that reads as zeros, the length of the file unchanged; False where there are no holes.

        Not durable before `flush`. Where it returns False nothing has changed.
        """

    def next_data(self, offset: int) -> int:
        """Return the first offset from `offset` on that may hold data: all before it reads as zeros."""

    def next_hole(self, offset: int) -> int:
        """Return the end of the data that begins at `offset`: where the next hole of the file begins, or its size."""

    def fileno(self) -> int | None:
        """Return a descriptor that the kernel can copy from and to, or None where there is none."""

    def close(self) -> None:
        """Close the file; closing twice does nothing."""


class naming:  # a class, as it is entered for every read and write
    """Put the name of the file into an OSError of the block: an error from a file descriptor has none."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, *rest: object) -> None:
        """Name the file where no other is named."""
        if isinstance(exc, OSError) and exc.filename is None:
            exc.filename = str(self._path)


class PosixFile:
    """A regular file opened by path.

    Threads: any number may call every method but `close` at once; a read or a write is a system call with its own
    offset. `close` is for when no other call runs.
    """

    def __init__(self, fd: int, path: Path, *, lazy: bool = False) -> None:
        """Take over `fd`; a `lazy` file is left to the page cache, as no caller waits for the disk."""
        self._fd = fd
        self._path = path
        self._lazy = lazy
        self._failed: OSError | None = None

    @classmethod
    def open(cls, path: Path | str, *, writable: bool = False, devices: bool = False) -> Self:
        """Open an existing regular file, or, where `devices` allows it, a block device.

        Raises:
            OSError: it cannot be opened, or it is something else (a fifo is never followed).
        """
        # O_NONBLOCK: a fifo planted under an image's name must not hang the open.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(path, flags)
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or (devices and stat.S_ISBLK(mode))):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return cls(fd, Path(path))

    @property
    def path(self) -> Path:
        """The path it was opened by."""
        return self._path

    def size(self) -> int:
        """Return the length of the file, or of the device, in bytes."""
        facts = os.fstat(self._fd)
        return facts.st_size if stat.S_ISREG(facts.st_mode) else os.lseek(self._fd, 0, os.SEEK_END)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes at `offset`: fewer only where the file ends."""
        with naming(self._path):
            data = os.pread(self._fd, length, offset)
            if len(data) == length or not data:
                return data
            parts = [data]
            done = len(data)
            while done < length and (data := os.pread(self._fd, length - done, offset + done)):
                parts.append(data)
                done += len(data)
        return b"".join(parts)

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset` on and return how many bytes there were."""
        with naming(self._path):
            done = os.preadv(self._fd, [view], offset)
            while 0 < done < len(view):
                more = os.preadv(self._fd, [view[done:]], offset + done)
                if not more:
                    break
                done += more
        return done

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`."""
        with naming(self._path):
            done = os.pwrite(self._fd, data, offset)
            view = memoryview(data)
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)

    def truncate(self, size: int) -> None:
        """Set the length of the file."""
        with naming(self._path):
            os.ftruncate(self._fd, size)

    def flush(self) -> None:
        """Return when everything written so far is durable.

        Raises:
            OSError: a flush failed, now or earlier. The kernel reports a page that it could not store only once, and
                treats it as clean afterwards: a later fdatasync would succeed although data is lost.
        """
        if self._failed is not None:
            reason = f"an earlier flush failed ({self._failed.strerror}): what was written before it may be lost"
            raise OSError(self._failed.errno, reason, str(self._path))
        with naming(self._path):
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._failed = error
                raise

    def begin_flush(self, offset: int, length: int) -> None:
        """Let the kernel begin to write back the dirty pages of the range, without waiting."""
        if not self._lazy:
            _sync_file_range(self._fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def drop_behind(self, offset: int, length: int) -> None:
        """Wait until the range is written back, and drop it from the page cache.

        Raises:
            OSError: the disk did not take it. The kernel reports that only once: a later `flush` would succeed.
        """
        if self._lazy:
            return
        failed = _sync_file_range(self._fd, offset, length, _SYNC_FILE_RANGE_ALL)
        if failed in _NOT_OFFERED:
            return
        if failed:
            with naming(self._path):
                self._failed = OSError(failed, os.strerror(failed))
                raise self._failed
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def discard_range(self, offset: int, length: int) -> bool:
        """Punch a hole; return False where the file system has none."""
        failed = errno.EINTR if length else 0
        while failed == errno.EINTR:  # unlike os functions, not repeated by Python when interrupted
            failed = _fallocate_function()(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        if failed in _NOT_OFFERED or failed == errno.EOPNOTSUPP:
            return False
        if failed:
            with naming(self._path):
                raise OSError(failed, os.strerror(failed))
        return True

    def next_data(self, offset: int) -> int:
        """Return the first offset from `offset` on that is not in a hole of the file (its size where there is none)."""
        return self._seek(offset, os.SEEK_DATA, unknown=offset)

    def next_hole(self, offset: int) -> int:
        """Return where the next hole from `offset` on begins (the size of the file where there is none)."""
        return self._seek(offset, os.SEEK_HOLE, unknown=self.size())

    def _seek(self, offset: int, what: int, *, unknown: int) -> int:
        try:
            return os.lseek(self._fd, offset, what)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size()
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return unknown  # no information about holes: anything may be data
            raise

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor; with it go its locks."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


def _sync_file_range(fd: int, offset: int, length: int, flags: int) -> int:
    """Return 0, or the number of the error."""
    return _sync_function()(fd, offset, length, flags)


@functools.cache
def _sync_function() -> Callable[[int, int, int, int], int]:
    import ctypes  # needed only for large copies

    function = ctypes.CDLL(None, use_errno=True).sync_file_range
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return lambda *arguments: ctypes.get_errno() if function(*arguments) else 0


@functools.cache
def _fallocate_function() -> Callable[[int, int, int, int], int]:
    import ctypes

    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return lambda *arguments: ctypes.get_errno() if function(*arguments) else 0


FileOpener = Callable[[Path, bool], BlockFile]
"""Opens (path, writable) as a BlockFile; the seam through which tests put another disk under the engine."""


def open_posix(path: Path | str, writable: bool) -> BlockFile:
    """Open `path` as a `PosixFile`: the default opener."""
    return PosixFile.open(Path(path), writable=writable)


def open_posix_or_device(path: Path, writable: bool) -> BlockFile:
    """Open `path`, which may also be a block device: for images whose device extents the caller allows."""
    return PosixFile.open(path, writable=writable, devices=True)
