"""The snapshot after a guest's stop: in a process of its own, since the hook that starts it must not call libvirt."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.create.run import SnapshotReport, create_snapshot
from qemu_vmdk_snap.domain.registry import SnapshotInfo, list_snapshots

if TYPE_CHECKING:
    import libvirt

PREFIX: Final = "stop-"
"""The prefix of the names of these snapshots."""

_POLL: Final = 0.05
_log = logging.getLogger(__name__)


def wait_until_off(domain: libvirt.virDomain, run: int | None, seconds: float) -> str | None:
    """Return None when the domain is shut off after a run, or why no snapshot is taken now.

    `run` is the id that the run had; None for any. The hook is called a moment before libvirt reports the domain as
    shut off.

    Raises:
        DomainError: libvirt reports an error.
    """
    import libvirt

    ended = {
        libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
        libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED,
        libvirt.VIR_DOMAIN_SHUTOFF_CRASHED,
        libvirt.VIR_DOMAIN_SHUTOFF_DAEMON,
        libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN,  # the daemon was restarted since
    }
    deadline = time.monotonic() + seconds
    with libvirt_errors(domain.name(), "wait until it is shut off"):
        while domain.isActive():
            if run is not None and domain.ID() not in (run, -1):
                return "it was started again already"
            if time.monotonic() > deadline:
                return f"it still runs after {seconds:g} s"
            time.sleep(_POLL)
        if not domain.isPersistent():
            return "it is transient"
        reason = domain.state()[1]
    return None if reason in ended else "it was not stopped by a shutdown: it was saved, moved, or never started"


def snapshot_after_stop(
    conn: libvirt.virConnect, domain_name: str, run: int | None = None, seconds: float = 60.0
) -> SnapshotReport | str:
    """Wait until the domain is shut off, then snapshot it; return the report, or why there is none.

    Raises:
        VmdkSnapError, OSError: see `create_snapshot`.
    """
    domain = find_domain(conn, domain_name)
    why_not = wait_until_off(domain, run, seconds)
    _log.info("domain %s: snapshot after its stop: %s", domain_name, why_not or "yes")
    if why_not is not None:
        return why_not
    # After the existing ones, also if two stops are in one second: the names give the order.
    second = max([int(time.time()), *(snapshot.creation_time + 1 for snapshot in _ours(conn, domain_name))])
    name = f"{PREFIX}{second}"
    return create_snapshot(conn, domain_name, name, "taken after its guest had stopped")


def prune_after_stop(conn: libvirt.virConnect, domain_name: str, keep: Sequence[tuple[str, int]]) -> list[str]:
    """Delete the snapshots taken after a stop that no rule of `keep` keeps, and return their names.

    Snapshots of other names are neither counted nor deleted.

    Raises:
        VmdkSnapError, OSError: one could not be deleted, see `delete`; the others are gone.
    """
    from qemu_vmdk_snap.domain.delete.prune import Retention, decide
    from qemu_vmdk_snap.domain.delete.run import delete

    if not keep:
        return []
    rules = {rule.removeprefix("keep-"): count for rule, count in keep}
    ours = _ours(conn, domain_name)
    going = [decision.name for decision in decide(ours, Retention(**rules)) if not decision.reasons]
    _log.info("domain %s: %d snapshots after a stop, %s go", domain_name, len(ours), ", ".join(going) or "none")
    if going:
        report = delete(conn, domain_name, going, keep_going=True)
        if report.failed:
            raise report.failed[0][1]
    return going


def delete_waiting(
    conn: libvirt.virConnect, domain_name: str, run: int | None = None, seconds: float = 60.0
) -> list[str]:
    """Wait until the domain is shut off, then do the deletes that wait for that; return the names of what is gone.

    Raises:
        VmdkSnapError, OSError: one could not be deleted, see `delete`; the others are gone.
    """
    from qemu_vmdk_snap.domain.delete.run import delete
    from qemu_vmdk_snap.domain.delete.waiting import waiting

    domain = find_domain(conn, domain_name)
    if not waiting(domain) or wait_until_off(domain, run, seconds) is not None:
        return []
    report = delete(conn, domain_name, [], keep_going=True)
    if report.failed:
        raise report.failed[0][1]
    return [one.name for one in report.deleted]


def _ours(conn: libvirt.virConnect, domain_name: str) -> list[SnapshotInfo]:
    """Return the snapshots taken after a stop, each dated by the second in its name."""
    return [
        replace(snapshot, creation_time=int(second))
        for snapshot in list_snapshots(conn, domain_name)
        if (second := snapshot.name.removeprefix(PREFIX)) != snapshot.name and second.isdecimal()
    ]
