"""Finish an unfinished snapshot, or undo it: after a crash, and when a step fails.

Each change is made to the current XML, and only to the disks that the operation changed: what an administrator
edited since the command died stays.

libvirt's persistent XML decides. It changes in one step for all disks, so it names every overlay or none:

    XML names the overlays   the guest may have run on them: finish (register the snapshot)
    XML names the old disks  nothing uses the overlays: undo (unlink them)

A running guest was to be switched to the overlays in the last step. QEMU is asked whether it was; if not, the XML is
restored too. For a guest that has ended meanwhile see above: an overlay that it never used is empty and reads as its
base.

A file is unlinked only when no XML names it, only if it is still empty (seen under the lock that keeps writers out),
and only if it is the file that the snapshot made: nothing that was written can be lost.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.journal import overlays
from qemu_vmdk_snap.domain.journal.pending import abandoning, uuid_of, ways_out
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore
from qemu_vmdk_snap.domain.nvram import discard_nvram, restore_nvram
from qemu_vmdk_snap.domain.qemu.agent import thaw_left
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.qemu.switch import follow_cid, written_files
from qemu_vmdk_snap.domain.qemu.unused import release_unused
from qemu_vmdk_snap.domain.registration import register_anew, register_text
from qemu_vmdk_snap.domain.served import server
from qemu_vmdk_snap.domain.served.guest import resume_from_memory
from qemu_vmdk_snap.domain.served.hold import await_decided, complete_switch, written_by_servers
from qemu_vmdk_snap.domain.served.memory import unlink_memory
from qemu_vmdk_snap.domain.state import define, find_snapshot, inactive_xml, volume_resolver
from qemu_vmdk_snap.domain.xml.edits import same_xml, with_disks_back
from qemu_vmdk_snap.domain.xml.served import served_disks
from qemu_vmdk_snap.errors import DomainError, LockBusy, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_log = logging.getLogger(__name__)

Finisher = Callable[["libvirt.virConnect", "libvirt.virDomain", Intent], "Recovery | None"]
"""Does every step of a recorded operation that is not done yet; it can be called twice. What it returns says what
became of the operation; None is for one that is finished."""

FINISHERS: Final[dict[str, tuple[str, str]]] = {
    "delete": ("qemu_vmdk_snap.domain.delete.run", "finish"),
    "rename": ("qemu_vmdk_snap.domain.edit", "finish_rename"),
    "attach": ("qemu_vmdk_snap.domain.attach.run", "finish"),
    "detach": ("qemu_vmdk_snap.domain.attach.run", "finish"),
    "clone": ("qemu_vmdk_snap.domain.clone.run", "settle"),
    "destroy": ("qemu_vmdk_snap.domain.destroy.run", "settle"),
    "move": ("qemu_vmdk_snap.domain.move.run", "settle"),
    "consolidate": ("qemu_vmdk_snap.domain.delete.run", "finish"),
}
"""Operation -> module and function of its `Finisher`. For other operations the XML decides, as above."""

_MALFORMED: Final = (TypeError, ValueError, KeyError, AttributeError, IndexError)
"""What a step raises for a record that can be read but is incomplete."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """How an unfinished operation was finished or undone."""

    domain: str
    snapshot: str
    finished: bool
    """True: it is complete now. False: it was undone."""
    left: tuple[Path, ...] = ()
    """Overlays that were not removed, because they contain data or are not known to be ours."""
    operation: str = "create"
    also: tuple[str, ...] = ()
    """Snapshots that were deleted, or are not, in the same step."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {
            "operation": self.operation,
            "domain": self.domain,
            "snapshot": self.snapshot,
            "finished": self.finished,
            "left": [str(path) for path in self.left],
        }


def recover(conn: libvirt.virConnect, names: Sequence[str] = ()) -> list[Recovery]:
    """Finish or undo the unfinished operations of these domains (of all, without names), and return the result of each.

    Raises:
        DomainError: one failed; its record stays, and its files are not changed. The others are finished or undone.
        InvalidRequest: the folder of the records is another user's, or may be written by others.
    """
    store = IntentStore.of(conn)
    settled: list[Recovery] = []
    failure: VmdkSnapError | OSError | None = None
    for uuid in [uuid_of(conn, store, name) for name in names] if names else store.uuids():
        try:
            if not store.has(uuid) and not names:
                continue
            result = _settle_destroyed(conn, store, uuid)
            if result is None:
                domain = _lookup(conn, store, uuid)
                with store.locked(uuid, domain.name()):
                    result = recover_domain(conn, domain, store) if store.has(uuid) else None
                    if names and domain.isActive():
                        with contextlib.suppress(VmdkSnapError):  # a detached disk that stays open is in nobody's way
                            release_unused(Monitor(domain))
        except (VmdkSnapError, OSError) as error:
            failure = failure or error
        else:
            settled += [result] if result else []
    with contextlib.suppress(VmdkSnapError, OSError):
        engine.recover(store.folder)  # what is left of records that never became complete
    if failure is not None:
        raise failure
    return settled


def _settle_destroyed(conn: libvirt.virConnect, store: IntentStore, uuid: str) -> Recovery | None:
    """Finish the destroy of a domain that libvirt has forgotten already; None where there is no such one."""
    import libvirt

    with contextlib.suppress(libvirt.libvirtError):
        conn.lookupByUUIDString(uuid)
        return None
    intent = None
    with contextlib.suppress(DomainError):  # one that cannot be followed is told of as ever
        intent = store.read(uuid)
    if intent is None or intent.operation != "destroy":
        return None
    with store.locked(uuid, intent.domain):
        # By name, as the finishers.
        result = importlib.import_module("qemu_vmdk_snap.domain.destroy.run").finish(conn, intent)
        store.remove(uuid)
    return cast(Recovery, result)


def _lookup(conn: libvirt.virConnect, store: IntentStore, uuid: str) -> libvirt.virDomain:
    import libvirt

    try:
        return conn.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        record = f"but {store.path(uuid)} records an operation on it that is not finished"
        reason = f"libvirt does not know it, {record}: define it first, or"
        raise DomainError(uuid, f"{reason} {abandoning(conn.getURI(), uuid)}") from error


def recover_by_name(conn: libvirt.virConnect, domain_name: str) -> Recovery | None:
    """Finish or undo the unfinished operation of one domain; None when there is none, or its command is running.

    Raises:
        DomainError: there is no such domain, or it failed.
    """
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    uuid = domain.UUIDString()
    if not store.has(uuid) or store.busy(uuid):
        return None
    with store.locked(uuid, domain.name()):
        return recover_domain(conn, domain, store)


def recover_domain(conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore) -> Recovery | None:
    """Finish or undo the unfinished operation of `domain`, whose lock the caller holds; None when there is none.

    Raises:
        DomainError: this is not possible now; the error names what can be done. The record stays.
    """
    name, uri = domain.name(), conn.getURI()
    if not domain.isActive():
        server.stop(name, inactive_xml(domain))  # an idle one keeps everybody from its images
    try:
        intent = store.read(domain.UUIDString())
    except DomainError as error:
        raise DomainError(name, f"{error.reason}: {abandoning(uri, name)}") from error
    if intent is None:
        register_anew(domain)  # what an earlier version has registered
        return None
    _log.info("domain %s: %s is not finished: finishing or undoing it", name, intent.what)
    try:
        result = _settle(conn, domain, intent)
        store.remove(intent.uuid)
    except (VmdkSnapError, OSError, *_MALFORMED) as error:
        if isinstance(error, _MALFORMED):
            reason = f"its record {store.path(intent.uuid)} is damaged ({type(error).__name__})"
        else:
            reason = error.reason if isinstance(error, DomainError) else str(error)
        raise DomainError(name, f"{reason}; {intent.what} is not finished: {ways_out(uri, name)}") from error
    _log.info("domain %s: the %s is %s", name, intent.operation, "finished" if result.finished else "undone")
    return result


def _settle(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> Recovery:
    name = domain.name()
    if intent.operation in FINISHERS:
        module, function = FINISHERS[intent.operation]
        finish = cast(Finisher, getattr(importlib.import_module(module), function))
        result = finish(conn, domain, intent)
        if intent.live and intent.resume and domain.isActive():
            _resume(domain)
        done = Recovery(name, intent.snapshot, finished=True, operation=intent.operation, also=intent.also)
        return result or done
    with libvirt_errors(name, f"settle its unfinished snapshot {intent.snapshot!r}"):
        if intent.live and domain.isActive():
            await_decided(name, intent.new_xml, _overlays(intent))
            if _switched(domain, intent):
                complete_switch(name, intent.new_xml, _overlays(intent))
            else:
                _back_to_old(conn, domain, intent)
        result = (
            _settle_revert(conn, domain, intent)
            if intent.operation == "revert"
            else _settle_create(conn, domain, intent)
        )
        if intent.live and intent.resume:
            _resume(domain)
        if intent.thaw and domain.isActive():
            thaw_left(domain)  # only now: an agent without vCPUs does not answer
    return result


def _settle_create(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> Recovery:
    name = domain.name()
    if _named(domain, intent):
        _repair_cids(intent)
        if intent.operation == "create" and _registered(domain, intent) is None:
            _register_late(domain, intent)
        return Recovery(name, intent.snapshot, finished=True, operation=intent.operation)
    if _registered(domain, intent) is not None:
        return Recovery(name, intent.snapshot, finished=True)
    left = overlays.unlink_overlays(conn, domain, intent)
    discard_nvram(conn, domain, intent.snapshot_xml)
    unlink_memory(intent.memory, name, intent.uuid)
    return Recovery(name, intent.snapshot, finished=False, left=left, operation=intent.operation)


def _register_late(domain: libvirt.virDomain, intent: Intent) -> None:
    """Register the snapshot although the domain's other snapshots may have been changed since it was planned."""
    there = {snapshot.getName() for snapshot in domain.listAllSnapshots()}
    if intent.snapshot in there:
        raise DomainError(domain.name(), f"has another snapshot named {intent.snapshot!r} now")
    parent = xml.parse_snapshot(intent.snapshot_xml).parent
    if parent is not None and parent not in there:
        parent = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
        intent = replace(intent, snapshot_xml=xml.with_parent(intent.snapshot_xml, parent))
    register(domain, intent)


def _settle_revert(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> Recovery:
    if not _named(domain, intent):
        left = overlays.unlink_overlays(conn, domain, intent)
        return Recovery(domain.name(), intent.snapshot, finished=False, left=left, operation="revert")
    if intent.snapshot in {snapshot.getName() for snapshot in domain.listAllSnapshots()}:  # not deleted meanwhile
        make_current(domain, intent.snapshot)
    if not domain.isActive():
        restore_nvram(intent.snapshot_xml, intent.new_xml)
    if intent.memory is not None and not domain.isActive() and overlays.all_empty(intent):
        resume_from_memory(conn, domain, intent)
    # By name, as the finishers: it imports the records.
    importlib.import_module("qemu_vmdk_snap.domain.needs.discard").unlink_discarded(conn, domain, intent)
    return Recovery(domain.name(), intent.snapshot, finished=True, operation="revert")


def make_current(domain: libvirt.virDomain, name: str) -> None:
    """Make the snapshot the current one, whose child the next one will be."""
    import libvirt

    register_text(domain, find_snapshot(domain, name).getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE), current=True)


def _switched(domain: libvirt.virDomain, intent: Intent) -> bool:
    """Return whether QEMU, or a server, writes to the overlays: all, or none, as they go over in one step."""
    served = served_disks(intent.new_xml)
    direct = {target: [path] for target, path in _overlays(intent).items() if target not in served}
    if direct and written_files(domain, direct):
        return True
    return bool(written_by_servers(domain.name(), intent.new_xml, _overlays(intent)))


def _overlays(intent: Intent) -> dict[str, Path]:
    return {overlay.target: Path(overlay.path) for overlay in intent.overlays}


def _back_to_old(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Remove a snapshot from libvirt and QEMU to which the running guest was never switched."""
    snapshot = _registered(domain, intent)
    if snapshot is not None:
        _forget(snapshot)
    if _named(domain, intent):
        _put_disks_back(conn, domain, intent)
    monitor = Monitor(domain)
    for overlay in intent.overlays:
        if Path(overlay.path).exists():
            monitor.drop_overlay(Path(overlay.path))


def _put_disks_back(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Take the overlays out of the persistent XML; whatever was edited in it meanwhile stays."""
    tops = {Path(overlay.path): overlay.target for overlay in intent.overlays}
    define(conn, with_disks_back(inactive_xml(domain), intent.old_xml, intent.new_xml, tops))
    _log.info("domain %s: its disks are back on the files before %s", domain.name(), ", ".join(map(str, tops)))


def _put_all_back(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Define the XML from before a revert, which has changed more than the disks, unless somebody edited it since.

    Raises:
        DomainError: it was edited: the revert is finished instead, so that the edit stays.
    """
    if not same_xml(inactive_xml(domain), intent.new_xml):
        raise DomainError(domain.name(), "was edited after it was reverted")
    define(conn, intent.old_xml)


def _repair_cids(intent: Intent) -> None:
    """Make an overlay that was never used fit its base, which the guest has written to."""
    if not intent.live:
        return
    folders = overlays.chain_folders(intent)
    for overlay in intent.overlays:
        with contextlib.suppress(LockBusy), contextlib.ExitStack() as held:  # in use: then it fits
            if overlays.hold_link(overlay, folders, held):
                held.close()
                follow_cid(Path(overlay.path), Path(overlay.frozen))


def _resume(domain: libvirt.virDomain) -> None:
    """Start the vCPUs that the killed command may have left stopped."""
    import libvirt

    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        domain.resume()


def roll_back(conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent) -> None:
    """Undo what this process has done of `intent`; it knows the overlays that it made by identity.

    Raises:
        VmdkSnapError, OSError: it cannot be undone now; the record stays for `recover`.
    """
    name = domain.name()
    if intent.live and domain.isActive() and _switched(domain, intent):
        raise DomainError(name, "QEMU writes to the overlays already")
    with libvirt_errors(name, "undo the snapshot"), contextlib.ExitStack() as held:
        made = [overlay for overlay in intent.overlays if overlay.identity is not None]
        made = [overlay for overlay in made if os.path.lexists(overlay.path)]  # a server removes its own
        if _named(domain, intent):
            for overlay in made:
                # From here on no guest can start on it.
                overlays.hold_empty(overlay, overlays.chain_folders(intent), held)
            snapshot = _registered(domain, intent)
            if snapshot is not None:
                _forget(snapshot)
            if intent.operation == "revert":
                _put_all_back(conn, domain, intent)
                if intent.current is not None:
                    make_current(domain, intent.current)
            else:
                _put_disks_back(conn, domain, intent)
            if _named(domain, intent):
                raise DomainError(name, "still names the overlays after its old XML was defined")
        held.close()
        for overlay in made:
            overlays.unlink_made(overlay)
        if intent.operation == "create":
            discard_nvram(conn, domain, intent.snapshot_xml)
        if intent.operation == "create" and intent.memory is not None:
            unlink_memory(intent.memory, name, intent.uuid)
            if intent.resume:
                _resume(domain)
    store.remove(intent.uuid)


def undo(
    conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent, cause: BaseException
) -> None:
    """Undo what `cause` has stopped; raises DomainError, naming both, if that fails too."""
    try:
        roll_back(conn, domain, store, intent)
    except (VmdkSnapError, OSError) as error:
        reason = f"{cause}; undoing it failed too ({error})"
        raise DomainError(domain.name(), f"{reason}: {ways_out(conn.getURI(), domain.name())}") from cause


def _named(domain: libvirt.virDomain, intent: Intent) -> bool:
    """Return whether the persistent XML names the overlays: all, or none.

    A disk that was taken out of the domain meanwhile counts as the others do.

    Raises:
        DomainError: it names some, and another disk names the frozen file again.
    """
    text = inactive_xml(domain)
    files = xml.files_in(text)
    named = [overlay.path for overlay in intent.overlays if Path(overlay.path) in files]
    if named and len(named) < len(intent.overlays):
        tops = {disk.path for disk in xml.list_disks(text, volume_resolver(domain.connect(), domain.name()))}
        back = [one for one in intent.overlays if one.path not in named and Path(one.frozen) in tops]
        if back:
            reason = f"was edited during the {intent.operation} of snapshot {intent.snapshot!r}"
            others = ", ".join(overlay.path for overlay in back)
            raise DomainError(domain.name(), f"{reason}: it names {', '.join(named)} but not {others}")
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
    register_text(domain, intent.snapshot_xml, current=True)


def _forget(snapshot: libvirt.virDomainSnapshot) -> None:
    import libvirt

    snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
