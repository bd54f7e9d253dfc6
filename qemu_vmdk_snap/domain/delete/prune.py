"""Which snapshots a policy keeps, and deleting the others.

Each rule keeps on its own, and a snapshot goes only when none keeps it: `last` the N youngest; `hourly`, `daily`,
`weekly` and `monthly` the youngest of each of the N latest hours, days, ISO weeks or months that have one (local
time).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from qemu_vmdk_snap import OnProgress, ignore
from qemu_vmdk_snap.domain.connect import find_domain
from qemu_vmdk_snap.domain.delete import waiting
from qemu_vmdk_snap.domain.delete.plan import State, chosen
from qemu_vmdk_snap.domain.delete.preview import preview
from qemu_vmdk_snap.domain.delete.run import delete, failed_as_dicts
from qemu_vmdk_snap.domain.delete.work import Deleted
from qemu_vmdk_snap.domain.journal.recover import Recovery, recover_by_name
from qemu_vmdk_snap.domain.qemu.switch import Pause
from qemu_vmdk_snap.domain.registry import SnapshotInfo, list_snapshots
from qemu_vmdk_snap.errors import InvalidRequest, NotWhileRunning, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_PERIODS: Final[dict[str, Callable[[time.struct_time], tuple[int, ...]]]] = {
    "hourly": lambda t: t[:4],
    "daily": lambda t: t[:3],
    "weekly": lambda t: (int(time.strftime("%G", t)), int(time.strftime("%V", t))),
    "monthly": lambda t: t[:2],
}


@dataclass(frozen=True, slots=True)
class Retention:
    """How many of each are kept."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0


class Decision(NamedTuple):
    """What becomes of one snapshot."""

    name: str
    creation_time: int
    reasons: tuple[str, ...]
    """Why it is kept; empty where it goes."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"name": self.name, "creation-time": self.creation_time, "kept-by": list(self.reasons)}


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune did, or would do."""

    domain: str
    decisions: tuple[Decision, ...]
    """Every snapshot, the youngest first."""
    deleted: tuple[Deleted, ...]
    recovered: Recovery | None
    notes: tuple[str, ...] = ()
    failed: tuple[tuple[str, VmdkSnapError | OSError], ...] = ()
    """Snapshots that were to go and are as they were, and why."""
    waiting: tuple[tuple[str, str], ...] = ()
    """Snapshots that go once the guest is shut off, and why not now: that is noted."""
    pause: Pause | None = None
    """How long a running guest was stopped; None if it was not."""
    dry_run: bool = False
    """Whether this is only what would be done."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return bool(self.deleted) and not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `snapshot prune --output=json` shows it."""
        return {
            "domain": self.domain,
            "dry-run": self.dry_run,
            "snapshots": [one.as_dict() for one in self.decisions],
            "deleted": [one.as_dict() for one in self.deleted],
            "failed": failed_as_dicts(self.failed),
            "waiting": [{"snapshot": name, "reason": reason} for name, reason in self.waiting],
        } | ({} if self.pause is None else {"pause": self.pause.as_dict()})


def decide(snapshots: Sequence[SnapshotInfo], retention: Retention) -> list[Decision]:
    """Return what becomes of each snapshot, the youngest first; one that holds more than disks is always kept.

    Raises:
        InvalidRequest: the policy keeps nothing at all, or a number is negative.
    """
    counts = {"last": retention.last, **{name: getattr(retention, name) for name in _PERIODS}}
    if min(counts.values()) < 0:
        raise InvalidRequest("policy", "no number may be negative")
    if not any(counts.values()):
        raise InvalidRequest("policy", "would keep nothing: give at least one of --keep-last, -hourly, -daily, ...")
    # Two of one second: a child is younger than its parent.
    youngest = sorted(snapshots, key=lambda one: (-one.creation_time, -_generation(one, snapshots), one.name))
    reasons: dict[str, list[str]] = {one.name: [] for one in youngest}
    counted = [one for one in youngest if one.foreign is None]  # what virsh made takes nobody's place
    for one in counted[: retention.last]:
        reasons[one.name].append("last")
    for rule, period in _PERIODS.items():
        seen: list[tuple[int, ...]] = []
        for one in counted:
            when = period(time.localtime(one.creation_time))
            if when not in seen and len(seen) < counts[rule]:
                seen.append(when)
                reasons[one.name].append(rule)
    for one in youngest:
        if one.memory != "no" or one.location != "external":
            reasons[one.name].append("is not an external snapshot of disks only")
        elif one.foreign is not None:
            reasons[one.name].append(f"was not made here ({one.foreign})")
    return [Decision(one.name, one.creation_time, tuple(reasons[one.name])) for one in youngest]


def _generation(snapshot: SnapshotInfo, snapshots: Sequence[SnapshotInfo]) -> int:
    parents = {one.name: one.parent for one in snapshots}
    generation, name = 0, snapshot.parent
    while name in parents and generation <= len(parents):
        generation, name = generation + 1, parents[name]
    return generation


def prune(
    conn: libvirt.virConnect,
    domain_name: str,
    retention: Retention,
    *,
    dry_run: bool = False,
    orphans: Sequence[Path] = (),
    on_progress: OnProgress = ignore,
) -> PruneReport:
    """Delete the snapshots that the policy does not keep; with `dry_run` only report every operation.

    One that cannot be deleted is left as it was, and reported; the others are deleted. One that cannot be while the
    guest runs is noted, and goes with the next delete or prune while the domain is shut off. `orphans`: see `delete`.

    Raises:
        InvalidRequest: the policy cannot be.
        DomainError: there is no such domain, or libvirt refuses.
    """
    domain = find_domain(conn, domain_name)
    recovered = None if dry_run else recover_by_name(conn, domain_name)
    decisions = decide(list_snapshots(conn, domain_name), retention)
    going = [decision.name for decision in decisions if not decision.reasons]
    notes: tuple[str, ...] = ()
    failed: tuple[tuple[str, VmdkSnapError | OSError], ...] = ()
    pause: Pause | None = None
    deleted: tuple[Deleted, ...] = ()
    if dry_run:
        deleted, failed = preview(State.read(conn, domain, orphans), domain, chosen(domain, going, "one"))
    elif going or waiting.waiting(domain):
        report = delete(conn, domain_name, going, orphans=orphans, keep_going=True, on_progress=on_progress)
        deleted, notes, failed, pause = report.deleted, report.notes, report.failed, report.pause
    later = tuple((name, str(error)) for name, error in failed if isinstance(error, NotWhileRunning))
    failed = tuple((name, error) for name, error in failed if not isinstance(error, NotWhileRunning))
    return PruneReport(
        domain.name(), tuple(decisions), deleted, recovered, notes, failed, later, pause, dry_run=dry_run
    )
