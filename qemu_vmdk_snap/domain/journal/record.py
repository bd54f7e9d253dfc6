"""The intent record: what a snapshot is about to change, durable before the first change.

Where it is, and why. The record makes a later command unlink files and define XML, mostly as root. Beside the disk,
anyone who may write that folder (often QEMU's user) could plant one; so it is in a folder of the user who runs the
commands, on the host of the libvirt: `QEMU_VMDK_SNAP_STATE` if set, the root of an in-process libvirt,
`/var/lib/qemu-vmdk-snap` for root, XDG_STATE_HOME for others. One file per domain, by UUID, because names change; a
lock beside it distinguishes a running command from one that died.

A folder or a record that another user owns, or may write, is refused. A record that cannot be followed blocks the
commands that change its own domain, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from qemu_vmdk_snap import replace_file
from qemu_vmdk_snap.domain.connect import embed_root
from qemu_vmdk_snap.domain.journal import fields
from qemu_vmdk_snap.errors import DomainBusy, DomainError, InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING, Any, Final, dataclass, replace

if TYPE_CHECKING:
    from logging import Logger

    import libvirt

STATE_VARIABLE: Final = "QEMU_VMDK_SNAP_STATE"
OPERATIONS: Final = (
    "create",
    "freeze",
    "revert",
    "delete",
    "rename",
    "clone",
    "destroy",
    "move",
    "consolidate",
    "attach",
    "detach",
)
_VERSION: Final = 1
_MAX_BYTES: Final = 64 << 20
_PATIENCE: Final = 1.0
"""Seconds: a test whether the lock is held takes it for a moment."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """The overlay of a disk."""

    target: str
    path: str
    frozen: str
    """The top of the disk before."""
    identity: tuple[int, int] | None = None
    """Device and inode once it is created: another file of that name is not ours. None while it may not exist yet."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Neighbouring links of a running guest's disk, and the image that takes their place."""

    target: str
    upper: str
    """The overlay directly above: the one that the guest writes to, or a frozen one."""
    links: tuple[str, ...]
    """The top first. The image takes the name of the first; the others go."""
    image: str
    """The name that the image is made under."""
    below: str | None
    """What it is backed by; None where it is a base."""
    size: int
    """About so many bytes are copied."""
    doomed: tuple[tuple[str, str, int], ...]
    """(link, file of it that goes, inode): another file of that name stays."""
    inode: int | None = None
    """Of the image once it is made."""


@dataclass(frozen=True, slots=True)
class Intent:
    """Everything that another process needs to finish a snapshot, or to undo it."""

    uuid: str
    domain: str
    snapshot: str
    overlays: tuple[Overlay, ...]
    old_xml: str
    """The persistent XML before."""
    new_xml: str
    """The persistent XML with the overlays."""
    snapshot_xml: str
    live: bool = False
    """Whether a running guest was to be switched to the overlays: a step after the change of the XML."""
    resume: bool = False
    """Whether its vCPUs were running, so that they must be started again."""
    thaw: bool = False
    """Whether its file systems were to be frozen, so that they must be thawed."""
    operation: str = "create"
    """One of `OPERATIONS`."""
    current: str | None = None
    """The current snapshot before; of a rename, afterwards."""
    discard: tuple[str, ...] = ()
    """Of a revert, a destroy and a move: the files that go once no XML names them."""
    discard_inodes: tuple[int, ...] = ()
    """The inode of each: another file of that name stays."""
    work: tuple[dict[str, Any], ...] = ()
    """Of a delete: what happens to each disk (`delete.plan.Work`); of a clone and a move: to each file."""
    snapshots: tuple[tuple[str, str], ...] = ()
    """(name, XML): of a delete and a move, the new one of snapshots that name other files then; of a destroy, all."""
    merges: tuple[Merge, ...] = ()
    """Of a delete under a running guest: what is exchanged beneath it."""
    nvram: tuple[str, ...] = ()
    """Of a delete: the frozen copies of UEFI variables that go."""
    also: tuple[str, ...] = ()
    """Of a delete: the snapshots that go with it, in the same step."""
    memory: str | None = None
    """The file with the guest's memory that is made or restored."""
    memories: tuple[str, ...] = ()
    """Of a delete: the files with the memory of the snapshots, which no other snapshot has."""

    @property
    def what(self) -> str:
        """Return what is being done, as a part of a sentence."""
        return doing(self.operation, self.snapshot)

    def made(self, path: str, identity: tuple[int, int]) -> Intent:
        """Return the record with the identity of the overlay at `path`."""
        made = tuple(replace(o, identity=identity) if o.path == path else o for o in self.overlays)
        return replace(self, overlays=made)

    def merged(self, image: str, inode: int) -> Intent:
        """Return the record that knows the new image by its inode."""
        merges = tuple(replace(one, inode=inode) if one.image == image else one for one in self.merges)
        return replace(self, merges=merges)

    @property
    def names(self) -> tuple[str, ...]:
        """Every snapshot that it is about."""
        return (self.snapshot, *self.also)


class IntentStore:
    """The records of one libvirt connection. `folder` is made when the first one is written."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self._prefix = prefix

    @classmethod
    def of(cls, conn: libvirt.virConnect, environ: Mapping[str, str] = os.environ) -> IntentStore:
        """Return the store that belongs to the connection."""
        uri = conn.getURI()
        root = embed_root(uri)
        # Domains of the system, session and in-process libvirt may share a UUID: the kind is part of the name.
        prefix = "embed" if root else urlsplit(uri).path.strip("/").replace("/", "-") or "default"
        if environ.get(STATE_VARIABLE):
            return cls(Path(environ[STATE_VARIABLE]), prefix)
        if root is not None:
            return cls(root / "qemu-vmdk-snap", prefix)
        if os.geteuid() == 0:
            return cls(Path("/var/lib/qemu-vmdk-snap"), prefix)
        try:
            home = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or Path.home(), ".local", "state")
        except RuntimeError:
            raise InvalidRequest("journal", f"this user has no home: set HOME, or {STATE_VARIABLE}") from None
        return cls(Path(home) / "qemu-vmdk-snap", prefix)

    def path(self, uuid: str) -> Path:
        """Return where the record of a domain is, whether it is there or not."""
        return self.folder / f"{self._prefix}-{uuid}.json"

    def uuids(self) -> list[str]:
        """Return the domains that have a record, also one that cannot be followed."""
        start = len(self._prefix) + 1
        return sorted(path.stem[start:] for path in self.folder.glob(f"{self._prefix}-*.json"))

    def has(self, uuid: str) -> bool:
        """Return whether the domain has a record, also one that cannot be followed."""
        return os.path.lexists(self.path(uuid))

    def read(self, uuid: str) -> Intent | None:
        """Return the record of the domain, or None.

        Raises:
            DomainError: there is one that is damaged, of another version, or may be another user's; it is left where
                it is.
            InvalidRequest: the folder is another user's, or may be written by others.
        """
        path = self.path(uuid)
        try:
            if not os.path.lexists(path):
                return None
            self.check_folder()
            return _parse(uuid, path, _load(uuid, path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DomainError(uuid, f"the record {path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
            what = " ".join(str(error).split())[:80] or type(error).__name__
            raise DomainError(uuid, f"the record {path} of an unfinished operation is damaged: {what}") from error

    def write(self, intent: Intent) -> None:
        """Make the record durable; returns only when it is.

        Raises:
            InvalidRequest: the folder is another user's, or may be written by others.
            OSError: it cannot be stored; the record before it, if any, is still there.
        """
        self._make_folder()
        import json
        from dataclasses import asdict  # rarely needed: a command that only looks writes no record

        data = json.dumps({"version": _VERSION, **asdict(intent)}, indent=1).encode()
        replace_file(self.path(intent.uuid), data, mode=0o600)  # the XML may hold passwords
        _logger().info("domain %s: %s journaled", intent.domain, intent.what.removeprefix("the "))

    def remove(self, uuid: str) -> None:
        """Remove the record; the order of the steps before makes this safe without waiting for the disk."""
        self.path(uuid).unlink(missing_ok=True)
        _logger().info("domain %s: its record is removed", uuid)

    def busy(self, uuid: str) -> bool:
        """Return whether a command holds the domain's lock now; nothing is made for that."""
        try:
            fd = os.open(self._lock(uuid), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    @contextlib.contextmanager
    def locked(self, uuid: str, domain: str) -> Iterator[None]:
        """Lock the domain's snapshots against other commands. The lock ends with the process.

        Raises:
            DomainBusy: another command is changing them.
            InvalidRequest: the folder is another user's, or may be written by others.
        """
        self._make_folder()
        fd = os.open(self._lock(uuid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not _flocked(fd):
                raise DomainBusy(domain, "another command is changing its snapshots")
            _logger().debug("domain %s: locked by %s", domain, self._lock(uuid))
            yield
        finally:
            os.close(fd)  # the file stays: unlinking it would let two commands lock two files of one name

    def check_folder(self) -> None:
        """Accept a folder in which only root and this user can create records.

        Raises:
            InvalidRequest: another user owns it, or may write it.
        """
        facts = self.folder.stat()
        if facts.st_uid not in (0, os.geteuid()):
            raise InvalidRequest(self.folder, "belongs to another user, who could plant records there: it is not used")
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = "may be written by others, who could plant records there: it is not used (chmod go-w)"
            raise InvalidRequest(self.folder, reason)

    def _lock(self, uuid: str) -> Path:
        return self.path(uuid).with_suffix(".lock")

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in missing:
            _sync(folder.parent)
        self.check_folder()


def doing(operation: str, snapshot: str | None) -> str:
    """Return what is being done, as a part of a sentence: "the delete of snapshot 's1'"."""
    return f"the {operation} of snapshot {snapshot!r}" if snapshot else f"the {operation} of the domain"


def pending_overlays(store: IntentStore) -> set[Path]:
    """Return the overlays that unfinished snapshots of other domains are about to make."""
    paths = set()
    for uuid in store.uuids():
        with contextlib.suppress(DomainError):  # a damaged record blocks only its own domain
            intent = store.read(uuid)
            paths |= {Path(overlay.path) for overlay in intent.overlays} if intent else set()
    return paths


def _load(uuid: str, path: Path) -> object:
    """Return the content of the file, valid or not; a link, a pipe or a device is refused."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(fd)
        foreign = facts.st_uid not in (0, os.geteuid()) or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if foreign or not stat.S_ISREG(facts.st_mode):
            raise DomainError(uuid, f"the record {path} is another user's, or may be written by others")
        if facts.st_size > _MAX_BYTES:
            raise DomainError(uuid, f"the record {path} is larger than {_MAX_BYTES} bytes")
        with os.fdopen(os.dup(fd), "rb") as file:
            import json

            return json.loads(file.read(_MAX_BYTES))
    finally:
        os.close(fd)


def _parse(uuid: str, path: Path, record: object) -> Intent:
    if not isinstance(record, dict):
        raise TypeError("it is not an object")
    version = record.pop("version", None)
    if version != _VERSION:
        text = str(version)[:20]
        raise DomainError(uuid, f"the record {path} has version {text}, not {_VERSION}: another version wrote it")
    intent = fields.read(Intent, record, parts={"Overlay": Overlay, "Merge": Merge})
    if intent.uuid != uuid:
        raise ValueError(f"it is of domain {intent.uuid[:40]!r}")
    if intent.operation not in OPERATIONS:
        raise ValueError(f"the operation {intent.operation[:20]!r} is not known")
    for text in (intent.old_xml, intent.new_xml, intent.snapshot_xml, *(text for _, text in intent.snapshots)):
        fields.check_xml(text)
    return intent


def _flocked(fd: int) -> bool:
    """Lock the file against all others; return False if another command has it for longer than a test takes."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        else:
            return True


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _logger() -> Logger:
    import logging  # 20 ms: a hook at a guest's start looks at records, and logs nothing

    return logging.getLogger(__name__)
