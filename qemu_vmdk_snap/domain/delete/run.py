"""Delete snapshots: whatever is not deleted keeps reading what it read, and the XML follows the files.

A snapshot's state is a frozen file F of each disk. What happens to it, C being an image that is backed by F:

    merge   F has a child C              C's data is copied to F, which replaces C; C is deleted
    copy    F is smaller                 F's data goes up into its children; F's parent backs them; F is deleted
    drop    nothing needs F              F is deleted
    keep    another snapshot has F too   nothing

What can be known is found out first: who else needs a file that changes or goes (see `needed`), CIDs, locks, space,
permissions. An overlay of F that a revert has left and that holds no data goes with F. Where F has several children,
one takes F's place and the others get what they would lose, whichever way writes less. Under a running guest none of
this can be done to the files that it uses: see `live` and `steps`.

The steps, each durable before the next. All of them can be done again, and `finish` does, after a crash:

    1  the intent record
    2  merge: the data is copied down; C is then empty, and everything reads through it as before
    3  the children move; from here to 5 a domain that is started from its old XML finds CIDs that do not fit, and fails
    4  what will be deleted is locked, and seen to be empty (merge) or without children (copy, drop)
    5  the persistent XML; the snapshot itself is forgotten; then the XML of the snapshots that stay
    6  the files are unlinked; then the record goes
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import Census, Link, OnProgress, confined, ignore, log, open_chain, own_files, read_facts
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.create.run import freeze_tops
from qemu_vmdk_snap.domain.delete import steps, waiting
from qemu_vmdk_snap.domain.delete.live import Failed, LivePlan, live_ones, make_live_plan
from qemu_vmdk_snap.domain.delete.plan import Scope, State, chosen, folders_of, make_intent, open_one, require_ours
from qemu_vmdk_snap.domain.delete.preflight import check_live, check_work
from qemu_vmdk_snap.domain.delete.served import is_begun_by_server, merge_served, require_in_servers
from qemu_vmdk_snap.domain.delete.work import Deleted, Work, change_of, deleted_by, work_of
from qemu_vmdk_snap.domain.dropins import dropin
from qemu_vmdk_snap.domain.journal.overlays import is_empty
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore
from qemu_vmdk_snap.domain.journal.recover import Recovery, recover_domain
from qemu_vmdk_snap.domain.needs.needed import Given, place_in, real_file, require_none, same_file
from qemu_vmdk_snap.domain.nvram import discard_copies
from qemu_vmdk_snap.domain.overlay.newfile import refresh_pools
from qemu_vmdk_snap.domain.qemu.switch import Pause
from qemu_vmdk_snap.domain.registration import register_text
from qemu_vmdk_snap.domain.served.guest import ready
from qemu_vmdk_snap.domain.served.memory import unlink_memory
from qemu_vmdk_snap.domain.state import define, inactive_xml
from qemu_vmdk_snap.domain.xml.edits import keeping_description
from qemu_vmdk_snap.errors import DomainError, NotWhileRunning, VmdkSnapError

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
    pause: Pause | None = None
    """How long a running guest was stopped; None if it was not."""
    waiting: tuple[str, ...] = ()
    """Of those that failed: which are noted, and deleted once the guest is shut off."""
    dry_run: bool = False
    """Whether this is only what would be done."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return bool(self.deleted) and not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `snapshot delete --output=json` shows it."""
        answer: dict[str, object] = {"domain": self.domain, "deleted": [one.as_dict() for one in self.deleted]}
        if self.pause is not None:
            answer["pause"] = self.pause.as_dict()
        if self.failed:
            answer["failed"] = failed_as_dicts(self.failed)
        return answer | ({"dry-run": True} if self.dry_run else {})


def failed_as_dicts(failed: Sequence[tuple[str, VmdkSnapError | OSError]]) -> list[dict[str, str]]:
    """Return what was not deleted, and why, with JSON's own types."""
    return [{"snapshot": name, "reason": str(error)} for name, error in failed]


@dataclass(slots=True)
class _Run:
    """One call: what it works on, and what has come of it."""

    conn: libvirt.virConnect
    domain: libvirt.virDomain
    store: IntentStore
    orphans: Sequence[Path]
    on_progress: OnProgress
    keep_going: bool
    bandwidth: int
    deleted: list[Deleted]
    failed: Failed
    notes: list[str]
    pause: Pause | None = None
    waiting: list[str] = field(default_factory=list)

    def fail(self, name: str, error: VmdkSnapError | OSError) -> None:
        """Take note of a snapshot that stays, or let the error end the call."""
        if isinstance(error, NotWhileRunning):
            waiting.note(self.domain, [name])
            self.waiting.append(name)
            reason = f"{error.reason}; the delete is noted, and done once it is shut off"
            error = NotWhileRunning(error.domain, reason, snapshot=name)
        if not self.keep_going:
            raise error
        self.failed.append((name, error))

    def settle_notes(self) -> None:
        """Strike the notes of what is deleted; one that stays says nothing, and is struck by the next delete."""
        with contextlib.suppress(DomainError):
            waiting.forget(self.domain, [one.name for one in self.deleted])

    @property
    def is_stuck(self) -> bool:
        """Whether something was begun and not ended: that comes first."""
        return self.store.path(self.domain.UUIDString()).exists()


def delete(
    conn: libvirt.virConnect,
    domain_name: str,
    names: str | Sequence[str],
    *,
    scope: Scope = "one",
    metadata: bool = False,
    orphans: Sequence[Path] = (),
    keep_going: bool = False,
    bandwidth: int = 0,
    on_progress: OnProgress = ignore,
) -> DeleteReport:
    """Delete snapshots of a domain, the youngest first; those that a running guest's disks are backed by in one step.

    `scope` takes in their descendants, or these alone. `metadata` makes libvirt forget them and touches no file.
    `orphans` are files that need what goes and are given up. With `keep_going` one that cannot be deleted is
    left as it was and reported, and the others are deleted; a delete that was begun and not finished ends it.
    The servers of a running guest's disks copy at most `bandwidth` bytes a second each (0: no limit); a delete that
    anything else does is refused then.

    Raises:
        NotWhileRunning: the guest uses its files, and they cannot be exchanged beneath it. The delete is noted, and
            done with the next one while the domain is shut off.
        DomainError: there is no such snapshot, or a disk of the guest cannot be changed now.
        StillNeeded: something else needs a file that would be changed or deleted, or may need it; it names what.
        VmdkSnapError, OSError: an image is broken or in use, or there is no space: the snapshot is as before, or its
            record stays and `recover` (or the next command) finishes it.
    """
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    run = _Run(conn, domain, store, orphans, on_progress, keep_going, bandwidth, [], [], [])
    with store.locked(domain.UUIDString(), domain.name()):
        recovered = recover_domain(conn, domain, store)
        ready(conn, domain)
        wanted = without_finished([names] if isinstance(names, str) else names, domain, recovered)
        wanted = chosen(domain, wanted, scope)
        if not metadata and not domain.isActive():
            wanted = chosen(domain, [*wanted, *waiting.waiting(domain)], "one")
        if not metadata and not keep_going:
            require_ours(domain, wanted)
        live = [] if metadata or not domain.isActive() else _live_ones(run, wanted)
        if live:
            _delete_live(run, live)
        for name in wanted:
            if run.is_stuck:
                break
            if name not in live and name not in dict(run.failed):
                try:
                    _delete_one(run, name, metadata=metadata)
                except (VmdkSnapError, OSError) as error:
                    run.fail(name, error)
        run.settle_notes()
    refresh_pools(conn, [Path(one.frozen) for snapshot in run.deleted for one in snapshot.work])
    return DeleteReport(
        domain.name(),
        tuple(run.deleted),
        recovered,
        tuple(run.notes),
        tuple(run.failed),
        pause=run.pause,
        waiting=tuple(run.waiting),
    )


def _live_ones(run: _Run, names: Sequence[str]) -> list[str]:
    """Return those that the running guest's disks are backed by, and that can be deleted beneath it."""
    found, failed = live_ones(State.read(run.conn, run.domain, run.orphans), names)
    for name, error in failed:
        run.fail(name, error)
    return found


def _delete_live(run: _Run, names: Sequence[str]) -> None:
    domain, store = run.domain, run.store
    said: list[list[str]]
    try:
        plan = make_live_plan(State.read(run.conn, domain, run.orphans), names)
        check_live(domain, plan)
        require_in_servers(domain.name(), plan.deleted, run.bandwidth)
        with contextlib.ExitStack() as around:
            said = [around.enter_context(_dropins(run, one)) for one in plan.deleted]
            deleted = plan.deleted
            if plan.freeze:
                _log.info("domain %s: freezing %s first", domain.name(), ", ".join(plan.freeze))
                run.pause = freeze_tops(run.conn, domain, store, plan.freeze, names[0])
                plan = make_live_plan(State.read(run.conn, domain, run.orphans), names)
            _execute_live(run, plan)
    except (VmdkSnapError, OSError) as error:
        if len(names) == 1 or not run.keep_going or run.is_stuck:
            for name in names:
                run.fail(name, error)
            return
        for name in names:  # together it cannot be done; most of them may all the same
            if not run.is_stuck:
                _delete_live(run, [name])
        return
    run.notes += [note for notes in said for note in notes]
    run.deleted += deleted


def _execute_live(run: _Run, plan: LivePlan) -> None:
    domain, store, intent = run.domain, run.store, plan.intent
    store.write(intent)  # barrier: no image is made that nobody would know of after a crash
    try:
        if intent.merges:
            intent = steps.make_images(domain.name(), store, intent, run.on_progress)
            waited = steps.exchange_images(domain, intent).reopened
            before = run.pause or Pause(0.0, None, None)
            run.pause = replace(before, stalled=max(before.stalled, waited))
    except BaseException as error:
        _undo_live(run, intent, error)
        raise
    _finish_now(run, intent)


def _undo_live(run: _Run, intent: Intent, cause: BaseException) -> None:
    """Take back what QEMU has not gone over to; raises DomainError where that cannot be done, or it has."""
    try:
        begun = steps.is_begun(run.domain, intent)
        if not begun:
            steps.take_back(run.domain, intent)
            run.store.remove(intent.uuid)
    except (VmdkSnapError, OSError):
        begun = True
    if begun and isinstance(cause, (VmdkSnapError, OSError)):
        raise DomainError(run.domain.name(), _unfinished(intent, cause)) from cause


def _delete_one(run: _Run, name: str, *, metadata: bool) -> None:
    conn, domain = run.conn, run.domain
    intent = make_intent(State.read(conn, domain, run.orphans), name, metadata=metadata)
    one = deleted_by(intent)
    if not metadata:
        _settle(domain, intent)
        require_in_servers(domain.name(), [one], run.bandwidth)
        check_work(domain.name(), one.work, folders_of(intent))
    with _dropins(run, one, metadata=metadata) as said:
        _execute(run, intent)
    run.notes += said
    run.deleted.append(one)


@contextlib.contextmanager
def _dropins(run: _Run, one: Deleted, *, metadata: bool = False) -> Iterator[list[str]]:
    """Run the drop-ins around the delete of one snapshot."""
    name = run.domain.name()
    plan = {
        "snapshot": one.name,
        "metadata": metadata,
        "operations": [line for work in one.work for line in work.lines()],
    }
    for work in one.work:
        _log.info("domain %s: snapshot %r: %s: %s", name, one.name, work.target, "; ".join(work.lines()))
    with dropin.around("delete", name, plan, uri=run.conn.getURI()) as said:
        yield said


def without_finished(names: Sequence[str], domain: libvirt.virDomain, recovered: Recovery | None) -> list[str]:
    """Return the names without those whose interrupted delete was finished first: that is what was asked for."""
    if recovered is None or recovered.operation != "delete" or not recovered.finished:
        return list(names)
    there = {snapshot.getName() for snapshot in domain.listAllSnapshots()}
    gone = {recovered.snapshot, *recovered.also}
    return [name for name in names if name not in gone or name in there]


def _execute(run: _Run, intent: Intent) -> None:
    domain, store = run.domain, run.store
    frozen_as = _cids(intent)
    store.write(intent)  # barrier: from here on `finish` knows what to do
    try:
        merge_served(domain, intent, run.on_progress, bandwidth=run.bandwidth)
        _drop_empty(domain.name(), intent)
        _copy_up(intent, run.on_progress)
        _merge_down(intent, run.on_progress)
    except BaseException as error:
        begun = True
        with contextlib.suppress(VmdkSnapError, OSError):
            _settle(domain, intent)
            begun = _cids(intent) != frozen_as or is_begun_by_server(domain, intent)
            if not begun:
                store.remove(intent.uuid)  # the snapshot is as it was
        if begun and isinstance(error, (VmdkSnapError, OSError)):
            raise DomainError(domain.name(), _unfinished(intent, error)) from error
        raise
    _finish_now(run, intent)


def _finish_now(run: _Run, intent: Intent) -> None:
    try:
        taken_back = finish(run.conn, run.domain, intent, on_progress=run.on_progress, notes=run.notes)
    except (VmdkSnapError, OSError) as error:
        raise DomainError(run.domain.name(), _unfinished(intent, error)) from error
    with contextlib.suppress(OSError):
        run.store.remove(intent.uuid)
    if taken_back is not None:
        reason = f"its guest ended while snapshot {intent.snapshot!r} was deleted, which is as it was: try again"
        raise DomainError(run.domain.name(), reason, snapshot=intent.snapshot)


def _unfinished(intent: Intent, error: VmdkSnapError | OSError) -> str:
    reason = error.reason if isinstance(error, DomainError) else error
    return f"{reason}; the delete of snapshot {intent.snapshot!r} is not finished: `recover` resumes it"


def _cids(intent: Intent) -> list[int]:
    """Return the CIDs of the files that are merged into: another one says that what the snapshot held is gone."""
    return [
        read_facts(one.frozen, trusted_dirs=folders_of(intent)).cid for one in work_of(intent) if one.mode == "merge"
    ]


def finish(
    conn: libvirt.virConnect,
    domain: libvirt.virDomain,
    intent: Intent,
    *,
    on_progress: OnProgress = ignore,
    notes: list[str] | None = None,
) -> Recovery | None:
    """Do every step that is not done yet; what had to stay goes to `notes`.

    Returns None once it is finished. Where nothing of it was begun that anybody reads it is taken back, as the returned
    recovery says.

    Raises:
        VmdkSnapError, OSError: a step cannot be done now; the record must stay.
    """
    _settle(domain, intent)
    if intent.merges:
        if not steps.is_begun(domain, intent):
            steps.take_back(domain, intent)
            name, also = domain.name(), intent.also
            return Recovery(name, intent.snapshot, finished=False, operation=intent.operation, also=also)
        steps.place_images(conn, domain, intent)
    merge_served(domain, intent, on_progress)
    _drop_empty(domain.name(), intent)
    _copy_up(intent, on_progress)
    _merge_down(intent, on_progress)
    _move(intent, on_progress)
    with contextlib.ExitStack() as held:
        doomed = [link for one in work_of(intent) if (link := _hold(domain.name(), one, intent, held)) is not None]
        with libvirt_errors(domain.name(), f"forget the snapshot {intent.snapshot!r}"):
            _change_xml(conn, domain, intent)
        for link in doomed:
            for file in own_files(link):
                real_file(file).unlink(missing_ok=True)  # a symbolic link to it belongs to the user, and stays
    for memory in intent.memories:
        unlink_memory(memory, domain.name(), intent.uuid)
    discard_copies(conn, domain, intent.nvram)
    said = steps.clear(intent)
    if notes is not None:
        notes += said
    return None


def _settle(domain: libvirt.virDomain, intent: Intent) -> None:
    """Finish what was interrupted inside an operation on the images; a server settles what is its own."""
    works = work_of(intent)
    served = {Path(one.frozen).parent for one in works if one.served and domain.isActive()}
    folders = {Path(one.frozen).parent for one in works} - served
    for folder in folders | {Path(one.image).parent for one in intent.merges}:
        engine.recover(folder)


def _drop_empty(domain: str, intent: Intent) -> None:
    """Unlink the overlays without data, first: nothing names them, and a merge below must not keep them."""
    for one in work_of(intent):
        if one.mode == "empty":
            with contextlib.ExitStack() as held:
                link = _hold(domain, one, intent, held)
                for file in own_files(link) if link is not None else ():
                    real_file(file).unlink(missing_ok=True)


def _copy_up(intent: Intent, on_progress: OnProgress) -> None:
    """Give all of F's data to the overlays that do not stay on it, and put them on its parent."""
    resolver = confined(folders_of(intent))
    for one in work_of(intent):
        onto = None if one.parent is None else Path(one.parent)
        for image in map(Path, one.copied):
            if _is_backed_by(image, Path(one.frozen), folders_of(intent)):
                engine.rebase(image, onto, resolver=resolver, on_progress=on_progress)


def _merge_down(intent: Intent, on_progress: OnProgress) -> None:
    resolver = confined(folders_of(intent))
    for one in work_of(intent):
        if one.mode != "merge" or one.child is None or not Path(one.child).exists():
            continue
        with open_one(Path(one.child), folders_of(intent), lock=False) as link:
            done = is_empty(link)
        if not done:  # done already, its children may stand on the base by now: they must keep what they read
            engine.commit(
                one.child,
                base=one.frozen,
                keep_siblings=True,
                children=one.moving,
                orphans=one.orphans,
                resolver=resolver,
                on_progress=on_progress,
            )


def _move(intent: Intent, on_progress: OnProgress) -> None:
    resolver = confined(folders_of(intent))
    for one in work_of(intent):
        onto = Path(one.frozen) if one.mode == "merge" else None if one.parent is None else Path(one.parent)
        if one.removed is None or not one.removed.exists():
            continue
        for image in map(Path, one.moving):
            if _is_backed_by(image, one.removed, folders_of(intent)):
                engine.rebase(image, onto, resolver=resolver, on_progress=on_progress)


def _is_backed_by(image: Path, parent: Path, folders: Sequence[Path]) -> bool:
    with open_chain(image, trusted_dirs=folders, lock=False) as chain:
        return chain.depth > 1 and same_file(chain.links[1].path, parent)


def _hold(domain: str, work: Work, intent: Intent, held: contextlib.ExitStack) -> Link | None:
    """Lock what will be deleted; None where it is gone already."""
    if work.removed is None or not work.removed.exists():
        return None
    folders = folders_of(intent)
    link = held.enter_context(open_one(work.removed, folders, lock=True))
    if work.mode in ("merge", "empty") and not is_empty(link):
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
    for name in intent.names:
        if name in there:
            there.pop(name).delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    current = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
    for name, text in intent.snapshots:
        if name in there:
            edited = keeping_description(text, there[name].getXMLDesc(0))
            register_text(domain, edited, current=name == current)


def _define(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Change the files in the persistent XML; what was edited meanwhile stays."""
    now = inactive_xml(domain)
    work = work_of(intent)
    changed = xml.relink(now, change_of(work))
    files = xml.files_in(now)
    goes = [one.removed for one in work] + [Path(one.frozen) for one in work if one.copied]
    if changed != now and any(place_in(files, path) is not None for path in goes):
        define(conn, changed)
