"""Clone a domain: a new one, on overlays of the files that a snapshot froze, or on copies.

The steps, each durable before the next:

    1  the intent record of the original
    2  the files of the clone, none of which anybody knows yet; the record knows each by its inode
    3  the clone is defined: from here on libvirt's XML says who needs the frozen files
    4  the record goes

Killed before 3 the files are removed again, after it there is nothing left to do. The lock and the record of the
original keep its snapshots as they are until libvirt knows of the clone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import OnProgress, ignore, log
from qemu_vmdk_snap.domain.clone.plan import ClonedDisk, Mode, Plan, make_plan
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.dry_run import planning
from qemu_vmdk_snap.domain.journal.overlays import unlink_overlays
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore
from qemu_vmdk_snap.domain.journal.recover import Recovery, recover_domain
from qemu_vmdk_snap.domain.journal.staged import drop_staged, is_ours, make_staged, publish_staged
from qemu_vmdk_snap.domain.needs.needed import Needed
from qemu_vmdk_snap.domain.overlay.newfile import follow_base, make_overlay, refresh_pools
from qemu_vmdk_snap.domain.overlay.planned import PlannedDisk
from qemu_vmdk_snap.domain.xml import root_of
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)


@dataclass(frozen=True, slots=True)
class CloneReport:
    """What a clone did."""

    domain: str
    """The original."""
    snapshot: str | None
    clone: str
    uuid: str | None
    """Of the clone; None of one that is only planned."""
    mode: Mode
    disks: tuple[ClonedDisk, ...]
    macs: tuple[str, ...]
    nvram: Path | None
    """The copy of the UEFI variables."""
    recovered: Recovery | None
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    """Whether this is only what would be done."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `snapshot clone --output=json` shows it."""
        return {
            "domain": self.domain,
            "snapshot": self.snapshot,
            "clone": self.clone,
            "uuid": self.uuid,
            "mode": self.mode,
            "disks": [disk.as_dict() for disk in self.disks],
            "macs": list(self.macs),
            "nvram": None if self.nvram is None else str(self.nvram),
            "notes": list(self.notes),
        } | ({"dry-run": True} if self.dry_run else {})


def clone(
    conn: libvirt.virConnect,
    domain_name: str,
    snapshot: str | None,
    name: str,
    *,
    mode: Mode | None = None,
    folder: Path | None = None,
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> CloneReport:
    """Define a new domain that shows what a snapshot holds, or the domain as it is.

    `mode` is "linked" (overlays on the frozen files; the default of a snapshot) or "full" (copies; of a domain as it is
    the only one). New files are beside those of the original, or in `folder`. When it fails nothing has changed.

    Raises:
        DomainExists: there is a domain of that name.
        DomainError: a disk cannot be cloned, a file is there already, there is no space, or libvirt refuses.
        InvalidRequest: the name is invalid.
        VmdkSnapError, OSError: a chain is broken or in use, or a file could not be made.
    """
    if dry_run:
        with planning(conn, domain_name) as (domain, store), contextlib.ExitStack() as held:
            plan = make_plan(conn, domain, snapshot, name, mode, folder, store, held)
            return _report(domain.name(), snapshot, plan, None, dry_run=True)
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()), contextlib.ExitStack() as held:
        recovered = recover_domain(conn, domain, store)
        plan = make_plan(conn, domain, snapshot, name, mode, folder, store, held)
        _execute(conn, domain, store, plan, on_progress)
    refresh_pools(conn, [disk.path for disk in plan.disks])
    return _report(domain.name(), snapshot, plan, recovered)


def settle(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> Recovery | None:
    """Return if libvirt knows the clone; else remove what was made of it.

    Raises:
        DomainError: libvirt reports an error.
    """
    if _defined(conn, intent):
        for one in intent.work:
            drop_staged(Path(one["staged"]))
        return None
    left = [*unlink_overlays(conn, domain, intent)]
    for folder in {Path(overlay.path).parent for overlay in intent.overlays}:
        with contextlib.suppress(VmdkSnapError, OSError):
            engine.recover(folder)  # what is left of files that never became complete
    for one in intent.work:
        drop_staged(Path(one["staged"]))
        if is_ours(Path(one["path"]), one):
            left += _unlink_copy(conn, domain, Path(one["path"]), image="source" not in one)
    return Recovery(domain.name(), intent.snapshot, finished=False, left=tuple(left), operation="clone")


def _report(
    domain: str, snapshot: str | None, plan: Plan, recovered: Recovery | None, *, dry_run: bool = False
) -> CloneReport:
    who = plan.identity
    return CloneReport(
        domain,
        snapshot,
        who.name,
        None if dry_run else who.uuid,
        plan.mode,
        plan.disks,
        () if dry_run else who.macs,
        None if plan.nvram is None else who.nvram,
        recovered,
        plan.notes,
        dry_run,
    )


def _execute(
    conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, plan: Plan, on_progress: OnProgress
) -> None:
    intent = plan.intent
    try:
        store.write(intent)  # barrier: no file is made that nobody would know of after a crash
        if plan.mode == "linked":
            for disk in plan.disks:
                _log.info(
                    "domain %s: disk %s: overlay %s on %s", plan.identity.name, disk.target, disk.path, disk.source
                )
                made = make_overlay(plan.identity.name, PlannedDisk(disk.target, disk.path, disk.chain))
                intent = intent.made(str(disk.path), made)
                store.write(intent)
        makers: dict[str, Callable[[Path], object]] = {}
        if plan.mode == "full":
            makers = {str(disk.path): partial(_copy, plan, disk, on_progress=on_progress) for disk in plan.disks}
        if plan.nvram is not None:
            makers[str(plan.identity.nvram)] = partial(engine.copy_file, plan.nvram)
        for one in intent.work:
            made = make_staged(Path(one["staged"]), makers[one["path"]])
            known = tuple(each | {"identity": list(made)} if each is one else each for each in intent.work)
            intent = replace(intent, work=known)
            store.write(intent)
            publish_staged(Path(one["staged"]), Path(one["path"]))
        with libvirt_errors(plan.identity.name, "define the clone"):
            conn.defineXML(intent.new_xml)
    except BaseException as error:
        _take_back(conn, domain, store, intent, error)
        raise
    with contextlib.suppress(OSError):
        store.remove(intent.uuid)


def _take_back(
    conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent, cause: BaseException
) -> None:
    try:
        settle(conn, domain, intent)
        store.remove(intent.uuid)
    except (VmdkSnapError, OSError) as error:
        raise DomainError(domain.name(), f"{cause}; undoing it failed too ({error}): `recover` does it") from cause


def _copy(plan: Plan, disk: ClonedDisk, path: Path, *, on_progress: OnProgress) -> None:
    _log.info("domain %s: disk %s: copy %s of %s", plan.identity.name, disk.target, disk.path, disk.source)
    engine.convert(plan.chains[disk.target], path, on_progress=on_progress)
    follow_base(plan.identity.name, path, disk.source)


def _defined(conn: libvirt.virConnect, intent: Intent) -> bool:
    wanted = root_of(intent.new_xml).findtext("uuid", "")
    with libvirt_errors(intent.domain, "see whether its clone is defined"):
        return wanted in {domain.UUIDString() for domain in conn.listAllDomains()}


def _unlink_copy(conn: libvirt.virConnect, domain: libvirt.virDomain, path: Path, *, image: bool) -> list[Path]:
    """Unlink a copy that nobody has come to use; return it where it must stay."""
    try:
        with contextlib.ExitStack() as held:
            if image:
                held.enter_context(engine.open_chain(path, writable=True))
            needed = Needed.read(conn, domain, folders=[path.parent])
            needed.require_unneeded(path, [path], needed.holders)
            path.unlink()
    except (VmdkSnapError, OSError):
        return [path]
    return []
