"""Revert to a snapshot: the domain gets the XML of the snapshot, with new overlays on the frozen files.

A disk that is not in the snapshot keeps its current files; if its top is frozen, it gets an overlay. What the
domain had is kept, file by file, unless it is discarded. The steps, each durable before the next:

    1  the intent record
    2  the overlays, complete; then the record with their inodes
    3  the guest ends, if it runs
    4  the persistent XML of the snapshot, which now names the overlays
    5  the snapshot becomes the current one
    6  discarded tops are unlinked: nothing names them, and nothing is backed by them
    7  of a snapshot with memory: the disks are served, and the guest resumes from it
    8  the record goes; the guest starts, if it is to
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import log
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.dropins import dropin
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore, Overlay, pending_overlays
from qemu_vmdk_snap.domain.journal.recover import Recovery, make_current, recover_domain
from qemu_vmdk_snap.domain.journal.recover import undo as _undo
from qemu_vmdk_snap.domain.needs.discard import unlink_discarded
from qemu_vmdk_snap.domain.needs.needed import NOTHING, Needed, place_in, same_file
from qemu_vmdk_snap.domain.nvram import restore_nvram
from qemu_vmdk_snap.domain.overlay import naming
from qemu_vmdk_snap.domain.overlay.newfile import make_overlay, refresh_pools
from qemu_vmdk_snap.domain.overlay.planned import PlannedDisk
from qemu_vmdk_snap.domain.qemu.depth import check_depth
from qemu_vmdk_snap.domain.revert.apart import replaced_by, with_disks_of_today
from qemu_vmdk_snap.domain.served import server
from qemu_vmdk_snap.domain.served.guest import resume_from_memory
from qemu_vmdk_snap.domain.served.memory import check_restorable
from qemu_vmdk_snap.domain.state import check_state, define, find_snapshot, inactive_xml, lenient, volume_resolver
from qemu_vmdk_snap.domain.xml.kept import kept_branches, with_kept_branches
from qemu_vmdk_snap.domain.xml.named import folders_named, frozen_files
from qemu_vmdk_snap.domain.xml.served import served_disks, with_notes_of
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)

After = Literal["as-saved", "shutoff", "running", "paused"]
_LIVE: Final = ("running", "paused", "blocked")
_NO_PARENT: Final = 0xFFFFFFFF
_NOT_WRITTEN: Final = ("is a cdrom", "is read-only", "is transient")
"""Refusals of disks to which no guest writes."""


@dataclass(frozen=True, slots=True)
class RevertReport:
    """What a revert did."""

    domain: str
    snapshot: str
    state: str
    """The state of the domain now: `shutoff`, `running` or `paused`."""
    disks: tuple[PlannedDisk, ...]
    kept: tuple[Path, ...]
    """Previous tops of the domain that are in no snapshot and were kept."""
    discarded: tuple[Path, ...]
    recovered: Recovery | None
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    """Whether this is only what would be done."""
    memory: Path | None = None
    """The file that the guest has resumed from; None where it did not."""
    already: bool = False
    """In a dry run: whether the domain is at the snapshot already, shut off, with nothing written since."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `snapshot revert --output=json` shows it."""
        return {
            "domain": self.domain,
            "snapshot": self.snapshot,
            "state": self.state,
            "disks": [disk.as_dict() for disk in self.disks],
            "kept": [str(path) for path in self.kept],
            "discarded": [str(path) for path in self.discarded],
            "notes": list(self.notes),
            **({} if self.memory is None else {"memory": str(self.memory)}),
        } | ({"dry-run": True, "already": self.already} if self.dry_run else {})


@dataclass(frozen=True, slots=True)
class Plan:
    """A revert that is ready to be done."""

    disks: tuple[PlannedDisk, ...]
    old_tops: tuple[Path, ...]
    state: str
    """The final state of the domain."""
    intent: Intent
    notes: tuple[str, ...]


def revert(
    conn: libvirt.virConnect,
    domain_name: str,
    snapshot: str,
    *,
    after: After = "as-saved",
    discard: bool = False,
    orphans: Sequence[Path] = (),
) -> RevertReport:
    """Revert the domain to the snapshot. A running guest is stopped without a shutdown.

    `after` is the final state; "as-saved" leaves the domain shut off, as the snapshot has no memory. `discard`
    deletes what was written since its last snapshot, if nothing needs it except `orphans`, files that are given
    up too.

    Raises:
        DomainError: there is no such snapshot, or it cannot be reverted to; nothing has changed.
        CidMismatch: a frozen file was written since it was frozen.
        CorruptChain, FormatError, LockBusy: a frozen chain is broken, or in use for writing.
        OSError: a file could not be made.
    """
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()), contextlib.ExitStack() as held:
        recovered = recover_domain(conn, domain, store)
        if not domain.isActive():
            server.stop(domain.name(), inactive_xml(domain))
        plan = make_plan(conn, domain, snapshot, after, store, held, discard=discard)
        said = [*plan.notes]
        with dropin.around("revert", domain.name(), _as_plan(plan, discard=discard), uri=conn.getURI()) as notes:
            gone = _execute(conn, domain, store, plan, orphans, said)
    refresh_pools(conn, [disk.overlay for disk in plan.disks])
    kept = tuple(path for path in plan.old_tops if path not in gone)
    if plan.state != "shutoff" and plan.intent.memory is None:
        server.start(domain.name(), plan.intent.new_xml, conn.getURI())
        _start(domain, paused=plan.state == "paused")
    memory = None if plan.intent.memory is None else Path(plan.intent.memory)
    return RevertReport(
        domain.name(), snapshot, plan.state, plan.disks, kept, gone, recovered, (*notes, *said), memory=memory
    )


@dataclass(frozen=True, slots=True)
class _Now:
    """The domain according to libvirt."""

    old_xml: str
    target: str
    """The XML of the snapshot, secrets included."""
    snapshots: dict[str, str]
    current: str | None

    @classmethod
    def read(cls, domain: libvirt.virDomain, snapshot: str) -> _Now:
        import libvirt

        with libvirt_errors(domain.name(), "read its state"):
            check_state(domain)
            return cls(
                inactive_xml(domain),
                find_snapshot(domain, snapshot).getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE),
                {one.getName(): one.getXMLDesc(0) for one in domain.listAllSnapshots()},
                domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None,
            )


def make_plan(
    conn: libvirt.virConnect,
    domain: libvirt.virDomain,
    name: str,
    after: After,
    store: IntentStore,
    held: contextlib.ExitStack,
    *,
    discard: bool,
) -> Plan:
    """Return the plan. The frozen chains stay open in `held`; `revert` says what is raised."""
    now = _Now.read(domain, name)
    volume_path = volume_resolver(conn, domain.name())
    saved = xml.parse_snapshot(now.target, volume_path)
    texts = (now.old_xml, now.target, *now.snapshots.values())
    held.enter_context(engine.allowing(*folders_named(lenient(volume_path), *texts), below=False))
    taken = set().union(*(xml.files_in(one) for one in (now.old_xml, *now.snapshots.values())), pending_overlays(store))
    needed = Needed.read(conn, domain)
    frozen = _frozen_disks(domain.name(), saved)
    then = xml.with_domain_name(xml.domain_of(now.target), domain.name())
    then = with_disks_of_today(then, now.old_xml, {disk.target for disk in frozen})
    state = after if after != "as-saved" else saved.state if saved.state in _LIVE else "shutoff"
    memory = saved.memory_file if state != "shutoff" else None
    # How a disk is attached is today's business, unless memory has it as it was attached then.
    then = with_notes_of(then, now.old_xml, besides={disk.target for disk in frozen} if memory else ())
    served = served_disks(then)
    if memory is not None:
        check_restorable(domain, memory, [disk.target for disk in frozen], served)
    frozen += _frozen_apart(domain, then, {disk.target for disk in frozen}, now, needed, volume_path)
    disks = _plan_disks(domain.name(), frozen, taken, needed, held)
    for disk in disks:
        if disk.target not in served:
            check_depth(conn, domain.name(), disk.target, disk.chain)
    then = xml.stack(then, {disk.target: xml.NewTop(disk.overlay, disk.chain) for disk in disks})
    tops = _unsaved_tops(domain, now.old_xml, then, needed, volume_path)
    given_up = _overlays_of(tops, {disk.target for disk in disks}) if discard else ()
    old_tops = tuple(top for _, top in tops)
    intent = Intent(
        uuid=domain.UUIDString(),
        domain=domain.name(),
        snapshot=name,
        overlays=tuple(Overlay(disk.target, str(disk.overlay), str(disk.frozen)) for disk in disks),
        old_xml=now.old_xml,
        new_xml=_with_kept(now.old_xml, then, {top: name for top in old_tops if top not in given_up}),
        snapshot_xml=now.target,
        operation="revert",
        current=now.current,
        discard=tuple(map(str, given_up)),
        discard_inodes=tuple(top.stat().st_ino if top.exists() else 0 for top in given_up),
        memory=None if memory is None else str(memory),
        resume=memory is not None and state != "paused",
    )
    return Plan(disks, old_tops, "running" if state == "blocked" else state, intent, _replaced(then, now.old_xml))


def _replaced(then: str, today: str) -> tuple[str, ...]:
    what = replaced_by(then, today)
    return (
        (f"its XML is that of the snapshot again, without what was changed since in: {', '.join(what)}",)
        if what
        else ()
    )


def _with_kept(today: str, then: str, kept: dict[Path, str]) -> str:
    """Return the XML with the list of all files that reverts have kept until now."""
    before = {path: snapshot for path, snapshot in kept_branches(today).items() if path.exists()}
    return with_kept_branches(then, before | kept)


def _frozen_apart(
    domain: libvirt.virDomain,
    then: str,
    taking_part: Collection[str],
    now: _Now,
    needed: Needed,
    volume_path: xml.VolumePath,
) -> list[xml.SnapshotDisk]:
    """Return the other disks whose top must not be written: a snapshot froze it, or an overlay is backed by it.

    Raises:
        DomainError: one of them can get no overlay.
    """
    frozen = [path for text in now.snapshots.values() for path in frozen_files(text, volume_path)]
    found: list[xml.SnapshotDisk] = []
    for disk in xml.list_disks(then, volume_path):
        if disk.path is None or disk.target in taking_part or (disk.refusal or "").startswith(_NOT_WRITTEN):
            continue
        backed = [one.path for one in needed.census.dependents([disk.path]) if one.how == "parent"]
        others = [*needed.holding([disk.path], needed.of_others(domain.UUIDString()), NOTHING)]
        others = [one for one in others if not isinstance(one[0], Path)]
        if place_in(frozen, disk.path) is None and not backed and not others:
            continue
        if disk.refusal is not None:
            reason = (
                f"disk {disk.target} is not in the snapshot, and would write to {disk.path}, which something else needs"
            )
            raise DomainError(domain.name(), f"{reason}; it can get no overlay, as it {disk.refusal}")
        found.append(xml.SnapshotDisk(disk.target, "external", None, disk.path, disk.backing))
    return found


def _frozen_disks(domain: str, saved: xml.SnapshotXml) -> list[xml.SnapshotDisk]:
    if saved.memory not in ("no", "external") or (saved.memory == "external" and saved.memory_file is None):
        raise DomainError(domain, f"snapshot {saved.name!r} has its memory in no file of its own")
    modes = {disk.mode for disk in saved.disks} - {"no"}
    if modes != {"external"}:
        what = ", ".join(sorted(modes)) or "no"
        raise DomainError(domain, f"snapshot {saved.name!r} has {what} disks: only external ones can be reverted to")
    return [disk for disk in saved.disks if disk.mode == "external"]


def _plan_disks(
    domain: str,
    frozen: Collection[xml.SnapshotDisk],
    taken: set[Path],
    needed: Needed,
    held: contextlib.ExitStack,
) -> tuple[PlannedDisk, ...]:
    """Return the plan of each disk; their overlays are added to `taken`."""
    disks: list[PlannedDisk] = []
    for disk in frozen:
        disks.append(_plan_disk(domain, disk, taken, needed, held))
        taken.add(disks[-1].overlay)
    return tuple(disks)


def _plan_disk(
    domain: str, disk: xml.SnapshotDisk, taken: set[Path], needed: Needed, held: contextlib.ExitStack
) -> PlannedDisk:
    if disk.frozen is None:
        raise DomainError(domain, f"disk {disk.target} of the snapshot has no file")
    trusted = sorted({path.parent for path in disk.backing})
    chain = held.enter_context(engine.open_chain(disk.frozen, trusted_dirs=trusted))
    _require_unwritten(disk, chain.links[0], needed)
    overlay = naming.next_overlay(disk.frozen, taken)
    return PlannedDisk(disk.target, overlay, (disk.frozen, *(link.path for link in chain.links[1:])))


def _require_unwritten(disk: xml.SnapshotDisk, link: engine.Link, needed: Needed) -> None:
    """Compare the CID of the frozen file with the parentCID of its overlays, which is its CID when it was frozen."""
    found = needed.census.dependents([file.path for file in link.files])
    overlays = [one for one in found if one.how == "parent" and one.parent_cid not in (None, _NO_PARENT)]
    own = [one for one in overlays if disk.overlay is not None and same_file(one.path, disk.overlay)]
    if own or not any(one.parent_cid == link.cid for one in overlays):
        engine.require_fit(link.path, link.cid, own or overlays)


def _unsaved_tops(
    domain: libvirt.virDomain, today: str, then: str, needed: Needed, volume_path: xml.VolumePath
) -> list[tuple[str, Path]]:
    """Return (target, top) of the current tops that are in no snapshot and not in the new XML."""
    stay = [*needed.frozen(domain.UUIDString()), *xml.files_in(then)]
    disks = [disk for disk in xml.list_disks(today, volume_path) if not disk.refusal]
    return [(disk.target, disk.path) for disk in disks if disk.path is not None and place_in(stay, disk.path) is None]


def _overlays_of(tops: Collection[tuple[str, Path]], targets: Collection[str]) -> tuple[Path, ...]:
    """Return the tops that may be discarded: overlays of disks that are reverted. A base was never in a snapshot."""
    found = []
    for target, path in tops:
        with contextlib.suppress(VmdkSnapError, OSError):
            if target in targets and not engine.read_facts(path).is_base:
                found.append(path)
    return tuple(found)


def _as_plan(plan: Plan, *, discard: bool) -> dict[str, object]:
    return {
        "snapshot": plan.intent.snapshot,
        "state": plan.state,
        "disks": [
            {"target": disk.target, "frozen": str(disk.frozen), "overlay": str(disk.overlay)} for disk in plan.disks
        ],
        "discard" if discard else "keep": list(plan.intent.discard) if discard else list(map(str, plan.old_tops)),
    }


def _execute(
    conn: libvirt.virConnect,
    domain: libvirt.virDomain,
    store: IntentStore,
    plan: Plan,
    orphans: Sequence[Path],
    notes: list[str],
) -> tuple[Path, ...]:
    intent = plan.intent
    try:
        store.write(intent)  # barrier: no file is made that nobody would know of after a crash
        for disk in plan.disks:
            _log.info("domain %s: disk %s: new overlay %s on %s", domain.name(), disk.target, disk.overlay, disk.frozen)
            intent = intent.made(str(disk.overlay), make_overlay(domain.name(), disk))
        store.write(intent)
        with libvirt_errors(domain.name(), "revert to the snapshot"):
            _refuse_edited(domain, intent)
            if domain.isActive():
                domain.destroy()
            server.stop(domain.name(), intent.old_xml)
            define(conn, intent.new_xml)
            make_current(domain, intent.snapshot)
        _log.info("domain %s: defined as of snapshot %r", domain.name(), intent.snapshot)
    except BaseException as error:
        _undo(conn, domain, store, intent, error)
        raise
    hindered = restore_nvram(intent.snapshot_xml, intent.new_xml)
    notes += [] if hindered is None else [hindered]
    gone = unlink_discarded(conn, domain, intent, orphans=orphans, notes=notes)
    if intent.memory is not None:
        try:
            resume_from_memory(conn, domain, intent)
        except DomainError as error:
            store.remove(intent.uuid)
            reason = f"is back at the disks of snapshot {intent.snapshot!r}, shut off: {error.reason}"
            raise DomainError(domain.name(), reason, snapshot=intent.snapshot) from error
    with contextlib.suppress(OSError):
        store.remove(intent.uuid)
    return gone


def _refuse_edited(domain: libvirt.virDomain, intent: Intent) -> None:
    if inactive_xml(domain) != intent.old_xml:
        raise DomainError(domain.name(), "was edited while the revert was prepared: try again")


def _start(domain: libvirt.virDomain, *, paused: bool) -> None:
    import libvirt

    with libvirt_errors(domain.name(), "start it after the revert"):
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
