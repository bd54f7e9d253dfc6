"""Dry runs of create, revert and delete: the plan of the command itself, and no change.

The plan is made as in a run, under the same locks and with the same refusals, and is then dropped. Drop-ins are not
run. A run would first finish or undo an unfinished operation, so there is no plan while there is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.domain.connect import find_domain
from qemu_vmdk_snap.domain.create.plan import Request, make_plan
from qemu_vmdk_snap.domain.create.run import SnapshotReport
from qemu_vmdk_snap.domain.delete.plan import Scope, State, chosen
from qemu_vmdk_snap.domain.delete.preview import preview
from qemu_vmdk_snap.domain.delete.run import DeleteReport
from qemu_vmdk_snap.domain.delete.served import require_in_servers
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.overlay.naming import NamingRule
from qemu_vmdk_snap.domain.revert.run import After, RevertReport
from qemu_vmdk_snap.domain.revert.run import make_plan as plan_of_revert
from qemu_vmdk_snap.domain.revert.there import is_there
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt


def plan_create(
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
    """Return what `create_snapshot` would report, with `dry_run` set.

    Raises:
        DomainError: an operation on the domain is unfinished; and all that `create_snapshot` raises before its first
            change.
    """
    request = Request(name, description, disks, required, exclude, overlays or {}, quiesce, memory, naming)
    with planning(conn, domain_name) as (domain, store), contextlib.ExitStack() as held:
        plan = make_plan(conn, domain, request, store, held)
    header = plan.snapshot
    return SnapshotReport(
        domain.name(),
        header.name,
        header.creation_time,
        header.parent,
        plan.disks,
        plan.skipped,
        plan.nvram,
        recovered=None,
        dry_run=True,
        memory=header.memory_file,
    )


def plan_revert(
    conn: libvirt.virConnect, domain_name: str, snapshot: str, *, after: After = "as-saved", discard: bool = False
) -> RevertReport:
    """Return what `revert` would report, with `dry_run` set.

    Only the run looks for what else needs a file that would be discarded: such a file is kept, and named.

    Raises:
        DomainError: an operation on the domain is unfinished; and all that `revert` raises before its first change.
    """
    with planning(conn, domain_name) as (domain, store), contextlib.ExitStack() as held:
        plan = plan_of_revert(conn, domain, snapshot, after, store, held, discard=discard)
        already = is_there(conn, domain, plan)
    kept, gone = ((), plan.old_tops) if discard else (plan.old_tops, ())
    memory = None if plan.intent.memory is None else Path(plan.intent.memory)
    return RevertReport(
        domain.name(),
        snapshot,
        plan.state,
        plan.disks,
        kept,
        gone,
        recovered=None,
        dry_run=True,
        already=already,
        memory=memory,
    )


def plan_delete(
    conn: libvirt.virConnect,
    domain_name: str,
    names: str | Sequence[str],
    *,
    scope: Scope = "one",
    metadata: bool = False,
    orphans: Sequence[Path] = (),
    bandwidth: int = 0,
) -> DeleteReport:
    """Return what `delete` would report, with `dry_run` set: every operation on files, in their order.

    Raises:
        DomainError: an operation on the domain is unfinished; and all that `delete` raises before its first change.
    """
    with planning(conn, domain_name) as (domain, _):
        wanted = chosen(domain, [names] if isinstance(names, str) else names, scope)
        deleted, failed = preview(State.read(conn, domain, orphans), domain, wanted, metadata=metadata)
        if failed:
            raise failed[0][1]
        require_in_servers(domain.name(), deleted, 0 if metadata else bandwidth)
    return DeleteReport(domain.name(), deleted, recovered=None, dry_run=True)


@contextlib.contextmanager
def planning(conn: libvirt.virConnect, domain_name: str) -> Iterator[tuple[libvirt.virDomain, IntentStore]]:
    """Be the only command on the domain while a plan is made.

    Raises:
        DomainError: there is no such domain, it is being changed, or an operation on it is unfinished.
    """
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    uuid = domain.UUIDString()
    with store.locked(uuid, domain.name()):
        if store.path(uuid).exists():
            raise DomainError(domain.name(), "an operation is unfinished: run `recover` first")
        yield domain, store
