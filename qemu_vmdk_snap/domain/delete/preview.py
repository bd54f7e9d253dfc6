"""What deleting snapshots would do: the plans of the run, in its order, and nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qemu_vmdk_snap.domain.delete.live import live_ones, make_live_plan
from qemu_vmdk_snap.domain.delete.plan import State, folders_of, make_intent
from qemu_vmdk_snap.domain.delete.preflight import check_live, check_work
from qemu_vmdk_snap.domain.delete.work import Deleted, deleted_by, work_of
from qemu_vmdk_snap.errors import VmdkSnapError

if TYPE_CHECKING:
    import libvirt


def preview(
    state: State, domain: libvirt.virDomain, names: Sequence[str], *, metadata: bool = False
) -> tuple[tuple[Deleted, ...], tuple[tuple[str, VmdkSnapError | OSError], ...]]:
    """Return what deleting the snapshots would do, in the order of the run, and which would be left, and why."""
    deleted: list[Deleted] = []
    live, failed = ([], []) if metadata else live_ones(state, names)
    if live:
        try:
            plan = make_live_plan(state, live)
            check_live(domain, plan)
        except (VmdkSnapError, OSError) as error:
            failed += [(name, error) for name in live]
        else:
            deleted += plan.deleted
            state = state.after(plan.intent)
    for name in names:
        if name in live or name in dict(failed):
            continue
        try:
            intent = make_intent(state, name, metadata=metadata)
            if not deleted and not metadata:  # the others can be checked only after this one is deleted
                check_work(state.name, work_of(intent), folders_of(intent))
        except (VmdkSnapError, OSError) as error:
            failed.append((name, error))
            continue
        deleted.append(deleted_by(intent))
        state = state.after(intent)
    return tuple(deleted), tuple(failed)
