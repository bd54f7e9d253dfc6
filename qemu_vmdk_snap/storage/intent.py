"""Intent records: what an operation over several files is about to do, durable beside the image before it begins.

    folder/.disk.vmdk.intent      the record, beside the image that the operation is about
    other/.disk.vmdk.9f3c.intent  a pointer to it, in every other folder whose images the operation writes

The record is complete or absent: it is replaced in one step. Whoever opens one of its images for writing finds it by
looking through the image's folder, and finishes the operation first. A live operation has a record too; the image locks
keep others out.

A record makes a later command, perhaps root's, write and unlink files. So one that belongs to somebody else, or that
others may write, is never followed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qemu_vmdk_snap.errors import CorruptChain
from qemu_vmdk_snap.storage.durable import alone_in, sync_folder, working_in

_VERSION: Final = 1
_SUFFIX: Final = ".intent"
_DRAFT: Final = ".new"
_MAX_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Intent:
    """One operation that has begun and not ended."""

    operation: str
    image: Path
    """The image that it is about; the record lies beside it."""
    images: tuple[Path, ...]
    """Every image that it writes, relinks or deletes."""
    details: Mapping[str, Any]
    """What the operation needs to be finished by somebody else: JSON's own types alone."""

    @property
    def path(self) -> Path:
        """Where the record lies."""
        return self.image.with_name(f".{self.image.name[:200]}{_SUFFIX}")

    def begin(self) -> None:
        """Make the record durable, before anything is changed. Also replaces the record of an earlier stage."""
        for pointer in self._pointers():
            _store(pointer, {"version": _VERSION, "see": str(self.path)})
        record = {
            "version": _VERSION,
            "operation": self.operation,
            "image": str(self.image),
            "images": [str(image) for image in self.images],
            "details": dict(self.details),
        }
        _store(self.path, record)

    def update(self, **details: object) -> Intent:
        """Return the intent with changed details, its record already durable."""
        changed = replace(self, details={**self.details, **details})
        changed.begin()
        return changed

    def end(self) -> None:
        """Take the record away, durably: the operation is finished or taken back."""
        for path in [self.path, *self._pointers()]:
            _draft(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            sync_folder(path.parent)

    def involves(self, image: Path) -> bool:
        """Return whether the operation changes `image`."""
        real = image.resolve()
        return any(real == one.resolve() for one in self.images)

    def _pointers(self) -> list[Path]:
        token = hashlib.sha256(str(self.path).encode()).hexdigest()[:8]
        folders = {image.parent for image in self.images} - {self.image.parent}
        return sorted(folder / f".{self.image.name[:200]}.{token}{_SUFFIX}" for folder in folders)


def make_intent(operation: str, image: Path, images: Iterable[Path], details: Mapping[str, Any]) -> Intent:
    """Return an intent whose paths hold wherever a later command is started."""
    home = image.parent.resolve() / image.name
    others = {one.parent.resolve() / one.name for one in images} | {home}
    return Intent(operation, home, tuple(sorted(others)), details)


def pending_in(folder: Path, *, strict: bool = True, about: Path | None = None) -> list[Intent]:
    """Return the operations that have begun and not ended on images in `folder`.

    A record that cannot be read, or is not this user's, is passed over unless `strict`, or unless its name says that it
    is `about` the image in question: anybody may put a file into a folder like /tmp.

    Raises:
        CorruptChain: a record that is not to be passed over cannot be read, or is not this user's.
    """
    found: dict[Path, Intent] = {}
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if entry.name.startswith(".")}
    for name in sorted(name for name in names if name.endswith(_SUFFIX)):
        try:
            intent = _read(folder / name)
        except (CorruptChain, OSError):
            if strict or (about is not None and name.startswith(f".{about.name[:200]}.")):
                raise
            continue
        if intent is not None:
            found[intent.path] = intent
    return list(found.values())


def sweep(folder: Path) -> None:
    """Remove what is left of records that never became complete: their operations had not begun."""
    with alone_in(folder) as alone:
        for draft in folder.glob(f".*{_SUFFIX}{_DRAFT}") if alone else ():
            if not draft.with_name(draft.name.removesuffix(_DRAFT)).exists():
                draft.unlink(missing_ok=True)


def refuse_pending(image: Path) -> None:
    """Raise CorruptChain if an operation on `image` has begun and not ended."""
    for intent in pending_in(image.parent, strict=False, about=image):
        if intent.involves(image):
            reason = f"an interrupted {intent.operation} is not finished yet: run `recover {image.parent}` first"
            raise CorruptChain(image, reason)


def to_text(data: bytes) -> str:
    """Return `data` as a detail can hold it."""
    return base64.b64encode(data).decode("ascii")


def from_text(text: str) -> bytes:
    """Return what `to_text` was given."""
    return base64.b64decode(text)


def _draft(path: Path) -> Path:
    return path.with_name(path.name + _DRAFT)


def _store(path: Path, record: Mapping[str, Any]) -> None:
    """Make `path` hold the record, durably and in one step. The draft has a fixed name, so that none can pile up."""
    draft = _draft(path)
    with working_in(path.parent):
        draft.unlink(missing_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(json.dumps(record, indent=1).encode())
                file.flush()
                os.fsync(fd)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)  # the disk is full, say
            raise
    sync_folder(path.parent)


def _read(path: Path) -> Intent | None:
    try:
        record = _load(path)
        if "see" in record:
            target = Path(record["see"])
            if not target.exists():
                return None  # the operation ended before its pointers went, or never began
            record = _load(target)
        paths = tuple(Path(image) for image in record["images"])
        return Intent(record["operation"], Path(record["image"]), paths, record["details"])
    except FileNotFoundError:
        return None  # it ended this moment
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptChain(path, f"the intent record cannot be read: {error!r}") from error


def _load(path: Path) -> dict[str, Any]:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            raise CorruptChain(path, "the intent record is another user's, or may be written by others: not followed")
        record = json.loads(os.pread(fd, min(facts.st_size, _MAX_BYTES), 0))
    finally:
        os.close(fd)
    if not isinstance(record, dict) or record.get("version") != _VERSION:
        raise ValueError("unknown version")
    return record
