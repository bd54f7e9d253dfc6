"""New files that are either whole or not there, and small files replaced in one step.

A new file is written under a hidden temporary name in its own folder, made durable, linked under its name without ever
overwriting, and its folder is synced. If the process is killed at any point, no incomplete file has the name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qemu_vmdk_snap import log
from qemu_vmdk_snap.errors import LockBusy
from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.storage.blockfile import PosixFile, naming
from qemu_vmdk_snap.storage.empty import EmptyFile, is_empty
from qemu_vmdk_snap.storage.locks import lock_image

_log = log.of(__name__)

_TEMPORARY: Final = ".qemu-vmdk-snap.tmp"
_TEMPORARY_NAME: Final = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.qemu-vmdk-snap\.tmp", re.DOTALL)
_NAME_BYTES: Final = 200
"""What a temporary name has of the name to come: a file system counts bytes, 255 in most."""

_CHARACTER_BYTES: Final = 4
_RENAME_NOREPLACE: Final = 1
_AT_FDCWD: Final = -100
_SWEEP_SECONDS: Final = 2.0
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def sync_folder(folder: Path) -> None:
    """Return when the names in `folder` are durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Lock `folder` shared, so that it is not swept (`sweep_temporaries`) while temporary files are in use there.

    The lock ends with the process. A folder that cannot be locked cannot be swept either.
    """
    fd = -1
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _SWEEP_SECONDS
        while fd >= 0 and not _flocked(fd, fcntl.LOCK_SH) and time.monotonic() < end:
            time.sleep(0.01)  # a sweep is shorter; any other lock on the folder is not waited for
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def sweep_temporaries(folder: Path, about: Path | None = None) -> list[Path]:
    """Remove the temporary files that killed commands of this user have left in `folder`; return which.

    Only those of the image `about`, if it is given. Nothing is removed while another process works in the folder, nor
    what a process has open as an image.
    """
    with alone_in(folder) as alone:
        return [path for path in sorted(folder.iterdir()) if _sweep(path, about)] if alone else []


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Lock `folder` exclusively against `working_in`; yield False if somebody is working in it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield _flocked(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def _flocked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(path: Path, about: Path | None) -> bool:
    match = _TEMPORARY_NAME.fullmatch(path.name)
    if match is None or (about is not None and match["name"] != _shortened(about.name)):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            return False
        lock_image(fd, path, writable=True)
        claim = path.with_name(match["name"])
        if facts.st_nlink == 1 and len(os.fsencode(claim.name)) < _NAME_BYTES - _CHARACTER_BYTES:
            _drop_claim(claim)
        path.unlink()
    except (OSError, LockBusy):
        return False
    finally:
        os.close(fd)
    return True


def _drop_claim(path: Path) -> None:
    """Remove the empty file by which `_link` has claimed a name, so that the name is free again."""
    with contextlib.suppress(FileNotFoundError):
        facts = path.lstat()
        if stat.S_ISREG(facts.st_mode) and facts.st_size == 0 and facts.st_uid == os.geteuid():
            path.unlink()


class NewFiles:
    """Files that appear together, in the order they were added, when the block ends well; else none of them stays.

    Put the file that names the others (a descriptor) last: whoever sees it sees them all. `durable=False` leaves out
    the waiting for the disk, for callers who make many files and sync once, or for tests.
    """

    def __init__(self, *, durable: bool = True) -> None:
        self._durable = durable
        self._pending: list[tuple[PosixFile, Path]] = []
        self._linked: list[Path] = []
        self._empty: dict[Path, EmptyFile] = {}
        self._held = contextlib.ExitStack()
        self._folders: set[Path] = set()
        self._last_look: Callable[[], None] = lambda: None

    def before_ready(self, look: Callable[[], None]) -> None:
        """Call `look` when the files have their names; if it raises, they are removed again."""
        self._last_look = look

    def __enter__(self) -> NewFiles:
        """Return the group, still empty."""
        return self

    def allow_empty(self, path: Path) -> None:
        """Let the file that is added as `path` take the place, and the mode, of an empty file that is there now.

        Raises:
            LockBusy, OSError: that one cannot be held.
        """
        if is_empty(path):
            self._empty[path] = held = EmptyFile(path)
            self._held.callback(held.close)

    def add(self, path: Path, mode: int = 0o666) -> PosixFile:
        """Return a new empty file that will be called `path`; the umask applies to `mode`.

        Raises:
            FileExistsError: the name exists.
        """
        if path not in self._empty and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary = temporary_name(path)
        if path.parent not in self._folders:  # once a folder: a split disk has thousands of files in one
            self._held.enter_context(working_in(path.parent))
            self._folders.add(path.parent)
        self._held.callback(_discard, temporary)  # before it exists: an interruption may come directly after
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except OSError as error:
            error.filename = str(path)  # the name that the user knows
            raise
        file = PosixFile(fd, temporary, lazy=not self._durable)
        self._held.callback(file.close)
        if path in self._empty:
            os.fchmod(fd, self._empty[path].mode)
        self._pending.append((file, path))
        return file

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, *rest: object) -> None:
        """Link the files under their names, or remove every trace of them."""
        if isinstance(exc, OSError):  # the user knows the final names, not the temporary ones
            names = {str(file.path): str(path) for file, path in self._pending}
            exc.filename = names.get(exc.filename, exc.filename)
        try:
            if exc_type is None:
                self._publish()
        except BaseException:
            for path in self._linked:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        finally:
            self._held.close()

    def _publish(self) -> None:
        if self._durable:
            for file, path in self._pending:
                with naming(path):
                    os.fsync(file.fileno())  # barrier: the file is complete on disk before it gets its name
        for last, (file, path) in enumerate(self._pending, 1):
            if last == len(self._pending) > 1:
                self._sync_folders()  # barrier: the extents have their names before the descriptor that names them
            if (held := self._empty.get(path)) is not None:
                held.give_name(file.path)
            else:
                _link(file.path, path)
            self._linked.append(path)
        self._last_look()
        self._sync_folders()

    def _sync_folders(self) -> None:
        if self._durable:
            for folder in {path.parent for path in self._linked}:
                sync_folder(folder)


def _link(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if _renamed_beside(temporary, path):
            return
        # Nor that (some FUSE): claim the name by an exclusive create, then rename over our own claim. Killed between
        # the two, the sweep removes the claim.
        claim = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            lock_image(claim, path, writable=True)  # so that the claim is not replaced as an empty file
            temporary.replace(path)
        finally:
            os.close(claim)


def _renamed_beside(temporary: Path, path: Path) -> bool:
    """Rename, in one step that never overwrites; return False where the file system has no such step (FAT has it).

    Raises:
        FileExistsError: the name exists.
    """
    import ctypes  # needed only where there are no hard links

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
        return True
    if ctypes.get_errno() == errno.EEXIST:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    return False


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool = True, mode: int = 0o666) -> Iterator[PosixFile]:
    """Give a file that appears as `path`, complete and durable, when the block ends well, and not at all otherwise.

    Raises:
        FileExistsError: the name exists, or was created meanwhile; that file is not changed.
    """
    with NewFiles(durable=durable) as files:
        yield files.add(path, mode)


def _discard(temporary: Path) -> None:
    """Remove the file if possible; one that stays is swept later, and the original error is the one to report."""
    with contextlib.suppress(OSError):
        temporary.unlink()


def temporary_name(path: Path) -> Path:
    """Return a new hidden name beside `path`, for a file that is renamed to `path` when it is complete."""
    return path.with_name(f".{_shortened(path.name)}.{os.urandom(6).hex()}{_TEMPORARY}")


def _shortened(name: str) -> str:
    """Return `name`, or as many whole characters of it as a temporary name has room for."""
    raw = os.fsencode(name)
    return name if len(raw) <= _NAME_BYTES else raw[:_NAME_BYTES].decode("utf-8", "ignore")


def publish(
    temporary: Path,
    path: Path,
    *,
    parts: Sequence[Path] = (),
    durable: bool = True,
    empty: EmptyFile | None = None,
) -> None:
    """Rename the complete file `temporary` to `path`, never overwriting another file.

    `parts` are the files beside it that it names: they are made durable, with their names, before it. `empty` is the
    empty file that has the name now, and is given up.

    Raises:
        FileExistsError: the name exists; neither file is changed.
    """
    if durable:
        for file in (*parts, temporary):
            _sync_file(file)  # barrier: the file is complete on disk before it gets its name
        if parts:
            sync_folder(path.parent)  # barrier: the extents have their names before the descriptor that names them
    if empty is None:
        _link(temporary, path)
    else:
        empty.give_name(temporary)
    _log.debug("%s: complete, and has its name", path)
    _discard(temporary)
    if durable:
        sync_folder(path.parent)


def link_over(file: Path | str, path: Path | str) -> None:
    """Give the complete file `file` the name `path` as well, in one step and durably, replacing the file of that name.

    If it is repeated after an interruption, it finishes. Without hard links the file loses its first name.
    """
    file, path = Path(file), Path(path)
    inode = file.stat().st_ino
    temporary = path.with_name(f".{_shortened(path.name)}.{inode & 0xFFFF_FFFF_FFFF:012x}{_TEMPORARY}")
    with working_in(path.parent):
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(file)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            file.replace(path)
        else:
            temporary.replace(path)
    sync_folder(path.parent)
    _log.debug("%s: is now also %s", file, path)


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Replacement(PosixFile):
    """A new file that takes the place of another when its block ends well, unless it is given up."""

    given_up = False

    def give_up(self) -> None:
        """Leave the other file as it is."""
        self.given_up = True


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[Replacement]:
    """Give a new empty file that takes the name `path` in one step, durably: a reader sees the old content or the new.

    When the block raises, or gives the file up, `path` is as it was. After a kill, no incomplete file has the
    name; a file left under a hidden name is removed by a later sweep.
    """
    temporary = temporary_name(path)
    with working_in(path.parent):
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = Replacement(os.open(temporary, flags, mode), temporary)
            try:
                yield file
                if not file.given_up:
                    os.fsync(file.fileno())  # barrier: the file is complete on disk before it takes the name
                    temporary.replace(path)
            finally:
                file.close()
            if file.given_up:
                _discard(temporary)
                return
        except BaseException as error:
            _discard(temporary)
            if isinstance(error, OSError) and error.filename in (None, str(temporary)):
                error.filename = str(path)  # the name that the user knows
            raise
    sync_folder(path.parent)


def replace_file(
    path: Path | str, data: bytes, mode: int = 0o644, *, like: Path | str | None = None, new: bool = False
) -> None:
    """Make `path` hold `data`, durably and in one step: a reader sees the old content or the new, never a part.

    It has that mode, whatever the umask is: others read what is written here. With `like` it has the owner, the mode,
    the access list and the label of that file instead. With `new` there must be no file of that name.

    Raises:
        FileExistsError: the name of a new file exists; that file is not changed.
        OSError: it cannot be written, or cannot be given what `like` has.
    """
    path = Path(path)
    with new_file(path, mode=0o600) if new else replacing(path, mode) as file:
        if like is None:
            os.fchmod(file.fileno(), mode)
        else:
            from qemu_vmdk_snap.storage.attributes import copy_attributes

            with Path(like).open("rb") as model:
                copy_attributes(model.fileno(), file.fileno(), access_only=True)
        file.write_at(0, data)
