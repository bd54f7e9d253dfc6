"""What a clone will be, worked out and checked before anything is made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.clone.identity import (
    Identity,
    new_identity,
    shared_with_original,
    with_copies,
    with_identity,
)
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore, Overlay, pending_overlays
from qemu_vmdk_snap.domain.needs.needed import Needed, same_file
from qemu_vmdk_snap.domain.overlay.naming import check_domain_name
from qemu_vmdk_snap.domain.qemu.depth import check_depth
from qemu_vmdk_snap.domain.state import check_state, find_snapshot, inactive_xml, volume_resolver
from qemu_vmdk_snap.domain.xml.elements import with_files_of_volumes
from qemu_vmdk_snap.domain.xml.nvram import frozen_nvram, nvram_of
from qemu_vmdk_snap.errors import DomainError, DomainExists, InvalidRequest

if TYPE_CHECKING:
    import libvirt

Mode = Literal["linked", "full"]


@dataclass(frozen=True, slots=True)
class ClonedDisk:
    """A disk of the clone."""

    target: str
    source: Path
    """The file of the original that the disk shows: frozen, or its top."""
    path: Path
    """The new file."""
    chain: tuple[Path, ...]
    """The files of the source, the top first."""
    size: int
    """Bytes that are copied; 0 for an overlay."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"target": self.target, "source": str(self.source), "filename": str(self.path), "size": self.size}


@dataclass(frozen=True, slots=True)
class Plan:
    """A clone ready to be made."""

    mode: Mode
    identity: Identity
    disks: tuple[ClonedDisk, ...]
    chains: Mapping[str, engine.Chain]
    """By target, open: nobody writes to them meanwhile."""
    nvram: Path | None
    """The file of UEFI variables that is copied."""
    notes: tuple[str, ...]
    intent: Intent


def make_plan(
    conn: libvirt.virConnect,
    domain: libvirt.virDomain,
    snapshot: str | None,
    name: str,
    mode: Mode | None,
    folder: Path | None,
    store: IntentStore,
    held: contextlib.ExitStack,
) -> Plan:
    """Return the plan; the chains of the source stay open in `held`.

    Raises:
        DomainExists: there is a domain of that name.
        DomainError: a disk cannot be cloned, a file is there already, there is no space, or the domain runs.
        InvalidRequest: the name is invalid.
        VmdkSnapError: a chain is broken or in use.
    """
    _check_name(conn, name)
    mode = mode or ("full" if snapshot is None else "linked")
    text, part = _source(domain, snapshot, mode)
    volume_path = volume_resolver(conn, domain.name())
    text = with_files_of_volumes(text, volume_path)
    chosen = list(_disks(domain.name(), text, part))
    chains = {disk.target: _open(disk, held) for disk in chosen}
    disks = tuple(_planned(disk, chains[disk.target], name, mode, folder) for disk in chosen)
    _require_free(domain.name(), disks, pending_overlays(store))
    if snapshot is not None:
        _require_frozen(Needed.read(conn, domain), domain.name(), disks)
    variables = nvram_of(text)
    old_nvram = None if variables is None else variables.path
    identity = new_identity(text, name, None if old_nvram is None else old_nvram.with_name(f"{name}_VARS.fd"))
    if mode == "linked":
        for disk in disks:
            check_depth(conn, domain.name(), disk.target, disk.chain)
        text = xml.stack(text, {disk.target: xml.NewTop(disk.path, disk.chain) for disk in disks})
    else:
        _check_space(domain.name(), disks)
        text = with_copies(text, {disk.source: disk.path for disk in disks})
    notes = tuple(f"the clone has what the original has: {what}" for what in shared_with_original(text))
    frozen = None if snapshot is None else frozen_nvram(find_snapshot(domain, snapshot).getXMLDesc(0))
    copied = next((one for one in (frozen, old_nvram) if one is not None and one.is_file()), None)
    if copied is not None and os.path.lexists(identity.nvram or ""):
        raise DomainError(domain.name(), f"{identity.nvram} exists already: the clone's UEFI variables would be there")
    intent = _intent(domain, snapshot or "", mode, disks, copied, identity, with_identity(text, identity))
    return Plan(mode, identity, disks, chains, copied, notes, intent)


def _check_name(conn: libvirt.virConnect, name: str) -> None:
    check_domain_name(name)
    with libvirt_errors(name, "see whether there is such a domain"):
        if name in {domain.name() for domain in conn.listAllDomains()}:
            raise DomainExists(name, "exists already")


def _source(domain: libvirt.virDomain, snapshot: str | None, mode: Mode) -> tuple[str, Sequence[str] | None]:
    """Return the XML that is cloned, and the disks whose state it has; None for all of them."""
    import libvirt

    name = domain.name()
    with libvirt_errors(name, "read its state"):
        if snapshot is not None:
            whole = find_snapshot(domain, snapshot).getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
            parsed = xml.parse_snapshot(whole)
            if parsed.memory != "no":
                raise DomainError(name, f"snapshot {snapshot!r} has memory too: it cannot be cloned")
            return xml.domain_of(whole), [disk.target for disk in parsed.disks if disk.mode == "external"]
        if mode == "linked":
            raise InvalidRequest(f"domain {name}", "a linked clone is on frozen files: name a snapshot")
        check_state(domain)
        if domain.isActive():
            raise DomainError(name, "runs, so its disks change: `snapshot create` one and clone that, or shut it off")
        return inactive_xml(domain), None


def _disks(domain: str, text: str, part: Sequence[str] | None) -> Iterator[xml.Disk]:
    """Yield the disks that the clone gets another file for.

    Raises:
        DomainError: a disk that both would write cannot be cloned, or there is none.
    """
    elements = xml.root_of(text).findall("./devices/disk")
    found = False
    for element, disk in zip(elements, xml.list_disks(text), strict=True):
        unwritten = element.find("readonly") is not None or element.find("shareable") is not None
        if element.get("device", "disk") in ("cdrom", "floppy") or unwritten:
            continue
        if disk.refusal is not None:
            reason = f"disk {disk.target} {disk.refusal}: the clone would write into that of the original"
            raise DomainError(domain, f"{reason}; detach it first")
        if part is not None and disk.target not in part:
            raise DomainError(domain, f"disk {disk.target} is not part of the snapshot: its state then is not known")
        found = True
        yield disk
    if not found:
        raise DomainError(domain, "has no VMDK disk to clone")


def _open(disk: xml.Disk, held: contextlib.ExitStack) -> engine.Chain:
    trusted = sorted({path.parent for path in disk.backing})
    return held.enter_context(engine.open_chain(disk.path or "", trusted_dirs=trusted))


def _planned(disk: xml.Disk, chain: engine.Chain, name: str, mode: Mode, folder: Path | None) -> ClonedDisk:
    source = disk.path or chain.path
    path = (folder or source.parent) / f"{name}-{disk.target}.vmdk"
    size = sum(run.length for run in chain.map() if run.kind is engine.RunKind.DATA) if mode == "full" else 0
    return ClonedDisk(disk.target, source, path, (source, *(link.path for link in chain.links[1:])), size)


def _require_free(domain: str, disks: Sequence[ClonedDisk], pending: set[Path]) -> None:
    for disk in disks:
        if os.path.lexists(disk.path) or disk.path in pending:
            raise DomainError(domain, f"disk {disk.target}: {disk.path} exists already")
        if not os.access(disk.path.parent, os.W_OK | os.X_OK):
            raise DomainError(domain, f"disk {disk.target}: {disk.path.parent} is not a writable folder")


def _require_frozen(needed: Needed, domain: str, disks: Sequence[ClonedDisk]) -> None:
    """Refuse a file that a domain writes to, whatever the snapshot says of it: the clone would change with it."""
    for holder in needed.holders:
        if holder.snapshot is not None or holder.chain.role != "disk" or not holder.chain.files:
            continue
        for disk in disks:
            if same_file(holder.chain.files[0].path, disk.source):
                reason = f"{holder.owner} writes to {disk.source}, which the snapshot froze: `doctor` says what to do"
                raise DomainError(domain, f"disk {disk.target}: {reason}")


def _check_space(domain: str, disks: Sequence[ClonedDisk]) -> None:
    folders = {disk.path.parent for disk in disks}
    for device in {folder.stat().st_dev for folder in folders}:
        there = [disk for disk in disks if disk.path.parent.stat().st_dev == device]
        facts = os.statvfs(there[0].path.parent)
        free, wanted = facts.f_bavail * facts.f_frsize, sum(disk.size for disk in there)
        if wanted > free:
            where = there[0].path.parent
            raise DomainError(domain, f"the copies take {wanted} bytes, and the file system of {where} has {free} left")


def _intent(
    domain: libvirt.virDomain,
    snapshot: str,
    mode: Mode,
    disks: Sequence[ClonedDisk],
    nvram: Path | None,
    identity: Identity,
    new_xml: str,
) -> Intent:
    made = [Overlay(disk.target, str(disk.path), str(disk.source)) for disk in disks]
    work: list[dict[str, object]] = []
    if mode == "full":
        # A copy is made in a folder of this name, which nobody else can have: whatever is in there is ours.
        work = [{"path": str(disk.path), "staged": str(_staged(disk.path))} for disk in disks]
        made = []
    if nvram is not None and identity.nvram is not None:
        staged = str(_staged(identity.nvram))
        work.append({"path": str(identity.nvram), "staged": staged, "source": str(nvram)})
    return Intent(
        uuid=domain.UUIDString(),
        domain=domain.name(),
        snapshot=snapshot,
        overlays=tuple(made),
        old_xml="",
        new_xml=new_xml,
        snapshot_xml="",
        operation="clone",
        work=tuple(work),
    )


def _staged(path: Path) -> Path:
    return path.parent / f".{uuid4().hex}.qemu-vmdk-snap" / path.name
