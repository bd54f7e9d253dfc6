"""Change how disks of a shut-off domain are attached: the VMDK files themselves, or a server of ours; both ways.

libvirt changes the XML in one step, so a disk is attached in one way or in the other at any moment; no image changes.
Before that it is tried whether a server can serve the disk. An intent record tells what has begun; done again, nothing
changes twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import log
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore
from qemu_vmdk_snap.domain.journal.recover import Recovery, recover_domain
from qemu_vmdk_snap.domain.qemu.depth import max_links
from qemu_vmdk_snap.domain.served import server
from qemu_vmdk_snap.domain.served.place import place_for, qemu_owner
from qemu_vmdk_snap.domain.state import check_state, define, inactive_xml, volume_resolver
from qemu_vmdk_snap.domain.xml.edits import same_xml
from qemu_vmdk_snap.domain.xml.served import ServedDisk, served_disks, with_served, without_served
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)

Way = Literal["served", "direct"]


@dataclass(frozen=True, slots=True)
class Attached:
    """One disk, and how it is attached now."""

    target: str
    file: Path
    socket: Path
    """Where it is served, or was."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"target": self.target, "file": str(self.file), "socket": str(self.socket)}


@dataclass(frozen=True, slots=True)
class AttachReport:
    """What `attach` or `detach` did."""

    domain: str
    way: Way
    disks: tuple[Attached, ...]
    """Those that are attached in another way now; none where all were so already."""
    recovered: Recovery | None
    dry_run: bool = False
    """Whether this is only what would be done."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return bool(self.disks) and not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types."""
        disks = [disk.as_dict() for disk in self.disks]
        answer: dict[str, object] = {"domain": self.domain, "attached": self.way, "disks": disks}
        return answer | ({"dry-run": True} if self.dry_run else {})


def attach(conn: libvirt.virConnect, domain_name: str, disks: Sequence[str], *, dry_run: bool = False) -> AttachReport:
    """Let these disks (all, without names) of a shut-off domain be served from its next start on.

    Disks are named by target or by file.

    Raises:
        DomainError: the domain is not shut off, has no such disk, or the disk can take no part in snapshots.
        InvalidRequest: there is no place for its sockets.
        VmdkSnapError, OSError: its chain is broken or in use, or cannot be served. Nothing has changed.
    """
    return _change(conn, domain_name, disks, "served", dry_run=dry_run)


def detach(conn: libvirt.virConnect, domain_name: str, disks: Sequence[str], *, dry_run: bool = False) -> AttachReport:
    """Let QEMU open the files of these disks (of all, without names) itself again, from the domain's next start on.

    Raises:
        DomainError: the domain is not shut off, has no such disk, or libvirt could not start so deep a chain.
        VmdkSnapError, OSError: its chain is broken or in use. Nothing has changed.
    """
    return _change(conn, domain_name, disks, "direct", dry_run=dry_run)


def _change(
    conn: libvirt.virConnect, domain_name: str, names: Sequence[str], way: Way, *, dry_run: bool
) -> AttachReport:
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()):
        if dry_run and store.has(domain.UUIDString()):
            raise DomainError(domain.name(), "an operation is unfinished: `recover` settles it")
        recovered = None if dry_run else recover_domain(conn, domain, store)
        with libvirt_errors(domain.name(), "read its state"):
            check_state(domain)
            if domain.isActive():
                raise DomainError(domain.name(), "runs: how a disk is attached can be changed once it is shut off")
            text = inactive_xml(domain)
        if not dry_run:
            server.stop(domain.name(), text)
        chosen = _chosen(conn, domain, text, names, way)
        new = _attached(conn, domain, text, chosen) if way == "served" else _detached(conn, domain, text, chosen)
        there = served_disks(new if way == "served" else text)
        report = tuple(
            Attached(disk.target, disk.path, there[disk.target].socket) for disk in chosen if disk.path is not None
        )
        if chosen and not dry_run:
            _execute(conn, domain, store, _intent(domain, text, new, way, chosen))
    return AttachReport(domain.name(), way, report, recovered, dry_run)


def _chosen(
    conn: libvirt.virConnect, domain: libvirt.virDomain, text: str, names: Sequence[str], way: Way
) -> list[xml.Disk]:
    name, served = domain.name(), served_disks(text)
    disks = xml.list_disks(text, volume_resolver(conn, name))
    chosen: list[xml.Disk] = []
    for wanted in names or [disk.target for disk in disks if disk.refusal is None]:
        disk = next((one for one in disks if wanted in (one.target, str(one.path))), None)
        if disk is None:
            raise DomainError(name, f"has no disk {wanted!r}")
        if way == "served" and disk.refusal:
            raise DomainError(name, f"disk {disk.target} {disk.refusal}: it cannot be served")
        if (disk.target in served) is not (way == "served") and disk not in chosen:
            chosen.append(disk)
    return chosen


def _chain(disk: xml.Disk) -> tuple[Path, ...]:
    """Return the links of the chain, which nobody uses now."""
    assert disk.path is not None
    trusted = sorted({path.parent for path in disk.backing})
    with engine.open_chain(disk.path, trusted_dirs=trusted, writable=True) as chain:
        return (disk.path, *(link.path for link in chain.links[1:]))


def _attached(conn: libvirt.virConnect, domain: libvirt.virDomain, text: str, chosen: Sequence[xml.Disk]) -> str:
    places: list[ServedDisk] = []
    for disk in chosen:
        links = _chain(disk)
        if f"file='{disk.path}'" not in text and f'file="{disk.path}"' not in text:
            raise DomainError(domain.name(), f"disk {disk.target} is a volume of a pool: name its file in the XML")
        if len(links) > 1:
            text = xml.stack(text, {disk.target: xml.NewTop(links[0], links[1:])})  # spelt out to its end
        places.append(place_for(conn, domain, disk.target))
    return with_served(text, places, qemu_owner(conn, text))


def _detached(conn: libvirt.virConnect, domain: libvirt.virDomain, text: str, chosen: Sequence[xml.Disk]) -> str:
    with libvirt_errors(domain.name(), "ask for its version"):
        limit = max_links(conn.getLibVersion())
    for disk in chosen:
        if len(links := _chain(disk)) > limit:
            reason = f"disk {disk.target} has a chain of {len(links)} links, and this libvirt starts none of more than"
            raise DomainError(domain.name(), f"{reason} {limit}: delete or prune snapshots first")
    return without_served(text, {disk.target for disk in chosen})


def _intent(domain: libvirt.virDomain, text: str, new: str, way: Way, chosen: Sequence[xml.Disk]) -> Intent:
    return Intent(
        uuid=domain.UUIDString(),
        domain=domain.name(),
        snapshot="",
        overlays=(),
        old_xml=text,
        new_xml=new,
        snapshot_xml="",
        operation="attach" if way == "served" else "detach",
        work=tuple({"target": disk.target, "frozen": str(disk.path)} for disk in chosen),
    )


def _execute(conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent) -> None:
    if intent.operation == "attach":
        _try(domain, intent, conn.getURI())
    if inactive_xml(domain) != intent.old_xml:
        raise DomainError(domain.name(), "was edited meanwhile: try again")
    store.write(intent)
    try:
        finish(conn, domain, intent)
    except BaseException:
        if same_xml(inactive_xml(domain), intent.old_xml):
            store.remove(intent.uuid)  # nothing has changed
        raise
    with contextlib.suppress(OSError):
        store.remove(intent.uuid)


def _try(domain: libvirt.virDomain, intent: Intent, uri: str) -> None:
    """Serve the disks once, before the XML says so: what cannot be served is found out here, not at a start."""
    try:
        server.start(domain.name(), intent.new_xml, uri, [one["target"] for one in intent.work])
    finally:
        server.stop(domain.name(), intent.new_xml)


def finish(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Define the new XML, unless that is done, or the domain was edited since: then the edit stays.

    Raises:
        DomainError: libvirt refuses.
    """
    if same_xml(inactive_xml(domain), intent.old_xml):
        with libvirt_errors(domain.name(), f"{intent.operation} its disks"):
            define(conn, intent.new_xml)
        _log.info("domain %s: %s of %s", domain.name(), intent.operation, [one["target"] for one in intent.work])
