"""Delete snapshots: whatever is not deleted keeps reading what it read, and the XML follows the files.

A snapshot's state is a frozen file F of each disk. What happens to it, C being an image that is backed by F:

    merge   F has one child C            C's data goes down into F, which takes C's place; C is deleted
    copy    F has several, or is smaller F's data goes up into each of them; F's parent backs them; F is deleted
    drop    nothing needs F              F is deleted
    keep    another snapshot has F too   nothing

What can be known is found out first: who else needs a file that changes or goes (see `needed`), CIDs, locks, space,
permissions. The steps, each durable before the next. All of them can be done again, and `finish` does, after a crash:

    1  the intent record
    2  merge: the data goes down; C is empty then, and everything reads through it as before
    3  the children move; from here to 5 a domain that is started from its old XML finds CIDs that do not fit, and fails
    4  what will be deleted is locked, and seen to be empty (merge) or without children (copy, drop)
    5  the persistent XML; the snapshot itself is forgotten; then the XML of the snapshots that stay
    6  the files are unlinked; then the record goes
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap import Census, Link, OnProgress, confined, ignore, log, open_chain, own_files, read_facts
from qemu_vmdk_snap.domain import dropin, xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.delete.plan import (
    Deleted,
    Scope,
    State,
    Work,
    change_of,
    chosen,
    folders_of,
    make_intent,
    open_one,
    work_of,
)
from qemu_vmdk_snap.domain.delete.preflight import check_work
from qemu_vmdk_snap.domain.journal.overlays import is_empty
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore
from qemu_vmdk_snap.domain.journal.recover import Recovery, recover_domain
from qemu_vmdk_snap.domain.needs.needed import Given, place_in, real_file, require_none, same_file
from qemu_vmdk_snap.domain.overlay.newfile import refresh_pools
from qemu_vmdk_snap.domain.qemu.merge import merge_active
from qemu_vmdk_snap.domain.state import inactive_xml
from qemu_vmdk_snap.domain.xml.edits import keeping_description
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)


@dataclass(frozen=True, slots=True)
class DeleteReport:
    """What a delete did."""

    domain: str
    deleted: tuple[Deleted, ...]
    recovered: Recovery | None
    notes: tuple[str, ...] = ()
    failed: tuple[tuple[str, VmdkSnapError | OSError], ...] = ()
    """Snapshots that are as they were, and why; only with `keep_going`."""
    dry_run: bool = False
    """Whether this is only what would be done."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return bool(self.deleted) and not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `snapshot delete --output=json` shows it."""
        answer: dict[str, object] = {"domain": self.domain, "deleted": [one.as_dict() for one in self.deleted]}
        if self.failed:
            answer["failed"] = [{"snapshot": name, "reason": str(error)} for name, error in self.failed]
        return answer | ({"dry-run": True} if self.dry_run else {})


def delete(
    conn: libvirt.virConnect,
    domain_name: str,
    names: str | Sequence[str],
    *,
    scope: Scope = "one",
    metadata: bool = False,
    orphans: Sequence[Path] = (),
    keep_going: bool = False,
    on_progress: OnProgress = ignore,
) -> DeleteReport:
    """Delete snapshots of a domain, the youngest first, each of them whole before the next.

    `scope` takes in their descendants, or these alone. `metadata` makes libvirt forget them and touches no file.
    `orphans` are files that need what goes and are given up. With `keep_going` one that cannot be deleted is
    left as it was and reported, and the next one is tried; a delete that was begun and not finished ends it.

    Raises:
        DomainError: there is no such snapshot, or the guest runs on its files.
        StillNeeded: something else needs a file that would be changed or deleted, or may need it; it names what.
        VmdkSnapError, OSError: an image is broken or in use, or there is no space: the snapshot is as before, or its
            record stays and `recover` (or the next command) finishes it.
    """
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    notes: list[str] = []
    deleted: list[Deleted] = []
    with store.locked(domain.UUIDString(), domain.name()):
        recovered = recover_domain(conn, domain, store)
        wanted = without_finished([names] if isinstance(names, str) else names, domain, recovered)
        failed: list[tuple[str, VmdkSnapError | OSError]] = []
        for name in chosen(domain, wanted, scope):
            try:
                work, said = _delete_one(conn, domain, store, name, orphans, on_progress, metadata=metadata)
            except (VmdkSnapError, OSError) as error:
                if not keep_going:
                    raise
                failed.append((name, error))
                if store.path(domain.UUIDString()).exists():
                    break  # what was begun comes first
            else:
                notes += said
                deleted.append(Deleted(name, work))
    refresh_pools(conn, [Path(one.frozen) for snapshot in deleted for one in snapshot.work])
    return DeleteReport(domain.name(), tuple(deleted), recovered, tuple(notes), tuple(failed))


def _delete_one(
    conn: libvirt.virConnect,
    domain: libvirt.virDomain,
    store: IntentStore,
    name: str,
    orphans: Sequence[Path],
    on_progress: OnProgress,
    *,
    metadata: bool,
) -> tuple[tuple[Work, ...], list[str]]:
    intent = make_intent(State.read(conn, domain, orphans), name, metadata=metadata)
    work = work_of(intent)
    if not metadata:
        _settle(intent)
        check_work(domain.name(), work, folders_of(intent))
    plan = {"snapshot": name, "metadata": metadata, "operations": [line for one in work for line in one.lines()]}
    with dropin.around("delete", domain.name(), plan, uri=conn.getURI()) as said:
        for one in work:
            _log.info("domain %s: snapshot %r: %s: %s", domain.name(), name, one.target, "; ".join(one.lines()))
        _execute(conn, domain, store, intent, on_progress)
    return work, said


def without_finished(names: Sequence[str], domain: libvirt.virDomain, recovered: Recovery | None) -> list[str]:
    """Return the names without the one whose interrupted delete was finished first: that is what was asked for."""
    if recovered is None or recovered.operation != "delete":
        return list(names)
    there = {snapshot.getName() for snapshot in domain.listAllSnapshots()}
    return [name for name in names if name != recovered.snapshot or name in there]


def _execute(
    conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent, on_progress: OnProgress
) -> None:
    frozen_as = _cids(intent)
    store.write(intent)  # barrier: from here on `finish` knows what to do
    try:
        if intent.live:
            _merge_live(conn, domain, intent)
        else:
            _merge_down(intent, on_progress)
    except BaseException as error:
        begun = True
        with contextlib.suppress(VmdkSnapError, OSError):
            _settle(intent)
            begun = _names_merged(domain, intent) or _cids(intent) != frozen_as
            if not begun:
                store.remove(intent.uuid)  # the snapshot is as it was
        if begun and isinstance(error, (VmdkSnapError, OSError)):
            raise DomainError(domain.name(), _unfinished(intent, error)) from error
        raise
    try:
        finish(conn, domain, intent, on_progress=on_progress)
    except (VmdkSnapError, OSError) as error:
        raise DomainError(domain.name(), _unfinished(intent, error)) from error
    with contextlib.suppress(OSError):
        store.remove(intent.uuid)


def _unfinished(intent: Intent, error: VmdkSnapError | OSError) -> str:
    return f"{error}; the delete of snapshot {intent.snapshot!r} is not finished: `recover` resumes it"


def _cids(intent: Intent) -> list[int]:
    """Return the CIDs of the files that are merged into: another one says that what the snapshot held is gone."""
    return [
        read_facts(one.frozen, trusted_dirs=folders_of(intent)).cid for one in work_of(intent) if one.mode == "merge"
    ]


def finish(
    conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent, *, on_progress: OnProgress = ignore
) -> None:
    """Do every step that is not done yet.

    Raises:
        VmdkSnapError, OSError: a step cannot be done now; the record must stay.
    """
    _settle(intent)
    if intent.live:
        _merge_live(conn, domain, intent)
    if not _names_merged(domain, intent):
        _merge_down(intent, on_progress)
    _move(intent, on_progress)
    with contextlib.ExitStack() as held:
        doomed = [link for one in work_of(intent) if (link := _hold(domain.name(), one, intent, held)) is not None]
        with libvirt_errors(domain.name(), f"forget the snapshot {intent.snapshot!r}"):
            _change_xml(conn, domain, intent)
        for link in doomed:
            for file in own_files(link):
                real_file(file).unlink(missing_ok=True)  # a symbolic link to it is the user's, and stays


def _settle(intent: Intent) -> None:
    """Finish what was interrupted inside an operation on the images."""
    from qemu_vmdk_snap import recover

    for folder in {Path(one.frozen).parent for one in work_of(intent)}:
        recover(folder)


def _merge_live(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Let QEMU merge what the running guest writes to; then it, and the persistent XML, are on the lower files."""
    merges = [(one.target, Path(one.child), Path(one.frozen)) for one in work_of(intent) if one.live and one.child]
    if domain.isActive():
        before = inactive_xml(domain)
        merge_active(domain, merges, lambda: _define(conn, domain, intent), lambda: _restore(conn, domain, before))


def _names_merged(domain: libvirt.virDomain, intent: Intent) -> bool:
    """Return whether the XML follows a live merge already: what is left of the overlays is old then."""
    files = xml.files_in(inactive_xml(domain))
    return intent.live and all(place_in(files, one.child) is None for one in work_of(intent) if one.live)


def _merge_down(intent: Intent, on_progress: OnProgress) -> None:
    from qemu_vmdk_snap import commit

    resolver = confined(folders_of(intent))
    for one in work_of(intent):
        if one.mode != "merge" or one.child is None or not Path(one.child).exists():
            continue
        with open_one(Path(one.child), folders_of(intent), lock=False) as link:
            done = is_empty(link)
        if not done:  # done already, its children may stand on the base by now: they must keep what they read
            commit(
                one.child,
                base=one.frozen,
                keep_siblings=True,
                children=one.moving,
                orphans=one.orphans,
                resolver=resolver,
                on_progress=on_progress,
            )


def _move(intent: Intent, on_progress: OnProgress) -> None:
    from qemu_vmdk_snap import rebase

    resolver = confined(folders_of(intent))
    for one in work_of(intent):
        onto = Path(one.frozen) if one.mode == "merge" else None if one.parent is None else Path(one.parent)
        if one.removed is None or not one.removed.exists():
            continue
        for image in map(Path, one.moving):
            if _is_backed_by(image, one.removed, folders_of(intent)):
                rebase(image, onto, resolver=resolver, on_progress=on_progress)


def _is_backed_by(image: Path, parent: Path, folders: Sequence[Path]) -> bool:
    with open_chain(image, trusted_dirs=folders, lock=False) as chain:
        return chain.depth > 1 and same_file(chain.links[1].path, parent)


def _hold(domain: str, work: Work, intent: Intent, held: contextlib.ExitStack) -> Link | None:
    """Lock what will be deleted; None where it is gone already."""
    if work.removed is None or not work.removed.exists():
        return None
    folders = folders_of(intent)
    link = held.enter_context(open_one(work.removed, folders, lock=True))
    if work.mode == "merge" and not work.live and not is_empty(link):
        raise DomainError(domain, f"disk {work.target}: {work.removed} was written to meanwhile")
    given_up = Given(tuple(map(Path, work.orphans)))
    left = Census.of(folders).dependents([file.path for file in link.files])
    require_none(work.removed, [(one.path, one.reason) for one in left if not given_up.has(one.path)])
    return link


def _change_xml(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    import libvirt

    _define(conn, domain, intent)
    there = {snapshot.getName(): snapshot for snapshot in domain.listAllSnapshots()}
    # First, as libvirt takes it for a merge of its own kind: it writes other files into the XML of the descendants.
    if intent.snapshot in there:
        there.pop(intent.snapshot).delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    current = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
    redefine = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    for name, text in intent.snapshots:
        if name in there:
            as_current = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if name == current else 0
            edited = keeping_description(text, there[name].getXMLDesc(0))
            domain.snapshotCreateXML(edited, redefine | as_current)


def _define(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Change the files in the persistent XML; what was edited meanwhile stays."""
    now = inactive_xml(domain)
    changed = xml.relink(now, change_of(work_of(intent)))
    files = xml.files_in(now)
    if changed != now and any(place_in(files, one.removed) is not None for one in work_of(intent)):
        conn.defineXML(changed)


def _restore(conn: libvirt.virConnect, domain: libvirt.virDomain, before: str) -> None:
    if inactive_xml(domain) != before:
        conn.defineXML(before)
