"""Unfinished operations, for commands that only read and for `recover --abandon`: shown, never finished."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from qemu_vmdk_snap import log
from qemu_vmdk_snap.domain.connect import find_domain
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore, doing
from qemu_vmdk_snap.errors import DomainError, InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING, dataclass

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The record of an operation on a domain's snapshots that has begun and not ended."""

    uuid: str
    domain: str
    """The name that the domain has now; its UUID where libvirt does not know it."""
    record: Path
    intent: Intent | None
    """None where the record cannot be followed."""
    problem: str | None
    """Why not, in one line."""
    running: bool
    """Whether its command is running, so that nothing is to be finished."""
    uri: str

    @property
    def operation(self) -> str:
        """Return which it is, one of `record.OPERATIONS`."""
        return "unreadable" if self.intent is None else self.intent.operation

    @property
    def snapshot(self) -> str | None:
        """Return the snapshot that it is about."""
        return None if self.intent is None else self.intent.snapshot

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files that it creates, changes or deletes."""
        if self.intent is None:
            return ()
        named: set[object] = {*(overlay.path for overlay in self.intent.overlays), *self.intent.discard}
        named |= {self.intent.memory, *self.intent.memories}
        for one in self.intent.work:
            moving = one.get("moving")
            named |= {one.get(key) for key in ("frozen", "child", "source", "path")}
            named |= {*moving} if isinstance(moving, list) else set()
        for merge in self.intent.merges:
            named |= {merge.image, *merge.links}
        return tuple(sorted(Path(name) for name in named if isinstance(name, str)))

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types, as `recover --abandon --output=json` lists it."""
        return {
            "operation": self.operation,
            "domain": self.domain,
            "snapshot": self.snapshot,
            "record": str(self.record),
            "problem": self.problem,
            "files": [str(path) for path in self.files],
        }

    def line(self) -> str:
        """Return what is unfinished and how to finish or abandon it, in one line."""
        if self.running:
            return "another command is changing its snapshots now"
        if self.problem is not None:
            return f"{self.problem}: {abandoning(self.uri, self.domain)}"
        what = f"{doing(self.operation, self.snapshot)} is not finished"
        return f"{what}: {ways_out(self.uri, self.domain)}"


def ways_out(uri: str, domain: str) -> str:
    """Return how an unfinished operation is finished or abandoned."""
    return f"`{_recover(uri, domain)}` finishes or undoes it, {abandoning(uri, domain)}"


def abandoning(uri: str, domain: str) -> str:
    """Return how an unfinished operation is abandoned."""
    return f"`{_recover(uri, domain, '--abandon ')}` gives it up"


def unfinished_of(conn: libvirt.virConnect, domain: libvirt.virDomain) -> Unfinished | None:
    """Return the unfinished operation of one domain, None where there is none. Nothing is changed or created.

    Raises:
        InvalidRequest: the folder of the records is another user's, or may be written by others.
    """
    return _look(IntentStore.of(conn), domain.UUIDString(), domain.name(), conn.getURI())


def pending_line(conn: libvirt.virConnect, domain_name: str) -> str | None:
    """Return the line about the domain's unfinished operation for commands that only read, None where there is none.

    Raises:
        DomainError: there is no such domain.
    """
    domain = find_domain(conn, domain_name)
    try:
        found = unfinished_of(conn, domain)
    except InvalidRequest as error:
        return str(error)
    return None if found is None else f"domain {found.domain}: {found.line()}"


def delete_of_current(conn: libvirt.virConnect, domain_name: str) -> str | None:
    """Return the snapshot of an interrupted delete of the current one; None where there is no such delete.

    Once it is partly done another snapshot is the current one, and repeating the command must not delete that.
    """
    with contextlib.suppress(InvalidRequest):
        found = unfinished_of(conn, find_domain(conn, domain_name))
        if found is not None and found.intent is not None and found.operation == "delete":
            return found.snapshot if found.intent.current == found.snapshot else None
    return None


def all_unfinished(conn: libvirt.virConnect) -> list[Unfinished]:
    """Return the unfinished operations of all domains, also of those that libvirt does not know.

    Raises:
        InvalidRequest: the folder of the records is another user's, or may be written by others.
    """
    store, uri = IntentStore.of(conn), conn.getURI()
    found = [_look(store, uuid, _name_of(conn, uuid), uri) for uuid in store.uuids()]
    return [one for one in found if one is not None]


def abandon(conn: libvirt.virConnect, names: Sequence[str] = ()) -> list[Unfinished]:
    """Abandon the unfinished operations of these domains (of all, without names); return what they were.

    The records are removed, and nothing else changes: files and XML stay as they are, even if partly changed.

    Raises:
        DomainError: there is no such domain, or its command is running.
        InvalidRequest: the folder of the records is another user's, or may be written by others.
    """
    store = IntentStore.of(conn)
    uuids = [uuid_of(conn, store, name) for name in names] if names else store.uuids()
    gone = []
    for uuid in uuids:
        if not store.has(uuid):
            continue
        name = _name_of(conn, uuid)
        with store.locked(uuid, name):
            found = _look(store, uuid, name, conn.getURI(), locked=True)
            if found is not None:
                store.remove(uuid)
                _log.info("domain %s: its unfinished %s is given up", name, found.operation)
                gone.append(found)
    return gone


def uuid_of(conn: libvirt.virConnect, store: IntentStore, name: str) -> str:
    """Return the UUID of a domain by name, id or UUID; a record's domain need not be known to libvirt any more.

    Raises:
        DomainError: neither libvirt nor a record knows it.
    """
    try:
        return str(find_domain(conn, name).UUIDString())
    except DomainError:
        for uuid in store.uuids():
            with contextlib.suppress(DomainError):
                intent = store.read(uuid)
                if name == uuid or (intent is not None and intent.domain == name):
                    return uuid
            if name == uuid:
                return uuid
        raise


def _look(store: IntentStore, uuid: str, name: str, uri: str, *, locked: bool = False) -> Unfinished | None:
    if not store.has(uuid):
        return None
    running = not locked and store.busy(uuid)
    try:
        intent = store.read(uuid)
    except DomainError as error:
        return Unfinished(uuid, name, store.path(uuid), None, error.reason, running, uri)
    if intent is None:
        return None
    return Unfinished(uuid, name, store.path(uuid), intent, None, running, uri)


def _name_of(conn: libvirt.virConnect, uuid: str) -> str:
    import libvirt

    try:
        return str(conn.lookupByUUIDString(uuid).name())
    except libvirt.libvirtError:
        return uuid


def _recover(uri: str, domain: str, option: str = "") -> str:
    return f"recover {option}-c {shlex.quote(uri)} --domain {shlex.quote(domain)}"
