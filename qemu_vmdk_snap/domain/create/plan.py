"""The plan of a snapshot, made and checked before anything is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore, Overlay, pending_overlays
from qemu_vmdk_snap.domain.nvram import plan_nvram
from qemu_vmdk_snap.domain.overlay import naming
from qemu_vmdk_snap.domain.overlay.planned import PlannedDisk
from qemu_vmdk_snap.domain.qemu.agent import check_quiesce
from qemu_vmdk_snap.domain.qemu.depth import check_depth
from qemu_vmdk_snap.domain.qemu.options import lacks_direct_io, read_options
from qemu_vmdk_snap.domain.qemu.switch import Tops, check_disks
from qemu_vmdk_snap.domain.served.hold import check_served
from qemu_vmdk_snap.domain.served.memory import check_memory
from qemu_vmdk_snap.domain.state import check_state, inactive_xml, lenient, volume_resolver
from qemu_vmdk_snap.domain.xml.named import folders_named
from qemu_vmdk_snap.domain.xml.nvram import with_nvram
from qemu_vmdk_snap.domain.xml.respell import with_chains
from qemu_vmdk_snap.domain.xml.served import ServedDisk, served_disks
from qemu_vmdk_snap.errors import DomainError, SnapshotExists

if TYPE_CHECKING:
    import libvirt


@dataclass(frozen=True, slots=True)
class Request:
    """The user's request. Disks are named by target or by their file, as virsh allows."""

    name: str | None = None
    description: str | None = None
    disks: Sequence[str] | None = None
    """The disks that take part; None for every VMDK disk that can."""
    required: Collection[str] = ()
    """Disks that must be able to take part; naming one does not leave out the others."""
    exclude: Collection[str] = ()
    overlays: Mapping[str, Path] = field(default_factory=dict)
    """Where the overlay of a disk is created; beside the disk by default."""
    quiesce: str = "no"
    """Whether a running guest's file systems are frozen meanwhile: `no`, `auto` (if possible), `require`."""
    memory: Path | None = None
    """Where the memory of a running guest goes; None for a snapshot of disks alone."""
    naming: naming.NamingRule = "number"
    """How overlays are named where `overlays` does not name them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A snapshot that is ready to be taken."""

    snapshot: xml.SnapshotXml
    disks: tuple[PlannedDisk, ...]
    skipped: tuple[tuple[str, str], ...]
    """(target, reason) of the disks that take no part, and of `nvram` and `tpm` where they cannot."""
    intent: Intent
    quiesce: str = "no"
    tops: Tops = field(default_factory=Tops)
    """Of a running domain: what QEMU writes to."""
    nvram: Path | None = None
    """The copy of the UEFI variables that is frozen with the disks."""
    served: Mapping[str, ServedDisk] = field(default_factory=dict)
    """Of a running domain: the disks among these that servers of ours write to."""
    others: tuple[str, ...] = ()
    """The other disks of the domain, by target."""

    @property
    def direct(self) -> tuple[PlannedDisk, ...]:
        """Return the disks that QEMU itself writes to."""
        return tuple(disk for disk in self.disks if disk.target not in self.served)


def make_plan(
    conn: libvirt.virConnect,
    domain: libvirt.virDomain,
    request: Request,
    store: IntentStore,
    held: contextlib.ExitStack,
) -> Plan:
    """Return the plan. The chains of a shut-off domain stay open in `held`, so that no guest writes to them meanwhile.

    Raises:
        DomainError: the state of the domain does not allow it, or no disk can take part.
        InvalidRequest: the name or a path is invalid.
        VmdkSnapError: a chain is broken or in use; see `open_chain`.
    """
    import libvirt

    name = domain.name()
    with libvirt_errors(name, "read its state"):
        check_state(domain)
        live = bool(domain.isActive())
        running = live and domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        old_xml = inactive_xml(domain)
        snapshots = {snapshot.getName(): snapshot.getXMLDesc(0) for snapshot in domain.listAllSnapshots()}
        parent = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
        header = _header(domain, request, snapshots, parent)
    volume_path = volume_resolver(conn, name)
    disks = xml.list_disks(old_xml, volume_path)
    held.enter_context(engine.allowing(*folders_named(lenient(volume_path), old_xml, *snapshots.values()), below=False))
    chosen, skipped = choose(name, disks, request)
    check_quiesce(request.quiesce)
    attached = served_disks(old_xml)
    served = {disk.target: attached[disk.target] for disk in chosen if disk.target in attached and live}
    tops = _check_live(domain, chosen, served, volume_path) if live else Tops()
    if request.memory is not None:
        check_memory(domain, request.memory, disks, {disk.target for disk in chosen}, attached)
    taken = set().union(*(xml.files_in(text) for text in (old_xml, *snapshots.values())), pending_overlays(store))
    options = read_options(old_xml)
    planned = []
    for disk in chosen:
        planned.append(_plan_disk(name, disk, request, taken, held, lock=not live))
        if disk.target not in attached:
            if options[disk.target].direct:
                _check_direct(name, planned[-1])
            check_depth(conn, name, disk.target, planned[-1].chain)
        taken.add(planned[-1].overlay)
    nvram, left_out = plan_nvram(old_xml)
    plan = _assemble(domain, header, old_xml, disks, tuple(planned), (*skipped, *left_out), nvram)
    intent = replace(plan.intent, live=live, resume=running, thaw=live and request.quiesce != "no")
    others = tuple(disk.target for disk in disks if disk not in chosen)
    return replace(plan, quiesce=request.quiesce, tops=tops, intent=intent, served=served, others=others)


def _check_live(
    domain: libvirt.virDomain,
    chosen: Sequence[xml.Disk],
    served: Mapping[str, ServedDisk],
    volume_path: xml.VolumePath,
) -> Tops:
    check_served(domain, served, [disk for disk in chosen if disk.target in served])
    direct = [disk for disk in chosen if disk.target not in served]
    return check_disks(domain, direct, volume_path) if direct else Tops()


def choose(domain: str, disks: Sequence[xml.Disk], request: Request) -> tuple[list[xml.Disk], list[tuple[str, str]]]:
    """Return the disks that take part, and (target, reason) of the others.

    Raises:
        DomainError: a disk that was named is not there or cannot take part, or none is left.
    """
    known = {name for disk in disks for name in (disk.target, str(disk.path))}
    asked = {*(request.disks or ()), *request.required, *request.overlays}
    for wanted in (*asked, *request.exclude):
        if wanted not in known:
            raise DomainError(domain, f"has no disk {wanted!r}")
    chosen, skipped = [], []
    for disk in disks:
        names = {disk.target, str(disk.path)}
        named = bool(names & asked)
        if disk.refusal and named:
            raise DomainError(domain, f"disk {disk.target} {disk.refusal}: it cannot be snapshotted")
        reason = disk.refusal
        if names & set(request.exclude) or (request.disks is not None and not names & set(request.disks)):
            reason = reason or "was left out"
        elif disk.opted_out and not named:
            reason = reason or "has snapshot='no' in the domain's XML"
        if reason:
            skipped.append((disk.target, reason))
        else:
            chosen.append(disk)
    if not chosen:
        why = "; ".join(f"{target} {reason}" for target, reason in skipped)
        raise DomainError(domain, "has no VMDK disk to snapshot" + (f": {why}" if why else ""))
    return chosen, skipped


def _header(
    domain: libvirt.virDomain,
    request: Request,
    snapshots: Collection[str],
    parent: str | None,
) -> xml.SnapshotXml:
    name = naming.default_snapshot_name(snapshots) if request.name is None else request.name
    naming.check_snapshot_name(name)
    naming.check_description(request.description or "")
    if name in snapshots:  # libvirt would replace it silently
        raise SnapshotExists(domain.name(), f"has a snapshot {name!r} already", snapshot=name)
    created = int(naming.default_snapshot_name())
    memory = "no" if request.memory is None else "external"
    state, file = _state(domain, request), request.memory
    return xml.SnapshotXml(name, state, created, request.description, parent, memory, memory_file=file)


def _state(domain: libvirt.virDomain, request: Request) -> str:
    """Return what the guest is in the snapshot, in libvirt's words."""
    import libvirt

    if not domain.isActive():
        return "shutoff"
    if request.memory is None:
        return "disk-snapshot"
    return "running" if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING else "paused"


def _plan_disk(
    domain: str, disk: xml.Disk, request: Request, taken: Collection[Path], held: contextlib.ExitStack, *, lock: bool
) -> PlannedDisk:
    if disk.path is None:
        raise DomainError(domain, f"disk {disk.target} has no file")
    # The domain's XML names these files, so QEMU opens them wherever they are.
    trusted = sorted({path.parent for path in disk.backing})
    chain = held.enter_context(engine.open_chain(disk.path, trusted_dirs=trusted, lock=lock))
    wanted = request.overlays.get(disk.target) or request.overlays.get(str(disk.path))
    overlay = naming.next_overlay(disk.path, taken, request.naming) if wanted is None else Path(wanted).absolute()
    if overlay in taken:
        raise DomainError(domain, f"overlay {overlay} belongs to another disk or snapshot")
    return PlannedDisk(disk.target, overlay, (disk.path, *(link.path for link in chain.links[1:])))


def _check_direct(domain: str, disk: PlannedDisk) -> None:
    """Refuse an overlay that QEMU could not open with the disk's cache mode, now or at the next start."""
    if lacks_direct_io(disk.overlay.parent):
        reason = f"disk {disk.target}: its cache mode needs O_DIRECT, which the file system of {disk.overlay} lacks"
        raise DomainError(domain, f"{reason}: put the overlay elsewhere, or change the cache mode")


def _spelt_out(old_xml: str, disks: Sequence[xml.Disk], planned: Sequence[PlannedDisk]) -> str:
    """Return the domain with the whole chain of each disk that takes part, where the XML does not spell it out."""
    open_ended = {disk.target for disk in disks if not disk.closed}
    chains = {one.target: one.chain for one in planned if one.target in open_ended and one.chain[1:]}
    return with_chains(old_xml, chains)


def _assemble(
    domain: libvirt.virDomain,
    header: xml.SnapshotXml,
    old_xml: str,
    disks: Sequence[xml.Disk],
    planned: tuple[PlannedDisk, ...],
    skipped: tuple[tuple[str, str], ...],
    nvram: Path | None,
) -> Plan:
    overlays = {disk.target: disk.overlay for disk in planned}
    entries = tuple(
        xml.SnapshotDisk(
            disk.target, "external" if disk.target in overlays else "no", overlays.get(disk.target), disk.path
        )
        for disk in disks
    )
    snapshot = replace(header, disks=entries)
    then = _spelt_out(old_xml, disks, planned)
    intent = Intent(
        uuid=domain.UUIDString(),
        domain=domain.name(),
        snapshot=header.name,
        overlays=tuple(Overlay(disk.target, str(disk.overlay), str(disk.frozen)) for disk in planned),
        old_xml=old_xml,
        new_xml=xml.stack(old_xml, {disk.target: xml.NewTop(disk.overlay, disk.chain) for disk in planned}),
        snapshot_xml=xml.snapshot_xml(snapshot, then if nvram is None else with_nvram(then, nvram)),
        memory=None if header.memory_file is None else str(header.memory_file),
    )
    return Plan(snapshot, planned, skipped, intent, nvram=nvram)
