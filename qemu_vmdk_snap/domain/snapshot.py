"""Take a snapshot of a domain's VMDK disks: all of them, or nothing happens.

The steps, each durable before the next, so that a crash between any two of them is settled by `recovery`:

    1  the intent record
    2  the overlays, complete, with the owner and mode of their bases; then the record that knows them by inode
    3  the persistent XML, which now names the overlays and the whole chain below
    4  the snapshot in libvirt's metadata, with the XML of before inside
    5  the record goes

From before 1 until after 4 the old tops are locked as QEMU locks what it reads: no guest can start and write them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.intent import Intent, IntentStore
from qemu_vmdk_snap.domain.plan import Plan, PlannedDisk, Request, check_state, inactive_xml, make_plan
from qemu_vmdk_snap.domain.recovery import Recovery, recover_domain, register, take_back
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt


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
    """(target, reason) of the disks that took no part."""
    recovered: Recovery | None
    """What became of an unfinished snapshot that was found first."""


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
) -> SnapshotReport:
    """Freeze the VMDK disks of a shut-off domain, let it go on in new overlays, and register the snapshot.

    Without a `name` it is the second since 1970, as virsh has it. Disks are named by target or by file: `disks` are the
    only ones that take part, those in `required` must be able to, those in `exclude` are left out, and `overlays` says
    where the overlay of a disk goes, if not beside it. When it fails nothing has changed, unless the error says that
    the rest is left to `recover`.

    Raises:
        DomainError: the domain does not allow it (it runs, has no VMDK disk, has such a snapshot), or libvirt refused.
        InvalidRequest: the name cannot be.
        CidMismatch, CorruptChain, FormatError, LockBusy: a chain is broken, or in use.
        OSError: a file could not be made.
    """
    domain = find_domain(conn, domain_name)
    request = Request(name, description, disks, required, exclude, overlays or {})
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()), contextlib.ExitStack() as held:
        recovered = recover_domain(conn, domain, store)
        plan = make_plan(conn, domain, request, store, held)
        _execute(conn, domain, store, plan)
    header = plan.snapshot
    return SnapshotReport(
        domain.name(), header.name, header.creation_time, header.parent, plan.disks, plan.skipped, recovered
    )


def _execute(conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, plan: Plan) -> None:
    intent = plan.intent
    try:
        store.write(intent)  # barrier: no file is made that nobody would know of after a crash
        for disk in plan.disks:
            intent = intent.made(str(disk.overlay), _make_overlay(domain.name(), disk))
        store.write(intent)
        _define(conn, domain, intent)
        with libvirt_errors(domain.name(), f"register the snapshot {intent.snapshot!r}"):
            register(domain, intent)
    except BaseException as error:
        _undo(conn, domain, store, intent, error)
        raise
    # The snapshot is complete. A record that cannot be removed says nothing new: the next command drops it.
    with contextlib.suppress(OSError):
        store.remove(intent.uuid)


def _make_overlay(domain: str, disk: PlannedDisk) -> tuple[int, int]:
    """Make the overlay, durable, with owner and mode of its base; return its device and inode."""
    base = disk.frozen.stat()
    engine.create_overlay(disk.overlay, disk.frozen, mode=0o600)
    try:
        fd = os.open(disk.overlay, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            made = os.fstat(fd)
            _own(domain, disk, fd, base, made)
            # An overlay exists to be written, also on a base that was made read-only to protect it.
            os.fchmod(fd, stat.S_IMODE(base.st_mode) | stat.S_IWUSR)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        disk.overlay.unlink()
        raise
    return made.st_dev, made.st_ino


def _own(domain: str, disk: PlannedDisk, fd: int, base: os.stat_result, made: os.stat_result) -> None:
    if (base.st_uid, base.st_gid) == (made.st_uid, made.st_gid):
        return
    try:
        os.fchown(fd, base.st_uid, base.st_gid)
    except PermissionError as error:
        reason = f"cannot give {disk.overlay} the owner {base.st_uid}:{base.st_gid} of {disk.frozen}: run it as root"
        raise DomainError(domain, reason) from error


def _define(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    with libvirt_errors(domain.name(), "define it with its new disks"):
        check_state(domain)
        if inactive_xml(domain) != intent.old_xml:
            raise DomainError(domain.name(), "was edited while the snapshot was prepared: try again")
        conn.defineXML(intent.new_xml)


def _undo(
    conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent, cause: BaseException
) -> None:
    try:
        take_back(conn, domain, store, intent)
    except (VmdkSnapError, OSError) as error:
        reason = f"{cause}; taking it back failed too ({error}): the next command on this domain settles it"
        raise DomainError(domain.name(), reason) from cause
