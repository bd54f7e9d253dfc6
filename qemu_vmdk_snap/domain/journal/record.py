"""The intent record: what a snapshot is about to change, durable before the first change.

Where it lies, and why there. The record tells a later command which files to unlink and which XML to define, mostly as
root. Beside the disk, whoever may write that folder (QEMU's user, often) could plant one; so it lies in a folder of the
user who runs the commands, on the host whose libvirt it speaks about: `QEMU_VMDK_SNAP_STATE` if set, the root of an
in-process libvirt, `/var/lib/qemu-vmdk-snap` for root, XDG_STATE_HOME for others. One file per domain, by UUID, because
names change; a lock beside it tells a command at work from one that died.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from qemu_vmdk_snap.domain.connect import embed_root
from qemu_vmdk_snap.errors import DomainBusy, DomainError

if TYPE_CHECKING:
    import libvirt

STATE_VARIABLE: Final = "QEMU_VMDK_SNAP_STATE"
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Overlay:
    """A file that the snapshot puts on a disk."""

    target: str
    path: str
    frozen: str
    """The top of the disk before."""
    identity: tuple[int, int] | None = None
    """Device and inode once it is made: what else bears the name is not ours. None while it may not exist yet."""


@dataclass(frozen=True, slots=True)
class Intent:
    """Everything that is needed to finish a snapshot, or to take it back, without whoever began it."""

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
    """Whether a running guest was to go over to the overlays: after the XML named them, QEMU had yet to be told."""
    resume: bool = False
    """Whether its vCPUs were running: stopped by us, they must be started again."""
    thaw: bool = False
    """Whether its file systems were to be frozen: left so, they must be thawed."""
    operation: str = "create"
    """`create`, `revert`, `delete` or `rename`."""
    current: str | None = None
    """The current snapshot before; of a rename, afterwards."""
    discard: tuple[str, ...] = ()
    """Of a revert: the files that go once no XML names them."""
    work: tuple[dict[str, Any], ...] = ()
    """Of a delete: what happens to each disk; see `delete.Work`."""
    snapshots: tuple[tuple[str, str], ...] = ()
    """Of a delete: (name, new XML) of the snapshots that stay and name other files then."""

    def made(self, path: str, identity: tuple[int, int]) -> Intent:
        """Return the record that knows the overlay at `path` by its identity."""
        made = tuple(replace(o, identity=identity) if o.path == path else o for o in self.overlays)
        return replace(self, overlays=made)


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
        home = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or Path.home(), ".local", "state")
        return cls(Path(home) / "qemu-vmdk-snap", prefix)

    def path(self, uuid: str) -> Path:
        """Return where the record of a domain is, whether it is there or not."""
        return self.folder / f"{self._prefix}-{uuid}.json"

    def uuids(self) -> list[str]:
        """Return the domains that have a record."""
        start = len(self._prefix) + 1
        return sorted(path.stem[start:] for path in self.folder.glob(f"{self._prefix}-*.json"))

    def read(self, uuid: str) -> Intent | None:
        """Return the record of the domain, or None.

        Raises:
            DomainError: there is one that cannot be understood; it is left where it is.
        """
        path = self.path(uuid)
        try:
            fields: dict[str, Any] = json.loads(path.read_bytes())
            if fields.pop("version") != _VERSION:
                raise DomainError(uuid, f"the record {path} was written by another version of this program")
            fields["overlays"] = tuple(
                Overlay(**{**o, "identity": o["identity"] and tuple(o["identity"])}) for o in fields["overlays"]
            )
            fields["discard"] = tuple(fields.get("discard", ()))
            fields["work"] = tuple(fields.get("work", ()))
            fields["snapshots"] = tuple((name, text) for name, text in fields.get("snapshots", ()))
            return Intent(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DomainError(uuid, f"the record {path} of an unfinished snapshot is damaged: {error}") from error

    def write(self, intent: Intent) -> None:
        """Make the record durable; returns only when it is."""
        self._make_folder()
        path = self.path(intent.uuid)
        data = json.dumps({"version": _VERSION, **asdict(intent)}, indent=1).encode()
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        fd = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )  # the XML may hold passwords
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync(self.folder)

    def remove(self, uuid: str) -> None:
        """Forget the record; the order of the steps before it is safe without waiting for the disk."""
        self.path(uuid).unlink(missing_ok=True)

    def busy(self, uuid: str) -> bool:
        """Return whether a command holds the domain's lock now."""
        try:
            with self.locked(uuid, uuid):
                return False
        except DomainError:
            return True

    @contextlib.contextmanager
    def locked(self, uuid: str, domain: str) -> Iterator[None]:
        """Be the only command that changes the domain's snapshots. The lock goes with the process, however it ends.

        Raises:
            DomainError: another command is at it.
        """
        self._make_folder()
        lock = self.path(uuid).with_suffix(".lock")
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise DomainBusy(domain, "another command is changing its snapshots") from error
            raise
        try:
            yield
        finally:
            os.close(fd)  # the file stays: unlinking it would let two commands lock two files of one name

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in missing:
            _sync(folder.parent)


def pending_overlays(store: IntentStore) -> set[Path]:
    """Return the overlays that unfinished snapshots of other domains are about to make."""
    paths = set()
    for uuid in store.uuids():
        with contextlib.suppress(DomainError):  # a damaged record is for `recover` to tell of, in its own domain
            intent = store.read(uuid)
            paths |= {Path(overlay.path) for overlay in intent.overlays} if intent else set()
    return paths


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
