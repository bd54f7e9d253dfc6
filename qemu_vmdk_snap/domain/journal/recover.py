"""Finish an unfinished snapshot, or take it back: after a crash, and when a step fails.

libvirt's persistent XML decides. It changes in one step for all disks, so it names every overlay or none:

    XML names the overlays   the guest may have run on them: finish (register the snapshot)
    XML names the old disks  nothing uses the overlays: take back (unlink them)

A guest that runs was to go over to the overlays in the last step. QEMU tells whether it has; if not, the XML is put
back too. A guest that has ended meanwhile counts as above: an overlay that it never used is empty and shows what its
base has.

A file is unlinked only when no XML names it, only if it is still empty (seen under the lock that keeps writers out),
and only if it is the file that the snapshot made: nothing that was written can be lost.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import HOLE, Census, Link, confined, open_link, open_posix
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore, Overlay
from qemu_vmdk_snap.domain.qemu.agent import thaw_left
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.qemu.switch import follow_cid, written_files
from qemu_vmdk_snap.domain.state import find_snapshot, inactive_xml
from qemu_vmdk_snap.errors import DomainError, LockBusy, VmdkSnapError

if TYPE_CHECKING:
    import libvirt


Finisher = Callable[["libvirt.virConnect", "libvirt.virDomain", Intent], None]
"""Does every step of a recorded operation that is not done yet; doing it twice does no harm."""

FINISHERS: Final[dict[str, tuple[str, str]]] = {
    "delete": ("qemu_vmdk_snap.domain.delete.run", "finish"),
    "rename": ("qemu_vmdk_snap.domain.edit", "finish_rename"),
}
"""Operation -> module and function of its `Finisher`. One that is not here is settled by what the XML names."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What became of an unfinished snapshot."""

    domain: str
    snapshot: str
    finished: bool
    """True: it is complete now. False: it was taken back."""
    left: tuple[Path, ...] = ()
    """Overlays that were not removed, because they hold data or are not known to be ours."""
    operation: str = "create"

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {
            "operation": self.operation,
            "domain": self.domain,
            "snapshot": self.snapshot,
            "finished": self.finished,
            "left": [str(path) for path in self.left],
        }


def recover(conn: libvirt.virConnect) -> list[Recovery]:
    """Settle every unfinished snapshot of this connection's domains, and return what became of each.

    Raises:
        DomainError: one could not be settled; its record stays, as does all that it names. The others are settled.
    """
    store = IntentStore.of(conn)
    settled: list[Recovery] = []
    failure: VmdkSnapError | OSError | None = None
    for uuid in store.uuids():
        try:
            domain = _lookup(conn, store, uuid)
            with store.locked(uuid, domain.name()):
                result = recover_domain(conn, domain, store)
        except (VmdkSnapError, OSError) as error:
            failure = failure or error
        else:
            settled += [result] if result else []
    if failure is not None:
        raise failure
    return settled


def _lookup(conn: libvirt.virConnect, store: IntentStore, uuid: str) -> libvirt.virDomain:
    import libvirt

    try:
        return conn.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        reason = f"libvirt does not know it, but {store.path(uuid)} tells of its unfinished snapshot: define it first"
        raise DomainError(uuid, reason) from error


def recover_by_name(conn: libvirt.virConnect, domain_name: str) -> Recovery | None:
    """Settle the unfinished snapshot of one domain; None when there is none, or its command is still at work.

    Raises:
        DomainError: there is no such domain, or it could not be settled.
    """
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    uuid = domain.UUIDString()
    if not store.path(uuid).exists() or store.busy(uuid):
        return None
    with store.locked(uuid, domain.name()):
        return recover_domain(conn, domain, store)


def recover_domain(conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore) -> Recovery | None:
    """Settle the unfinished snapshot of `domain`, whose lock the caller holds; None when there is none."""
    intent = store.read(domain.UUIDString())
    if intent is None:
        return None
    name = domain.name()
    if intent.operation in FINISHERS:
        module, function = FINISHERS[intent.operation]
        finish = cast(Finisher, getattr(importlib.import_module(module), function))
        finish(conn, domain, intent)
        if intent.live and intent.resume and domain.isActive():
            _resume(domain)
        store.remove(intent.uuid)
        return Recovery(name, intent.snapshot, finished=True, operation=intent.operation)
    with libvirt_errors(name, f"settle its unfinished snapshot {intent.snapshot!r}"):
        if intent.live and domain.isActive() and not _switched(domain, intent):
            _back_to_old(conn, domain, intent)
        if intent.operation == "revert":
            result = _settle_revert(conn, domain, intent)
        elif _named(domain, intent):
            _repair_cids(intent)
            if _registered(domain, intent) is None:
                register(domain, intent)
            result = Recovery(name, intent.snapshot, finished=True)
        elif _registered(domain, intent) is not None:
            result = Recovery(name, intent.snapshot, finished=True)
        else:
            left = _unlink_overlays(conn, domain, intent)
            result = Recovery(name, intent.snapshot, finished=False, left=left)
        if intent.live and intent.resume:
            _resume(domain)
        if intent.thaw and domain.isActive():
            thaw_left(domain)  # only now: an agent without vCPUs does not answer
    store.remove(intent.uuid)
    return result


def _settle_revert(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> Recovery:
    if not _named(domain, intent):
        left = _unlink_overlays(conn, domain, intent)
        return Recovery(domain.name(), intent.snapshot, finished=False, left=left, operation="revert")
    make_current(domain, intent.snapshot)
    unlink_discarded(conn, domain, intent)
    return Recovery(domain.name(), intent.snapshot, finished=True, operation="revert")


def make_current(domain: libvirt.virDomain, name: str) -> None:
    """Let the snapshot be the current one, whose child the next one will be."""
    import libvirt

    text = find_snapshot(domain, name).getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    domain.snapshotCreateXML(text, flags)


def unlink_discarded(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> tuple[Path, ...]:
    """Unlink the tops that a revert gives up, where nothing stands on them and nobody uses them; return those."""
    gone = []
    for path in map(Path, intent.discard):
        with contextlib.suppress(VmdkSnapError, OSError), contextlib.ExitStack() as held:
            if path in _all_frozen(conn):
                continue
            link = open_link(path, opener=open_posix, writable=True, resolver=confined(_folders(intent)))
            held.callback(link.close)
            if not Census.of(_folders(intent)).dependents([path]):
                for file in link.files:
                    file.path.unlink()
                gone.append(path)
    return tuple(gone)


def _switched(domain: libvirt.virDomain, intent: Intent) -> bool:
    """Return whether QEMU writes to the overlays: all, or none, as it goes over in one step."""
    candidates = {overlay.target: [Path(overlay.path)] for overlay in intent.overlays}
    return bool(written_files(domain, candidates))


def _back_to_old(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Make libvirt and QEMU forget a snapshot that the running guest was never told of."""
    snapshot = _registered(domain, intent)
    if snapshot is not None:
        _forget(snapshot)
    if _named(domain, intent):
        conn.defineXML(intent.old_xml)
    monitor = Monitor(domain)
    for overlay in intent.overlays:
        if Path(overlay.path).exists():
            monitor.drop_overlay(Path(overlay.path))


def _repair_cids(intent: Intent) -> None:
    """Let an overlay that was never used fit its base, which the guest went on writing to."""
    if not intent.live:
        return
    folders = _folders(intent)
    for overlay in intent.overlays:
        with contextlib.suppress(LockBusy), contextlib.ExitStack() as held:  # in use: then it fitted
            if _hold_link(overlay, folders, held):
                held.close()
                follow_cid(Path(overlay.path), Path(overlay.frozen))


def _resume(domain: libvirt.virDomain) -> None:
    """Start the vCPUs that the dead command may have left stopped."""
    import libvirt

    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        domain.resume()


def take_back(conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent) -> None:
    """Undo what has been done of `intent` by this process, which knows by identity the overlays it made.

    Raises:
        VmdkSnapError, OSError: it cannot be undone now; the record stays for `recover`.
    """
    name = domain.name()
    if intent.live and domain.isActive() and _switched(domain, intent):
        raise DomainError(name, "QEMU writes to the overlays already")
    with libvirt_errors(name, "take the snapshot back"), contextlib.ExitStack() as held:
        made = [overlay for overlay in intent.overlays if overlay.identity is not None]
        if _named(domain, intent):
            for overlay in made:
                _hold_empty(overlay, _folders(intent), held)  # from here on no guest can start on it
            snapshot = _registered(domain, intent)
            if snapshot is not None:
                _forget(snapshot)
            if intent.operation == "revert" and intent.current is not None:
                make_current(domain, intent.current)
            conn.defineXML(intent.old_xml)
            if _named(domain, intent):
                raise DomainError(name, "still names the overlays after its old XML was defined")
        held.close()
        for overlay in made:
            _unlink_made(overlay)
    store.remove(intent.uuid)


def undo(
    conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent, cause: BaseException
) -> None:
    """Take back what `cause` has stopped; raises DomainError, naming both, when that fails too."""
    try:
        take_back(conn, domain, store, intent)
    except (VmdkSnapError, OSError) as error:
        reason = f"{cause}; taking it back failed too ({error}): the next command on this domain settles it"
        raise DomainError(domain.name(), reason) from cause


def _named(domain: libvirt.virDomain, intent: Intent) -> bool:
    """Return whether the persistent XML names the overlays: all, or none."""
    files = xml.files_in(inactive_xml(domain))
    named = [overlay.path for overlay in intent.overlays if Path(overlay.path) in files]
    if named and len(named) < len(intent.overlays):
        others = ", ".join(overlay.path for overlay in intent.overlays if overlay.path not in named)
        reason = f"was edited during the snapshot {intent.snapshot!r}: it names {', '.join(named)} but not {others}"
        raise DomainError(domain.name(), reason)
    return bool(named)


def _registered(domain: libvirt.virDomain, intent: Intent) -> libvirt.virDomainSnapshot | None:
    if intent.operation != "create":
        return None
    for snapshot in domain.listAllSnapshots():
        if snapshot.getName() != intent.snapshot:
            continue
        disks = {str(disk.overlay) for disk in xml.parse_snapshot(snapshot.getXMLDesc(0)).disks}
        if disks >= {overlay.path for overlay in intent.overlays}:
            return snapshot
    return None


def register(domain: libvirt.virDomain, intent: Intent) -> None:
    """Add the snapshot to libvirt's metadata, as the current one, with the domain as it was before inside."""
    import libvirt

    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    domain.snapshotCreateXML(intent.snapshot_xml, flags)


def _forget(snapshot: libvirt.virDomainSnapshot) -> None:
    import libvirt

    snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)


def _unlink_overlays(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> tuple[Path, ...]:
    """Unlink what the dead command made; return what had to stay."""
    left = []
    named: set[Path] | None = None
    folders = _folders(intent)
    for overlay in intent.overlays:
        path = Path(overlay.path)
        if not os.path.lexists(path):
            continue
        if overlay.identity is None:
            # It died before it noted which files it made: somebody else may have taken the name since.
            named = _all_named(conn) if named is None else named
            ours = path not in named and _parent_of(path, folders) == Path(overlay.frozen)
        else:
            ours = _identity(path) == overlay.identity
        if not ours:
            left.append(path)
            continue
        try:
            with contextlib.ExitStack() as held:
                _hold_empty(overlay, folders, held)
                path.unlink()
        except (VmdkSnapError, OSError):
            left.append(path)
    return tuple(left)


def _unlink_made(overlay: Overlay) -> None:
    path = Path(overlay.path)
    if os.path.lexists(path) and _identity(path) == overlay.identity:
        path.unlink()


def _folders(intent: Intent) -> list[Path]:
    """Return where the chains of the snapshot lie: nothing else is opened, whatever the files say of their parents."""
    return sorted({path.parent for path in xml.files_in(intent.new_xml)})


def _hold_empty(overlay: Overlay, folders: Sequence[Path], held: contextlib.ExitStack) -> None:
    """Lock the overlay against every other user until `held` closes.

    Raises:
        DomainError: it has been written to.
        LockBusy: a guest, or another program, has it open.
    """
    if not _hold_link(overlay, folders, held):
        raise DomainError(overlay.target, f"overlay {overlay.path} holds data already: it stays")


def _hold_link(overlay: Overlay, folders: Sequence[Path], held: contextlib.ExitStack) -> bool:
    """Lock the overlay, not its parents, and return whether it is empty."""
    link = open_link(Path(overlay.path), opener=open_posix, writable=True, resolver=confined(folders))
    held.callback(link.close)
    return is_empty(link)


def is_empty(link: Link) -> bool:
    """Return whether the image stores nothing of its own."""
    return all(bool((table.kinds == HOLE).all()) for table in link.tables())


def _parent_of(path: Path, folders: Sequence[Path]) -> Path | None:
    try:
        with engine.open_chain(path, trusted_dirs=folders, lock=False, check_cids=False) as chain:
            return chain.links[1].path if chain.depth > 1 else None
    except (VmdkSnapError, OSError):
        return None


def _all_named(conn: libvirt.virConnect) -> set[Path]:
    """Return every file that any domain or snapshot of the connection names."""
    named: set[Path] = set()
    for domain in conn.listAllDomains():
        named |= xml.files_in(domain.XMLDesc(0)) | xml.files_in(inactive_xml(domain))
        for snapshot in domain.listAllSnapshots():
            named |= xml.files_in(snapshot.getXMLDesc(0))
    return named


def _all_frozen(conn: libvirt.virConnect) -> set[Path]:
    """Return every file that a domain of the connection uses, or a snapshot of one has frozen."""
    frozen: set[Path] = set()
    for domain in conn.listAllDomains():
        frozen |= xml.files_in(domain.XMLDesc(0)) | xml.files_in(inactive_xml(domain))
        for snapshot in domain.listAllSnapshots():
            frozen |= xml.files_in(xml.domain_of(snapshot.getXMLDesc(0)))
    return frozen


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
