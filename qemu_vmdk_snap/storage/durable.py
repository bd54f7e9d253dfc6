"""New files that are either whole or not there, and small files replaced in one step.

A new file is written under a hidden temporary name in its own folder, made durable, linked under its name without ever
overwriting, and its folder is synced. Killed at any point, nothing half-written bears the name.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.storage.blockfile import PosixFile

_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def sync_folder(folder: Path) -> None:
    """Return when the names in `folder` are durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class NewFiles:
    """Files that appear together, in the order they were added, when the block ends well; else none of them stays.

    Put the file that names the others (a descriptor) last: whoever sees it sees them all. `durable=False` leaves out
    the waiting for the disk, for callers who make many files and sync once, or for tests.
    """

    def __init__(self, *, durable: bool = True) -> None:
        self._durable = durable
        self._pending: list[tuple[PosixFile, Path]] = []
        self._linked: list[Path] = []

    def __enter__(self) -> NewFiles:
        """Return the group, still empty."""
        return self

    def add(self, path: Path, mode: int = 0o666) -> PosixFile:
        """Return a new empty file that will be called `path`; the umask applies to `mode`.

        Raises:
            FileExistsError: something bears that name.
        """
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary = temporary_name(path)
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except OSError as error:
            error.filename = str(path)  # the name that the user knows
            raise
        file = PosixFile(fd, temporary)
        self._pending.append((file, path))
        return file

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        """Link the files under their names, or remove every trace of them."""
        try:
            if exc_type is None:
                self._publish()
        except BaseException:
            for path in self._linked:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        finally:
            for file, _ in self._pending:
                file.close()
                with contextlib.suppress(FileNotFoundError):
                    file.path.unlink()

    def _publish(self) -> None:
        if self._durable:
            for file, _ in self._pending:
                os.fsync(file.fileno())  # barrier: the file is complete on disk before it gets its name
        for file, path in self._pending:
            _link(file.path, path)
            self._linked.append(path)
        if self._durable:
            for folder in {path.parent for path in self._linked}:
                sync_folder(folder)


def _link(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No hard links here (FAT, some FUSE): claim the name by an exclusive create, then rename over our own claim.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        temporary.replace(path)


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool = True, mode: int = 0o666) -> Iterator[PosixFile]:
    """Give a file that appears as `path`, complete and durable, when the block ends well, and not at all otherwise.

    Raises:
        FileExistsError: something bears that name, or came to bear it meanwhile; it is untouched.
    """
    with NewFiles(durable=durable) as files:
        yield files.add(path, mode)


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside `path` that nothing bears yet, for what will be `path` when it is complete."""
    return path.with_name(f".{path.name[:200]}.{os.urandom(6).hex()}.tmp")


def publish(temporary: Path, path: Path, *, durable: bool = True) -> None:
    """Give the complete file `temporary` the name `path`, never over another file, and take the old name away.

    Raises:
        FileExistsError: something bears the name; both files are as they were.
    """
    if durable:
        fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # barrier: the file is complete on disk before it gets its name
        finally:
            os.close(fd)
    _link(temporary, path)
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    if durable:
        sync_folder(path.parent)


def replace_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Make `path` hold `data`, durably and in one step: a reader sees the old content or the new, never a part."""
    temporary = temporary_name(path)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        file = PosixFile(fd, temporary)
        try:
            file.write_at(0, data)
            os.fsync(fd)
        finally:
            file.close()
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
