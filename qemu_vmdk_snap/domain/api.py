"""The public functions of the plugin: each is one command on the snapshots of a domain, and returns its report.

Those that change something take `dry_run`: the same plan, the same refusals, the same report, and no change. All may be
called from several threads, also for one domain: the second caller is refused with `DomainBusy`. A connection may be
shared by threads, as libvirt documents.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap import OnProgress, ignore
from qemu_vmdk_snap.domain import edit
from qemu_vmdk_snap.domain.adopt.run import AdoptReport, adopt
from qemu_vmdk_snap.domain.attach import run as attach_run
from qemu_vmdk_snap.domain.attach.run import AttachReport
from qemu_vmdk_snap.domain.clone.plan import Mode
from qemu_vmdk_snap.domain.clone.run import CloneReport, clone
from qemu_vmdk_snap.domain.consolidate.run import ConsolidateReport, consolidate
from qemu_vmdk_snap.domain.create import run as create_run
from qemu_vmdk_snap.domain.create.run import SnapshotReport
from qemu_vmdk_snap.domain.delete.plan import Scope
from qemu_vmdk_snap.domain.delete.prune import PruneReport, Retention, prune
from qemu_vmdk_snap.domain.delete.run import DeleteReport, delete
from qemu_vmdk_snap.domain.destroy.run import DestroyReport, destroy
from qemu_vmdk_snap.domain.dry_run import plan_create, plan_delete, plan_revert
from qemu_vmdk_snap.domain.journal import recover as journal
from qemu_vmdk_snap.domain.journal.recover import Recovery
from qemu_vmdk_snap.domain.move.run import MoveReport, move
from qemu_vmdk_snap.domain.revert.run import After, RevertReport, revert
from qemu_vmdk_snap.domain.served import commands as served_commands

if TYPE_CHECKING:
    import libvirt


def create_snapshot(
    conn: libvirt.virConnect,
    domain: str,
    name: str | None = None,
    description: str | None = None,
    *,
    disks: Sequence[str] | None = None,
    required: Collection[str] = (),
    exclude: Collection[str] = (),
    overlays: Mapping[str, Path | str] | None = None,
    quiesce: str = "no",
    memory: Path | str | None = None,
    dry_run: bool = False,
) -> SnapshotReport:
    """Freeze the VMDK disks of a domain, which continues in new overlays, and register the snapshot with libvirt.

    The default `name` is the seconds since 1970. Disks are named by target or by file: `disks` are the only ones that
    take part, those in `required` must be able to, those in `exclude` are left out, and `overlays` says where the
    overlay of a disk goes, if not beside it. `quiesce` is "no", "auto" or "require". `memory` is the file for the
    memory of a running guest whose disks are all served: memory and disks are of one instant.

    Raises:
        SnapshotExists: the domain has a snapshot of that name.
        NoDomain, DomainBusy, DomainError: the domain is not there, is being changed, or does not allow it.
        InvalidRequest: the name is invalid.
        CidMismatch, CorruptChain, FormatError, LockBusy: a chain is broken, or in use.
        OSError: a file could not be made.
    """
    take = plan_create if dry_run else create_run.create_snapshot
    return take(
        conn,
        domain,
        name,
        description,
        disks=disks,
        required=required,
        exclude=exclude,
        overlays={disk: Path(path) for disk, path in (overlays or {}).items()},
        quiesce=quiesce,
        memory=None if memory is None else Path(memory).absolute(),
    )


def revert_snapshot(
    conn: libvirt.virConnect,
    domain: str,
    snapshot: str,
    *,
    after: After = "as-saved",
    discard: bool = False,
    orphans: Sequence[Path | str] = (),
    dry_run: bool = False,
) -> RevertReport:
    """Revert a domain to a snapshot, in new overlays. A running guest is stopped without a shutdown.

    `after` is the state of the domain then: "as-saved", "shutoff", "running" or "paused". What was written since the
    last snapshot is kept in its file unless `discard` deletes it; `orphans` are files that need it and are given up.

    Raises:
        NoSnapshot: the domain has no such snapshot.
        NoDomain, DomainBusy, DomainError: see `create_snapshot`.
        CidMismatch, CorruptChain, FormatError, LockBusy: a frozen chain is broken, or in use.
        OSError: a file could not be made.
    """
    if dry_run:
        return plan_revert(conn, domain, snapshot, after=after, discard=discard)
    given_up = [Path(path).absolute() for path in orphans]
    return revert(conn, domain, snapshot, after=after, discard=discard, orphans=given_up)


def delete_snapshots(
    conn: libvirt.virConnect,
    domain: str,
    names: str | Sequence[str],
    *,
    scope: Scope = "one",
    metadata: bool = False,
    orphans: Sequence[Path | str] = (),
    keep_going: bool = False,
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> DeleteReport:
    """Delete snapshots; the domain and every other snapshot keep their contents.

    `scope` is "one", "children" (with their descendants) or "children-only". With `metadata` libvirt forgets them
    and no file is changed. `orphans` are files that need what is deleted and are given up. With `keep_going` one that
    cannot be deleted is left as it was, and is in the report's `failed`; the next one is tried.

    Raises:
        NoSnapshot: the domain has no such snapshot.
        NoDomain, DomainBusy, DomainError: see `create_snapshot`.
        StillNeeded: something else needs a file that would be changed or deleted, or may need it; it names what.
        VmdkSnapError, OSError: an image is broken or in use; what is not finished is left to `recover_domains`.
    """
    given_up = [Path(path).absolute() for path in orphans]
    if dry_run:
        return plan_delete(conn, domain, names, scope=scope, metadata=metadata, orphans=given_up)
    return delete(
        conn,
        domain,
        names,
        scope=scope,
        metadata=metadata,
        orphans=given_up,
        keep_going=keep_going,
        on_progress=on_progress,
    )


def prune_snapshots(
    conn: libvirt.virConnect,
    domain: str,
    policy: Retention,
    *,
    orphans: Sequence[Path | str] = (),
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> PruneReport:
    """Delete the snapshots that the policy does not keep; the report has the reason of each that stays.

    One that cannot be deleted is left as it was, and is in the report's `failed`. `orphans`: see `delete_snapshots`.

    Raises:
        InvalidRequest: the policy keeps nothing, or a number is negative.
        VmdkSnapError, OSError: see `delete_snapshots`.
    """
    given_up = [Path(path).absolute() for path in orphans]
    return prune(conn, domain, policy, dry_run=dry_run, orphans=given_up, on_progress=on_progress)


def adopt_snapshots(
    conn: libvirt.virConnect, domain: str, *, vmsd: Path | str | None = None, dry_run: bool = False
) -> AdoptReport:
    """Register snapshots that VMware made, or that were made by hand; files are only read.

    Raises:
        NoDomain, DomainBusy, DomainError: see `create_snapshot`.
        VmdkSnapError, OSError: a chain or the dictionary `vmsd` cannot be read.
    """
    return adopt(conn, domain, vmsd=None if vmsd is None else Path(vmsd), dry_run=dry_run)


def rename_snapshot(conn: libvirt.virConnect, domain: str, snapshot: str, name: str) -> None:
    """Give the snapshot another name; files and tree stay.

    Raises:
        NoSnapshot, SnapshotExists, NoDomain, DomainBusy, DomainError: see `create_snapshot`.
        InvalidRequest: the name is invalid.
    """
    edit.rename(conn, domain, snapshot, name)


def describe_snapshot(conn: libvirt.virConnect, domain: str, snapshot: str, description: str | None) -> None:
    """Give the snapshot another description; None removes it.

    Raises:
        NoSnapshot, NoDomain, DomainBusy, DomainError: see `create_snapshot`.
    """
    edit.describe(conn, domain, snapshot, description)


def set_current_snapshot(conn: libvirt.virConnect, domain: str, snapshot: str) -> None:
    """Make the snapshot the current one: the next one is its child.

    Raises:
        NoSnapshot, NoDomain, DomainBusy, DomainError: see `create_snapshot`.
    """
    edit.set_current(conn, domain, snapshot)


def attach_served(
    conn: libvirt.virConnect, domain: str, disks: Sequence[str] = (), *, dry_run: bool = False
) -> AttachReport:
    """Let these disks (all, without names) of a shut-off domain be served by servers of ours from its next start on.

    Raises:
        NoDomain, DomainBusy, DomainError: see `create_snapshot`.
        InvalidRequest: there is no place for the sockets.
        VmdkSnapError, OSError: a chain is broken or in use, or cannot be served. Nothing has changed.
    """
    return attach_run.attach(conn, domain, disks, dry_run=dry_run)


def detach_served(
    conn: libvirt.virConnect, domain: str, disks: Sequence[str] = (), *, dry_run: bool = False
) -> AttachReport:
    """Let QEMU open the files of these disks (of all, without names) itself again, from the domain's next start on.

    Raises:
        NoDomain, DomainBusy, DomainError: see `create_snapshot`.
        VmdkSnapError, OSError: a chain is broken or in use. Nothing has changed.
    """
    return attach_run.detach(conn, domain, disks, dry_run=dry_run)


def start_servers(conn: libvirt.virConnect, domain: str) -> list[str]:
    """Start the servers of the domain's served disks that do not run, as the hook does; return their targets.

    Raises:
        NoDomain, DomainError: the domain is not there, or a disk cannot be served.
    """
    return served_commands.start_servers(conn, domain)


def stop_servers(conn: libvirt.virConnect, domain: str) -> list[str]:
    """Stop the servers of the served disks of a domain that is shut off; return their targets.

    Raises:
        NoDomain, DomainError: the domain is not there, it runs, or a server does not end.
    """
    return served_commands.stop_servers(conn, domain)


def clone_domain(
    conn: libvirt.virConnect,
    domain: str,
    snapshot: str | None,
    name: str,
    *,
    mode: Mode | None = None,
    folder: Path | str | None = None,
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> CloneReport:
    """Define a new domain `name` with the contents of the snapshot; without a snapshot, with the current contents.

    It has a UUID, MAC addresses and UEFI variables of its own. `mode` is "linked" (overlays on the frozen files, which
    the original then keeps; the default of a snapshot) or "full" (copies; of a domain as it is the only one). New files
    are beside those of the original, or in `folder`.

    Raises:
        DomainExists: there is a domain of that name.
        NoSnapshot, NoDomain, DomainBusy, DomainError: see `create_snapshot`.
        InvalidRequest: the name cannot be, or a linked clone of no snapshot is asked for.
        VmdkSnapError, OSError: a chain is broken or in use, or a file could not be made.
    """
    home = None if folder is None else Path(folder).absolute()
    return clone(conn, domain, snapshot, name, mode=mode, folder=home, dry_run=dry_run, on_progress=on_progress)


def destroy_domain(
    conn: libvirt.virConnect, domain: str, *, orphans: Sequence[Path | str] = (), dry_run: bool = False
) -> DestroyReport:
    """Undefine a domain that is shut off, with its snapshots, and delete every file that belongs only to it.

    These are the images that it or one of its snapshots has or had on top of a disk; what is only below them (the
    base of a clone, a template) stays. `orphans`: see `delete_snapshots`.

    Raises:
        NoDomain, DomainBusy, DomainError: see `create_snapshot`.
        StillNeeded: something else needs one of the files, or may; it names what.
        VmdkSnapError, OSError: an image is broken or in use; what is not finished is left to `recover_domains`.
    """
    return destroy(conn, domain, orphans=[Path(path).absolute() for path in orphans], dry_run=dry_run)


def move_domain(
    conn: libvirt.virConnect,
    domain: str,
    folder: Path | str,
    *,
    orphans: Sequence[Path | str] = (),
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> MoveReport:
    """Move the VMDK files that belong only to a domain to `folder`; its XML and that of its snapshots follow.

    On one file system the files get other names, else they are copied. `orphans`: see `delete_snapshots`.

    Raises:
        InvalidRequest: it is not a folder.
        NoDomain, DomainBusy, DomainError: see `create_snapshot`.
        StillNeeded: something else needs a file where it is, or may; it names what.
        VmdkSnapError, OSError: an image is broken or in use; what is not finished is left to `recover_domains`.
    """
    given_up = [Path(path).absolute() for path in orphans]
    return move(conn, domain, Path(folder).absolute(), orphans=given_up, dry_run=dry_run, on_progress=on_progress)


def consolidate_domain(
    conn: libvirt.virConnect,
    domain: str,
    *,
    include: Sequence[Path | str] = (),
    orphans: Sequence[Path | str] = (),
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> ConsolidateReport:
    """Merge the links of a domain's chains that no snapshot has; it and its snapshots keep their contents.

    A link whose overlay's name is not derived from it may be a template: it is merged only if `include` names it. The
    report has each link that stays, and why. `orphans`: see `delete_snapshots`.

    Raises:
        NoDomain, DomainBusy, DomainError: see `create_snapshot`.
        VmdkSnapError, OSError: an image is broken or in use; what is not finished is left to `recover_domains`.
    """
    named, given_up = ([Path(path).absolute() for path in paths] for paths in (include, orphans))
    return consolidate(conn, domain, include=named, orphans=given_up, dry_run=dry_run, on_progress=on_progress)


def recover_domains(conn: libvirt.virConnect, domains: Sequence[str] = ()) -> list[Recovery]:
    """Finish or undo the unfinished operations on these domains (default: all), and return the result of each.

    Raises:
        DomainError: one failed; its record stays. The others are finished or undone.
    """
    return journal.recover(conn, domains)
