"""Finish an unfinished snapshot, or take it back: after a crash, and when a step fails.

libvirt's persistent XML decides. It changes in one step for all disks, so it names every overlay or none:

    XML names the overlays   the guest may have run on them: finish (register the snapshot)
    XML names the old disks  nothing uses the overlays: take back (unlink them)

A file is unlinked only when no XML names it, only if it is still empty (seen under the lock that keeps writers out),
and only if it is the file that the snapshot made: nothing that was written can be lost.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.intent import Intent, IntentStore, Overlay
from qemu_vmdk_snap.domain.plan import inactive_xml
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt


@dataclass(frozen=True, slots=True)
class Recovery:
    """What became of an unfinished snapshot."""

    domain: str
    snapshot: str
    finished: bool
    """True: it is complete now. False: it was taken back."""
    left: tuple[Path, ...] = ()
    """Overlays that were not removed, because they hold data or are not known to be ours."""


def recover(conn: libvirt.virConnect) -> list[Recovery]:
    """Settle every unfinished snapshot of this connection's domains, and return what became of each.

    Raises:
        DomainError: one could not be settled; its record stays, and so does everything it names.
    """
    import libvirt

    store = IntentStore.of(conn)
    settled = []
    for uuid in store.uuids():
        try:
            domain = conn.lookupByUUIDString(uuid)
        except libvirt.libvirtError as error:
            reason = (
                f"libvirt does not know it, but {store.path(uuid)} tells of its unfinished snapshot: define it first"
            )
            raise DomainError(uuid, reason) from error
        with store.locked(uuid, domain.name()):
            result = recover_domain(conn, domain, store)
        settled += [result] if result else []
    return settled


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
    with libvirt_errors(name, f"settle its unfinished snapshot {intent.snapshot!r}"):
        named = _named(domain, intent)
        if _registered(domain, intent) is not None:
            result = Recovery(name, intent.snapshot, finished=True)
        elif named:
            register(domain, intent)
            result = Recovery(name, intent.snapshot, finished=True)
        else:
            left = _unlink_overlays(conn, domain, intent)
            result = Recovery(name, intent.snapshot, finished=False, left=left)
    store.remove(intent.uuid)
    return result


def take_back(conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent) -> None:
    """Undo what has been done of `intent` by this process, which knows by identity the overlays it made.

    Raises:
        VmdkSnapError, OSError: it cannot be undone now; the record stays for `recover`.
    """
    name = domain.name()
    with libvirt_errors(name, "take the snapshot back"), contextlib.ExitStack() as held:
        made = [overlay for overlay in intent.overlays if overlay.identity is not None]
        if _named(domain, intent):
            for overlay in made:
                _hold_empty(overlay, _folders(intent), held)  # from here on no guest can start on it
            snapshot = _registered(domain, intent)
            if snapshot is not None:
                _forget(snapshot)
            conn.defineXML(intent.old_xml)
            if _named(domain, intent):
                raise DomainError(name, "still names the overlays after its old XML was defined")
        held.close()
        for overlay in made:
            _unlink_made(overlay)
    store.remove(intent.uuid)


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
    path = Path(overlay.path)
    chain = held.enter_context(engine.open_chain(path, writable=True, trusted_dirs=folders))
    if any(run.depth == 0 and run.kind is not engine.RunKind.HOLE for run in chain.map()):
        raise DomainError(overlay.target, f"overlay {path} holds data already: it stays")


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


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
