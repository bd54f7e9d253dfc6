"""Operation records: what an operation over several files is about to do, durable beside the image before it begins.

    folder/.disk.vmdk.intent      the record, beside the image that the operation is about
    other/.disk.vmdk.9f3c.intent  a pointer to it, in every other folder whose images the operation writes

The record is complete or absent: it is replaced in one step. Whoever opens one of its images for writing finds it by
looking through the image's folder, and finishes the operation first. A running operation holds a lock on its record, so
that no other command treats it as abandoned.

A record makes a later command, perhaps root's, write and unlink files. So what it may name is confined:

- it belongs to the user who follows it, and nobody else may write it;
- files are named relative to the record, so that a folder may move with it, and lie in the record's folder or in one
  that the user allows;
- each file is known by its inode: a record that was copied with its folder, or came out of an archive, fits nothing.
  (Device numbers change when a machine starts again; whether a file is on the record's device does not.)

A record that does not fit, or cannot be read, is never followed, and blocks only its own images.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from qemu_vmdk_snap import log
from qemu_vmdk_snap.errors import CorruptChain, LockBusy
from qemu_vmdk_snap.light import Any, Final, NamedTuple, Self, dataclass, field, replace
from qemu_vmdk_snap.storage.blockfile import naming
from qemu_vmdk_snap.storage.durable import alone_in, sync_folder, working_in
from qemu_vmdk_snap.storage.identity import identity_of, identity_of_open
from qemu_vmdk_snap.storage.journal.grainlog import waiting

_log = log.of(__name__)

_VERSION: Final = 2
SUFFIX: Final = ".intent"
_DRAFT: Final = ".new"
_MAX_BYTES: Final = 64 << 20
_MAX_STEM: Final = 200
"""Bytes of the image's name in that of its record: with the rest it stays below the 255 of a file name."""

_FILE: Final = "$file"
"""The key of the JSON object that stands for a path: {"$file": number in the table of files}."""


class Hold:
    """The lock of a running operation on its record; it ends with the block, or with the process."""

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        self._fd = -1

    def take(self, fd: int) -> None:
        """Keep `fd`, which has the lock, in place of the previous one."""
        self.close()
        self._fd = fd

    def close(self) -> None:
        """Release the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        """Return the hold itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Release the lock; an unfinished operation is left to `recover`."""
        self.close()


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation that has begun and not ended. Its paths are absolute, their folders without symbolic links."""

    name: str
    """`commit`, `resize` and so on."""
    image: Path
    """The image that it is about; the record lies beside it."""
    images: tuple[Path, ...]
    """Every image that it writes, relinks or deletes."""
    details: Mapping[str, Any]
    """What another process needs to finish the operation: JSON's own types, and paths."""
    hold: Hold = field(default_factory=Hold, compare=False, repr=False)

    @property
    def path(self) -> Path:
        """Where the record lies."""
        return record_path(self.image)

    def begin(self) -> None:
        """Make the record durable, before anything is changed, and hold it. Also replaces that of an earlier stage.

        Raises:
            OSError: it cannot be stored; nothing has changed.
        """
        with contextlib.ExitStack() as stack:
            for pointer in self._pointers():
                stack.enter_context(working_in(pointer.parent))  # not swept before it leads anywhere
                see = os.path.relpath(self.path, pointer.parent)
                os.close(_store(pointer, {"version": _VERSION, "see": see}))
            self.hold.take(_store(self.path, _as_json(self)))
        _log.info("%s: %s journaled in %s", self.image, self.name, self.path)

    def begin_if(self, still: Callable[[], None]) -> None:
        """Begin, and then call `still`: if it raises, the operation ends and nothing is changed."""
        self.begin()
        try:
            still()
        except BaseException:
            self.end()
            raise

    def update(self, **details: object) -> Operation:
        """Return the operation with changed details, its record already durable."""
        changed = replace(self, details={**self.details, **details})
        changed.begin()
        return changed

    def end(self) -> None:
        """Remove the record, durably: the operation is finished or undone."""
        for path in [self.path, *self._pointers()]:
            _draft(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
        self.hold.close()
        _log.info("%s: %s ended, its record is removed", self.image, self.name)

    def involves(self, image: Path) -> bool:
        """Return whether the operation changes `image`."""
        real = Path(os.path.realpath(image))
        return any(real in (one, Path(os.path.realpath(one))) for one in self.images)

    def _pointers(self) -> list[Path]:
        folders = {image.parent for image in self.images} - {self.image.parent}
        if not folders:
            return []
        import hashlib  # rarely needed

        token = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]
        return sorted(folder / f".{_stem(self.image)}.{token}{SUFFIX}" for folder in folders if folder.is_dir())


class Pending(NamedTuple):
    """A record that was found."""

    path: Path
    """Of the record itself, whatever pointer led to it."""
    operation: Operation | None
    """None where the record cannot be read."""
    problem: CorruptChain | None
    """Why it is not to be followed, in one line; None where it may be."""
    found_as: Path
    """The file in the folder that was looked through: the record, or a pointer to it."""

    def involves(self, image: Path) -> bool:
        """Return whether it blocks `image`; a record that cannot be read blocks the image in its name."""
        if self.operation is not None:
            return self.operation.involves(image)
        return self.found_as.name.startswith(f".{_stem(image)}.")


def make_operation(name: str, image: Path, images: Iterable[Path], details: Mapping[str, Any]) -> Operation:
    """Return an operation whose paths hold wherever a later command is started."""
    home = _absolute(image)
    return Operation(name, home, tuple(sorted({_absolute(one) for one in images} | {home})), details)


def record_path(image: Path) -> Path:
    """Return where the record of an operation about `image` lies."""
    return image.with_name(f".{_stem(image)}{SUFFIX}")


def pending_in(folder: Path, *, allowed: Sequence[Path | str] = ()) -> list[Pending]:
    """Return the records of operations that have begun and not ended on images in `folder`, by name.

    `allowed` are folders outside a record's own in which its files may be.

    Raises:
        OSError: the folder cannot be looked through.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.startswith(".") and entry.name.endswith(SUFFIX))
    found: dict[Path, Pending] = {}
    for name in names:
        pending = _look(folder / name, allowed)
        if pending is not None:
            found.setdefault(pending.path, pending)
    return list(found.values())


def refuse_pending(*images: Path) -> None:
    """Raise CorruptChain if an operation on one of `images` has begun and not ended, or its server was killed."""
    for image in images:
        left = waiting(image)
        if left is not None:
            left.close()
            reason = f"its server was killed, and has acknowledged more than is stored: run `recover {image}` first"
            raise CorruptChain(image, reason)
    for folder in sorted({image.parent for image in images}):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for pending in pending_in(folder):
                for image in images:
                    if image.parent == folder and pending.involves(image):
                        raise _refusal(pending, image)


def _refusal(pending: Pending, image: Path) -> CorruptChain:
    if pending.problem is not None:
        return pending.problem
    assert pending.operation is not None
    what = f"an interrupted {pending.operation.name} is not finished"
    return CorruptChain(image, f"{what}: run `recover {image.parent}` first")


@contextlib.contextmanager
def taking_over(pending: Pending, *, allowed: Sequence[Path | str] = ()) -> Iterator[Operation | None]:
    """Lock a record as its operation did, and yield its current content; None if it is gone.

    Raises:
        LockBusy: the operation is running, or another command is finishing it.
        CorruptChain: the record is not to be followed.
    """
    if pending.problem is not None:
        raise pending.problem
    with Hold() as hold:
        try:
            fd = os.open(pending.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            yield None
            return
        hold.take(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockBusy(pending.path, "record") from error
        except OSError:
            pass  # a file system without such locks: the image locks are enough
        if identity_of(pending.path) != identity_of_open(fd):
            yield None
            return
        again = _look(pending.path, allowed)
        if again is None or again.operation is None or again.problem is not None:
            raise again.problem if again is not None and again.problem is not None else pending_gone(pending)
        yield replace(again.operation, hold=hold)


def pending_gone(pending: Pending) -> CorruptChain:
    """Return the error for a record that changed while it was about to be followed."""
    return CorruptChain(pending.path, "the operation record changed while it was read: try again")


def sweep(folder: Path) -> None:
    """Remove what is left of records that never became complete, or have ended: drafts, and pointers to nothing."""
    with alone_in(folder) as alone:
        for draft in folder.glob(f".*{SUFFIX}{_DRAFT}") if alone else ():
            if not os.path.lexists(draft.with_name(draft.name.removesuffix(_DRAFT))):
                draft.unlink(missing_ok=True)
        for pointer in folder.glob(f".*{SUFFIX}") if alone else ():
            if _leads_nowhere(pointer):
                pointer.unlink(missing_ok=True)


def _leads_nowhere(pointer: Path) -> bool:
    """Return whether it is a pointer of this user to a record that is not there, in a folder that is."""
    try:
        see = _load(pointer).get("see")
    except (OSError, CorruptChain, ValueError, TypeError, RecursionError):
        return False
    if not isinstance(see, str) or "\0" in see:
        return False
    record = pointer.parent / see
    return record.parent.is_dir() and not os.path.lexists(record)


def abandon(pending: Pending) -> None:
    """Remove a record, durably, without finishing its operation: the images are not changed.

    Raises:
        LockBusy: its operation is still running.
    """
    with Hold() as hold:
        with contextlib.suppress(FileNotFoundError, OSError):
            fd = os.open(pending.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            hold.take(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LockBusy(pending.path, "record") from error
        if pending.operation is not None and pending.problem is None:
            pending.operation.end()
        for path in {pending.path, pending.found_as}:
            path.unlink(missing_ok=True)
            sync_folder(path.parent)


def to_text(data: bytes) -> str:
    """Return `data` as a detail can hold it."""
    return base64.b64encode(data).decode("ascii")


def from_text(text: str) -> bytes:
    """Return what `to_text` was given."""
    return base64.b64decode(text, validate=True)


def _absolute(path: Path) -> Path:
    return path.parent.resolve() / path.name


def _stem(image: Path) -> str:
    """Return the image's name, cut to what fits; cut names differ by a digest."""
    raw = os.fsencode(image.name)
    if len(raw) <= _MAX_STEM:
        return image.name
    import hashlib  # rarely needed

    return f"{os.fsdecode(raw[: _MAX_STEM - 17])}~{hashlib.sha256(raw).hexdigest()[:16]}"


def _draft(path: Path) -> Path:
    return path.with_name(path.name + _DRAFT)


def _as_json(operation: Operation) -> dict[str, Any]:
    """Return the record: paths become numbers in a table of files, which has their names and inodes."""
    folder = operation.image.parent
    device = folder.stat().st_dev
    numbers: dict[Path, int] = {}

    def encode(value: object) -> object:
        if isinstance(value, Path):
            return {_FILE: numbers.setdefault(_absolute(value), len(numbers))}
        if isinstance(value, Mapping):
            return {key: encode(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [encode(one) for one in value]
        return value

    record = {
        "version": _VERSION,
        "operation": operation.name,
        "image": encode(operation.image),
        "images": encode(operation.images),
        "details": encode(operation.details),
    }
    files = []
    for path in numbers:
        facts = path.lstat() if os.path.lexists(path) else None
        files.append(
            {
                "name": os.path.relpath(path, folder),
                "inode": None if facts is None else facts.st_ino,
                "same-device": facts is None or facts.st_dev == device,
            }
        )
    return {**record, "files": files}


def _store(path: Path, record: Mapping[str, Any]) -> int:
    """Make `path` hold the record, durably and in one step; return a descriptor of it, on which the lock is.

    The draft has a fixed name, so that drafts cannot accumulate.
    """
    draft = _draft(path)
    with working_in(path.parent):
        draft.unlink(missing_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            import json  # only where there is a record

            data = memoryview(json.dumps(record, indent=1).encode())
            with naming(path):
                while data:
                    data = data[os.write(fd, data) :]
                os.fsync(fd)
            draft.replace(path)
        except BaseException:
            os.close(fd)
            draft.unlink(missing_ok=True)  # the disk is full, say
            raise
    try:
        sync_folder(path.parent)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _look(found_as: Path, allowed: Sequence[Path | str]) -> Pending | None:
    """Return the record at `found_as`, or the one that the pointer there leads to; None where there is none (now)."""
    path = found_as
    try:
        record = _load(path)
        if "see" in record:
            path = Path(os.path.normpath(path.parent / _text(record["see"])))
            if not os.path.lexists(path):
                return None  # the operation ended before its pointers were removed, or never began
            record = _load(path)
        path = _absolute(path)
        operation, misfit = _parse(record, path, [found_as.parent, *allowed])
    except FileNotFoundError:
        return None  # it has just ended
    except CorruptChain as error:
        return Pending(path, None, error, found_as)
    except OSError as error:
        problem = CorruptChain(path, f"the operation record cannot be read: {error.strerror}")
        return Pending(path, None, problem, found_as)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        what = type(error).__name__
        problem = CorruptChain(path, f"the operation record is damaged ({what}): `recover --abandon` gives it up")
        return Pending(path, None, problem, found_as)
    return Pending(path, operation, misfit, found_as)


def _load(path: Path) -> dict[str, Any]:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            reason = "the operation record is another user's, or may be written by others: it is not followed"
            raise CorruptChain(path, reason)
        if facts.st_size > _MAX_BYTES:
            raise CorruptChain(path, f"the operation record is larger than {_MAX_BYTES} bytes: it is not followed")
        import json

        record = json.loads(os.pread(fd, facts.st_size, 0))
    finally:
        os.close(fd)
    if not isinstance(record, dict):
        raise TypeError("not an object")
    if record.get("version") != _VERSION:
        version = str(record.get("version"))[:20]
        raise CorruptChain(path, f"the operation record has version {version}, not {_VERSION}: it is not followed")
    return record


def _parse(
    record: Mapping[str, Any], path: Path, allowed: Sequence[Path | str]
) -> tuple[Operation, CorruptChain | None]:
    """Return the operation, and why it is not to be followed, if it does not fit what is there."""
    folder = path.parent
    files = [folder / _text(one["name"]) for one in record["files"]]
    paths = [Path(os.path.normpath(one)) for one in files]

    def decode(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            if value.keys() == {_FILE}:
                return paths[_number(value[_FILE])]
            return {key: decode(one) for key, one in value.items()}
        return [decode(one) for one in value] if isinstance(value, list) else value

    image, images, details = (decode(record[key]) for key in ("image", "images", "details"))
    if not isinstance(image, Path) or not all(isinstance(one, Path) for one in images) or not isinstance(details, dict):
        raise TypeError("image, images or details")
    operation = Operation(_text(record["operation"]), image, tuple(images), details)
    if operation.path != path:
        return operation, CorruptChain(path, f"the operation record is not that of {image.name}: it is not followed")
    return operation, _misfit(path, paths, record["files"], allowed)


def _misfit(
    path: Path, paths: Sequence[Path], files: Sequence[Mapping[str, Any]], allowed: Sequence[Path | str]
) -> CorruptChain | None:
    """Return what is wrong with the files that the record names, None where they may be changed."""
    folders = [path.parent, *(Path(os.path.realpath(folder)) for folder in allowed)]
    device = path.parent.stat().st_dev
    for file, told in zip(paths, files, strict=True):
        inode, same = told["inode"], told["same-device"]
        home = Path(os.path.realpath(file.parent))
        if home != file.parent or not any(home == one or home.is_relative_to(one) for one in folders):
            reason = f"the operation record names {file}, outside its folder: allow {file.parent} (--allow-dir)"
            return CorruptChain(path, f"{reason} to finish the operation")
        try:
            facts = file.lstat()
        except FileNotFoundError:
            continue
        fits = stat.S_ISREG(facts.st_mode) and facts.st_ino == inode and (facts.st_dev == device) is same
        if not fits:
            reason = f"the operation record names {file}, which is another file now (a copy?)"
            return CorruptChain(path, f"{reason}: `recover --abandon` abandons the operation")
    return None


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError("not a text")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError("not a number")
    return value


__all__ = [
    "SUFFIX",
    "Hold",
    "Operation",
    "Pending",
    "abandon",
    "from_text",
    "make_operation",
    "pending_in",
    "record_path",
    "refuse_pending",
    "sweep",
    "taking_over",
    "to_text",
]
