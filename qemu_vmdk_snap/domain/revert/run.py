"""Go back to a snapshot: the domain gets the XML of then, with new overlays on the files that the snapshot froze.

What the domain had is kept, file by file, unless it is to be discarded. The steps, each durable before the next:

    1  the intent record
    2  the overlays, complete; then the record that knows them by inode
    3  the guest ends, if it runs
    4  the persistent XML of the snapshot, which now names the overlays
    5  the snapshot becomes the current one
    6  discarded tops are unlinked: nothing names them, and nothing stands on them
    7  the record goes; the guest starts, if it is to
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import log
from qemu_vmdk_snap.domain import dropin, naming, xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore, Overlay, pending_overlays
from qemu_vmdk_snap.domain.journal.recover import Recovery, make_current, recover_domain, unlink_discarded
from qemu_vmdk_snap.domain.journal.recover import undo as _undo
from qemu_vmdk_snap.domain.newfile import make_overlay, refresh_pools
from qemu_vmdk_snap.domain.planned import PlannedDisk
from qemu_vmdk_snap.domain.qemu.depth import check_depth
from qemu_vmdk_snap.domain.state import check_state, find_snapshot, inactive_xml, volume_resolver
from qemu_vmdk_snap.domain.xml.kept import kept_branches, with_kept_branches
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)

After = Literal["as-saved", "shutoff", "running", "paused"]
_LIVE: Final = ("running", "paused", "blocked")


@dataclass(frozen=True, slots=True)
class RevertReport:
    """What a revert did."""

    domain: str
    snapshot: str
    state: str
    """What the domain is now: `shutoff`, `running` or `paused`."""
    disks: tuple[PlannedDisk, ...]
    kept: tuple[Path, ...]
    """Tops that the domain had, which no snapshot knows, and which are still there."""
    discarded: tuple[Path, ...]
    recovered: Recovery | None
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    """Whether this is only what would be done."""

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
        } | ({"dry-run": True} if self.dry_run else {})


@dataclass(frozen=True, slots=True)
class Plan:
    """A revert ready to be done."""

    disks: tuple[PlannedDisk, ...]
    old_tops: tuple[Path, ...]
    state: str
    """What the domain is to be in the end."""
    intent: Intent


def revert(
    conn: libvirt.virConnect, domain_name: str, snapshot: str, *, after: After = "as-saved", discard: bool = False
) -> RevertReport:
    """Let the domain be what it was when the snapshot was taken. A guest that runs is ended without being asked.

    `after` is what the domain is to be then; as it was saved, a snapshot of disks alone leaves it shut off. `discard`
    gives up what was written since its last snapshot.

    Raises:
        DomainError: there is no such snapshot, or it cannot be gone back to; nothing has changed.
        CidMismatch, CorruptChain, FormatError, LockBusy: a frozen chain is broken, or somebody writes to it.
        OSError: a file could not be made.
    """
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()), contextlib.ExitStack() as held:
        recovered = recover_domain(conn, domain, store)
        plan = make_plan(conn, domain, snapshot, after, store, held, discard=discard)
        with dropin.around("revert", domain.name(), _as_plan(plan, discard=discard), uri=conn.getURI()) as notes:
            gone = _execute(conn, domain, store, plan)
    refresh_pools(conn, [disk.overlay for disk in plan.disks])
    kept = tuple(path for path in plan.old_tops if path not in gone)
    if plan.state != "shutoff":
        _start(domain, paused=plan.state == "paused")
    return RevertReport(domain.name(), snapshot, plan.state, plan.disks, kept, gone, recovered, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Now:
    """What libvirt says of the domain."""

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
    taken = set().union(*(xml.files_in(one) for one in (now.old_xml, *now.snapshots.values())), pending_overlays(store))
    disks = _plan_disks(domain.name(), _frozen_disks(domain.name(), saved), taken, held)
    for disk in disks:
        check_depth(conn, domain.name(), disk.target, disk.chain)
    tops = _unsaved_tops(now.old_xml, now.snapshots.values(), volume_path)
    intent = Intent(
        uuid=domain.UUIDString(),
        domain=domain.name(),
        snapshot=name,
        overlays=tuple(Overlay(disk.target, str(disk.overlay), str(disk.frozen)) for disk in disks),
        old_xml=now.old_xml,
        new_xml=_new_xml(now, disks, {} if discard else dict.fromkeys(tops, name)),
        snapshot_xml=now.target,
        operation="revert",
        current=now.current,
        discard=tuple(map(str, tops)) if discard else (),
    )
    state = after if after != "as-saved" else saved.state if saved.state in _LIVE else "shutoff"
    return Plan(disks, tops, "running" if state == "blocked" else state, intent)


def _new_xml(now: _Now, disks: Collection[PlannedDisk], kept: dict[Path, str]) -> str:
    """Return the domain of then on the new overlays, which knows of all that reverts have kept until now."""
    before = {path: snapshot for path, snapshot in kept_branches(now.old_xml).items() if path.exists()}
    then = xml.stack(xml.domain_of(now.target), {disk.target: xml.NewTop(disk.overlay, disk.chain) for disk in disks})
    return with_kept_branches(then, before | kept)


def _frozen_disks(domain: str, saved: xml.SnapshotXml) -> list[xml.SnapshotDisk]:
    if saved.memory != "no":
        raise DomainError(domain, f"snapshot {saved.name!r} holds memory too: virsh snapshot-revert goes back to it")
    modes = {disk.mode for disk in saved.disks} - {"no"}
    if modes != {"external"}:
        what = ", ".join(sorted(modes)) or "no"
        raise DomainError(domain, f"snapshot {saved.name!r} has {what} disks: only external ones are gone back to here")
    return [disk for disk in saved.disks if disk.mode == "external"]


def _plan_disks(
    domain: str, frozen: Collection[xml.SnapshotDisk], taken: set[Path], held: contextlib.ExitStack
) -> tuple[PlannedDisk, ...]:
    """Return the plan of each disk; their overlays are added to `taken`."""
    disks: list[PlannedDisk] = []
    for disk in frozen:
        disks.append(_plan_disk(domain, disk, taken, held))
        taken.add(disks[-1].overlay)
    return tuple(disks)


def _plan_disk(domain: str, disk: xml.SnapshotDisk, taken: Collection[Path], held: contextlib.ExitStack) -> PlannedDisk:
    if disk.frozen is None:
        raise DomainError(domain, f"disk {disk.target} of the snapshot has no file")
    trusted = sorted({path.parent for path in disk.backing})
    chain = held.enter_context(engine.open_chain(disk.frozen, trusted_dirs=trusted))
    overlay = naming.next_overlay(disk.frozen, taken)
    return PlannedDisk(disk.target, overlay, (disk.frozen, *(link.path for link in chain.links[1:])))


def _unsaved_tops(old_xml: str, snapshots: Collection[str], volume_path: xml.VolumePath) -> tuple[Path, ...]:
    """Return the tops of today that are in no snapshot: what the guest wrote since the last one."""
    saved = set().union(*(xml.files_in(xml.domain_of(text)) for text in snapshots))
    disks = xml.list_disks(old_xml, volume_path)
    return tuple(d.path for d in disks if d.path is not None and not d.refusal and d.path not in saved)


def _as_plan(plan: Plan, *, discard: bool) -> dict[str, object]:
    return {
        "snapshot": plan.intent.snapshot,
        "state": plan.state,
        "disks": [
            {"target": disk.target, "frozen": str(disk.frozen), "overlay": str(disk.overlay)} for disk in plan.disks
        ],
        "discard" if discard else "keep": [str(path) for path in plan.old_tops],
    }


def _execute(conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, plan: Plan) -> tuple[Path, ...]:
    intent = plan.intent
    try:
        store.write(intent)  # barrier: no file is made that nobody would know of after a crash
        for disk in plan.disks:
            _log.info("domain %s: disk %s: new overlay %s on %s", domain.name(), disk.target, disk.overlay, disk.frozen)
            intent = intent.made(str(disk.overlay), make_overlay(domain.name(), disk))
        store.write(intent)
        with libvirt_errors(domain.name(), "go back to the snapshot"):
            _refuse_edited(domain, intent)
            if domain.isActive():
                domain.destroy()
            conn.defineXML(intent.new_xml)
            make_current(domain, intent.snapshot)
        _log.info("domain %s: defined as of snapshot %r", domain.name(), intent.snapshot)
    except BaseException as error:
        _undo(conn, domain, store, intent, error)
        raise
    gone = unlink_discarded(conn, domain, intent)
    with contextlib.suppress(OSError):
        store.remove(intent.uuid)
    return gone


def _refuse_edited(domain: libvirt.virDomain, intent: Intent) -> None:
    if inactive_xml(domain) != intent.old_xml:
        raise DomainError(domain.name(), "was edited while the revert was prepared: try again")


def _start(domain: libvirt.virDomain, *, paused: bool) -> None:
    import libvirt

    with libvirt_errors(domain.name(), "start it on the snapshot that it is back at"):
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
