"""System calls that fail when they are told to, below everything that the engine does."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple
from unittest.mock import patch

from qemu_vmdk_snap.storage import blockfile

SHORT: Final = -1
"""In place of an error: the call does a part of what it was asked for."""

_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
FAULTS: Final[dict[str, tuple[int, ...]]] = {
    "open": (errno.EMFILE, errno.EACCES, errno.EROFS, errno.EIO, *_SPACE),
    "scandir": (errno.EMFILE, errno.EACCES, errno.EIO),
    "pread": (errno.EIO, SHORT),
    "preadv": (errno.EIO, SHORT),
    "pwrite": (*_SPACE, errno.EIO, SHORT, errno.EROFS),
    "write": (*_SPACE, errno.EIO, SHORT),
    "fsync": (errno.EIO, *_SPACE),
    "fdatasync": (errno.EIO, *_SPACE),
    "ftruncate": (*_SPACE, errno.EIO, errno.EROFS),
    "replace": (errno.EIO, errno.EACCES, errno.EROFS, errno.ENOSPC),
    "link": (*_SPACE, errno.EIO, errno.EACCES, errno.EROFS),
    "unlink": (errno.EIO, errno.EACCES, errno.EROFS),
    "copy_file_range": (*_SPACE, errno.EIO, SHORT),
    "fallocate": (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EOPNOTSUPP),
    "ioctl": (errno.ENOSPC, errno.EIO),
}
"""Call -> what it can fail with. Python itself repeats what a signal interrupts; `fallocate` is called past it."""


class Fault(NamedTuple):
    """The call number `at`, of all that are counted, fails with `code`; with `lasting` every later one of its name."""

    at: int
    code: int
    lasting: bool

    def __str__(self) -> str:
        word = "short" if self.code == SHORT else errno.errorcode[self.code]
        return f"call {self.at}: {word}{', for good' if self.lasting else ''}"


class Calls:
    """Counts the calls of the block; `seen` has their names in order."""

    def __init__(self, fault: Fault | None) -> None:
        self.seen: list[str] = []
        self.fault = fault
        self._failing: str | None = None

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **words: Any) -> Any:  # noqa: ANN401
            self.seen.append(name)
            fault = self.fault
            if fault is None:
                return real(*args, **words)
            if len(self.seen) - 1 == fault.at:
                self._failing = name if fault.lasting else None
            elif name != self._failing:
                return real(*args, **words)
            if fault.code == SHORT:
                return _short(name, real, *args, **words)
            raise OSError(fault.code, os.strerror(fault.code))

        return call


def _short(name: str, real: Callable[..., Any], *args: Any, **words: Any) -> Any:  # noqa: ANN401
    """Do the call for a part of the bytes: at least one, so that it gets on."""
    if name == "pread":
        return real(args[0], max(1, args[1] // 3), *args[2:])
    if name == "preadv":
        (view,) = args[1]
        return real(args[0], [view[: max(1, len(view) // 3)]], *args[2:])
    if name in ("pwrite", "write"):
        return real(args[0], memoryview(args[1])[: max(1, len(args[1]) // 3)], *args[2:])
    assert name == "copy_file_range"
    return real(args[0], args[1], max(1, args[2] // 3), *args[3:], **words)


class LostPages:
    """A disk that fails one flush and loses what was written to that file since the flush before.

    The kernel reports that once, takes the pages for clean, and reads the old content again as soon as it has dropped
    them: here, at once. Where the file had no content yet it holds rubbish then.
    """

    MARK: Final = b"\xa5"

    def __init__(self, at: int | None) -> None:
        self.flushes = 0
        self.lost = 0
        self._at = at
        self._written: dict[int, list[tuple[int, bytes, int]]] = {}  # inode -> offset, what was there, length

    def note(self, fd: int, offset: int, length: int) -> None:
        """Remember what is in a range of the file that is about to change."""
        old = _pread(fd, length, offset)
        self._written.setdefault(os.fstat(fd).st_ino, []).append((offset, old, length))

    def flush(self, fd: int) -> None:
        written = self._written.pop(os.fstat(fd).st_ino, [])
        self.flushes += 1
        if self.flushes - 1 != self._at:
            return
        for offset, old, length in reversed(written):
            room = max(0, min(length, os.fstat(fd).st_size - offset))
            _pwrite(fd, (old + self.MARK * (length - len(old)))[:room], offset)
            self.lost += room
        raise OSError(errno.EIO, os.strerror(errno.EIO))


_pread, _pwrite = os.pread, os.pwrite


@contextlib.contextmanager
def losing_pages(at: int | None) -> Iterator[LostPages]:
    """Let flush number `at` of the block lose what was written before it; None counts them alone."""
    disk = LostPages(at)
    copy, fallocate = os.copy_file_range, blockfile._fallocate_function()

    def pwrite(fd: int, data: Any, offset: int) -> int:  # noqa: ANN401
        disk.note(fd, offset, len(memoryview(data).cast("B")))
        return _pwrite(fd, data, offset)

    def copy_file_range(source: int, target: int, count: int, first: int, at: int) -> int:
        disk.note(target, at, count)
        return copy(source, target, count, first, at)

    def punched(fd: int, mode: int, offset: int, length: int) -> int:
        disk.note(fd, offset, length)
        return fallocate(fd, mode, offset, length)

    def no_clone(*args: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with contextlib.ExitStack() as stack:
        for name, call in (("pwrite", pwrite), ("copy_file_range", copy_file_range)):
            stack.enter_context(patch.object(os, name, call))
        for name in ("fsync", "fdatasync"):
            real = getattr(os, name)
            stack.enter_context(patch.object(os, name, lambda fd, real=real: _synced(disk, fd, real)))
        stack.enter_context(patch.object(fcntl, "ioctl", no_clone))
        stack.enter_context(patch.object(blockfile, "_fallocate_function", lambda: punched))
        yield disk


def _synced(disk: LostPages, fd: int, real: Callable[[int], None]) -> None:
    if stat.S_ISREG(os.fstat(fd).st_mode):
        disk.flush(fd)
    real(fd)


@contextlib.contextmanager
def calls(fault: Fault | None = None) -> Iterator[Calls]:
    """Count the system calls of the block, and let them fail as `fault` says."""
    counted = Calls(fault)
    with contextlib.ExitStack() as stack:
        for name in FAULTS:
            if hasattr(os, name):
                stack.enter_context(patch.object(os, name, counted.wrapped(name, getattr(os, name))))
        stack.enter_context(patch.object(fcntl, "ioctl", counted.wrapped("ioctl", fcntl.ioctl)))
        function = blockfile._fallocate_function()

        def fallocate(*args: Any) -> int:  # noqa: ANN401
            try:
                return int(counted.wrapped("fallocate", function)(*args))
            except OSError as error:
                return error.errno or errno.EIO

        stack.enter_context(patch.object(blockfile, "_fallocate_function", lambda: fallocate))
        yield counted
