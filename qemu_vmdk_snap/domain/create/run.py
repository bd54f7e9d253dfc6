"""Take a snapshot of a domain's VMDK disks: of all of them, or of none.

The steps, each durable before the next, so that `recover` finishes or undoes them after a crash between any two:

    1  the intent record
    2  the overlays, complete, with the owner and mode of their bases; then the record with their inodes
    3  the persistent XML, which now names the overlays and the whole chain below
    4  the snapshot in libvirt's metadata, with the XML of before inside
    5  only if the guest runs: QEMU switches to the overlays, in one transaction
    6  the record is removed

Shut off, the old tops are locked from before 1 until after 4 as QEMU locks what it reads: no guest can start and write
them. If the guest runs, QEMU comes last: only that step cannot be undone, and without it the overlays are empty,
and a guest that is started from the XML reads from them what its old disks contain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap import log
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.create.plan import Plan, Request, make_plan
from qemu_vmdk_snap.domain.create.switch import switch_all
from qemu_vmdk_snap.domain.dropins import dropin
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore
from qemu_vmdk_snap.domain.journal.recover import Recovery, recover_domain, register
from qemu_vmdk_snap.domain.journal.recover import undo as _undo
from qemu_vmdk_snap.domain.nvram import freeze_nvram
from qemu_vmdk_snap.domain.overlay.naming import NamingRule
from qemu_vmdk_snap.domain.overlay.newfile import follow_base, make_overlay, refresh_pools
from qemu_vmdk_snap.domain.overlay.planned import PlannedDisk
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.qemu.switch import Pause
from qemu_vmdk_snap.domain.qemu.unused import release_unused
from qemu_vmdk_snap.domain.served.guest import ready
from qemu_vmdk_snap.domain.served.hold import Holds
from qemu_vmdk_snap.domain.served.memory import save_memory
from qemu_vmdk_snap.domain.state import check_state, define, inactive_xml
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """What a snapshot did."""

    domain: str
    snapshot: str
    creation_time: int
    """Seconds since 1970."""
    parent: str | None
    disks: tuple[PlannedDisk, ...]
    skipped: tuple[tuple[str, str], ...]
    """(target, reason) of the disks that took no part, and of `nvram` and `tpm` where they could not."""
    nvram: Path | None
    """The copy of the UEFI variables that was frozen with the disks."""
    recovered: Recovery | None
    """The recovery of an unfinished operation that was found first."""
    pause: Pause | None = None
    """How long a running guest was stopped; None for one that was shut off."""
    notes: tuple[str, ...] = ()
    """Problems that did not prevent the operation."""
    live_xml_stale: bool = False
    """Whether libvirt's live XML names the old files from now on, until the guest stops. Said of the first live
    snapshot of a run alone."""
    dry_run: bool = False
    """Whether this is only what would be done."""
    memory: Path | None = None
    """The file with the guest's memory."""

    def _more(self) -> dict[str, object]:
        memory: dict[str, object] = {} if self.memory is None else {"memory": str(self.memory)}
        return memory | ({"dry-run": True} if self.dry_run else {})

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `snapshot create --output=json` shows it."""
        return {
            "domain": self.domain,
            "snapshot": self.snapshot,
            "creation-time": self.creation_time,
            "parent": self.parent,
            "disks": [disk.as_dict() for disk in self.disks],
            "pause": None if self.pause is None else self.pause.as_dict(),
            "nvram": None if self.nvram is None else str(self.nvram),
            "live-xml-stale": self.live_xml_stale,
            "notes": list(self.notes),
            "skipped": [{"target": target, "reason": reason} for target, reason in self.skipped],
        } | self._more()


def create_snapshot(
    conn: libvirt.virConnect,
    domain_name: str,
    name: str | None = None,
    description: str | None = None,
    *,
    disks: Sequence[str] | None = None,
    required: Collection[str] = (),
    exclude: Collection[str] = (),
    overlays: Mapping[str, Path] | None = None,
    quiesce: str = "no",
    memory: Path | None = None,
    naming: NamingRule = "number",
) -> SnapshotReport:
    """Freeze the VMDK disks of a domain, which continues in new overlays, and register the snapshot.

    Without a `name` it is the second since 1970, as virsh has it. Disks are named by target or by file: `disks` are
    the only ones that take part, those in `required` must be able to, those in `exclude` are left out, and
    `overlays` says where the overlay of a disk goes, if not beside it under the next number (`naming="uuid"`: a
    UUID). `memory` is the file that the guest's memory goes to, where all its disks are served. When it fails
    nothing has changed, unless the error says that the rest is left to `recover`.

    Raises:
        DomainError: the domain does not allow it (it runs, has no VMDK disk, has such a snapshot), or libvirt refused.
        InvalidRequest: the name is invalid.
        CidMismatch, CorruptChain, FormatError, LockBusy: a chain is broken, or in use.
        OSError: a file could not be made.
    """
    domain = find_domain(conn, domain_name)
    request = Request(name, description, disks, required, exclude, overlays or {}, quiesce, memory, naming)
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()), contextlib.ExitStack() as held:
        recovered = recover_domain(conn, domain, store)
        ready(conn, domain)
        plan = make_plan(conn, domain, request, store, held)
        stale = _makes_stale(domain, plan)
        with dropin.around("create", domain.name(), as_plan(plan), uri=conn.getURI()) as notes:
            pause = _execute(conn, domain, store, plan)
        if plan.intent.live:
            _release(domain)
    refresh_pools(conn, [disk.overlay for disk in plan.disks])
    return replace(_report(plan, recovered, pause, notes), live_xml_stale=stale)


def _makes_stale(domain: libvirt.virDomain, plan: Plan) -> bool:
    """Return whether libvirt's live XML is right until now: after a live snapshot it names the old files."""
    if not plan.intent.live:
        return False
    with libvirt_errors(domain.name(), "read its live XML"):
        named = {disk.target: disk.path for disk in xml.list_disks(domain.XMLDesc(0))}
    return any(named.get(disk.target) == disk.frozen for disk in plan.disks)


def _release(domain: libvirt.virDomain) -> None:
    """Close what `virsh detach-disk` has left open of earlier snapshots; it does not matter if QEMU refuses."""
    with contextlib.suppress(VmdkSnapError):
        release_unused(Monitor(domain))


def freeze_tops(
    conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, targets: Sequence[str], snapshot: str
) -> Pause | None:
    """Switch a running guest to new overlays on these disks, without a snapshot: what it wrote is then frozen.

    The caller holds the domain's lock; `snapshot` is the reason. Returns how long the guest was stopped.

    Raises:
        VmdkSnapError, OSError: see `create_snapshot`.
    """
    with contextlib.ExitStack() as held:
        plan = make_plan(conn, domain, Request(disks=targets), store, held)
        intent = replace(plan.intent, operation="freeze", snapshot=snapshot, snapshot_xml="")
        return _execute(conn, domain, store, replace(plan, intent=intent, nvram=None))


def _report(plan: Plan, recovered: Recovery | None, pause: Pause | None, notes: Sequence[str]) -> SnapshotReport:
    header = plan.snapshot
    return SnapshotReport(
        plan.intent.domain,
        header.name,
        header.creation_time,
        header.parent,
        plan.disks,
        plan.skipped,
        plan.nvram,
        recovered,
        pause,
        (*notes, *(pause.notes if pause else ())),
        memory=header.memory_file,
    )


def as_plan(plan: Plan) -> dict[str, object]:
    """Return what the plan does, for drop-ins: types of JSON alone."""
    return {
        "snapshot": plan.snapshot.name,
        "running": plan.intent.live,
        "disks": [
            {"target": disk.target, "frozen": str(disk.frozen), "overlay": str(disk.overlay)} for disk in plan.disks
        ],
        "skipped": dict(plan.skipped),
    }


def _execute(conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, plan: Plan) -> Pause | None:
    intent = plan.intent
    pause = None
    try:
        store.write(intent)  # barrier: no file is made that nobody would know of after a crash
        with Holds(domain.name(), plan.served) as holds:
            for disk in plan.disks:
                intent = intent.made(str(disk.overlay), _make(domain, disk, holds))
            store.write(intent)
            if intent.memory is not None:
                save_memory(domain, Path(intent.memory), tuple(plan.served), plan.others)
            if plan.nvram is not None:
                freeze_nvram(intent.old_xml, plan.nvram)
            _define(conn, domain, intent)
            if intent.operation == "create":
                with libvirt_errors(domain.name(), f"register the snapshot {intent.snapshot!r}"):
                    register(domain, intent)
                _log.info("domain %s: snapshot %r registered with libvirt", domain.name(), intent.snapshot)
            if intent.live:
                pause = switch_all(domain, plan, holds)
    except BaseException as error:
        _undo(conn, domain, store, intent, error)
        raise
    if intent.memory is not None and intent.resume:
        with libvirt_errors(domain.name(), "resume it: the snapshot is complete"):
            domain.resume()
    # The snapshot is complete. A record that cannot be removed says nothing new: the next command drops it.
    with contextlib.suppress(OSError):
        store.remove(intent.uuid)
    return pause


def _make(domain: libvirt.virDomain, disk: PlannedDisk, holds: Holds) -> tuple[int, int]:
    """Make the overlay, or let the server of the disk make it; return its device and inode."""
    _log.info("domain %s: disk %s: new overlay %s on %s", domain.name(), disk.target, disk.overlay, disk.frozen)
    if disk.target not in holds:
        return make_overlay(domain.name(), disk)
    holds.prepare(disk.target, disk.overlay)
    return follow_base(domain.name(), disk.overlay, disk.frozen)


def _define(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    with libvirt_errors(domain.name(), "define it with its new disks"):
        check_state(domain)
        if bool(domain.isActive()) is not intent.live:
            raise DomainError(domain.name(), "was started or stopped while the snapshot was prepared: try again")
        if inactive_xml(domain) != intent.old_xml:
            raise DomainError(domain.name(), "was edited while the snapshot was prepared: try again")
        define(conn, intent.new_xml)
