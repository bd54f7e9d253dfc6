"""Which snapshots a policy keeps, and deleting the others.

Each rule keeps on its own, and a snapshot goes only when none keeps it: `last` the N youngest; `hourly`, `daily`,
`weekly` and `monthly` the youngest of each of the N latest hours, days, ISO weeks or months that have one (local
time).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from qemu_vmdk_snap import OnProgress, ignore
from qemu_vmdk_snap.domain.connect import find_domain
from qemu_vmdk_snap.domain.delete.plan import Deleted, State, chosen, preview
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.journal.recover import Recovery, recover_by_name
from qemu_vmdk_snap.domain.registry import SnapshotInfo, list_snapshots
from qemu_vmdk_snap.errors import InvalidRequest

if TYPE_CHECKING:
    import libvirt

_PERIODS: Final[dict[str, Callable[[time.struct_time], tuple[int, ...]]]] = {
    "hourly": lambda t: t[:4],
    "daily": lambda t: t[:3],
    "weekly": lambda t: (int(time.strftime("%G", t)), int(time.strftime("%V", t))),
    "monthly": lambda t: t[:2],
}


@dataclass(frozen=True, slots=True)
class Policy:
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


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune did, or would do."""

    domain: str
    decisions: tuple[Decision, ...]
    """Every snapshot, the youngest first."""
    deleted: tuple[Deleted, ...]
    recovered: Recovery | None
    notes: tuple[str, ...] = ()
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
            "snapshots": [
                {"name": one.name, "creation-time": one.creation_time, "kept-by": list(one.reasons)}
                for one in self.decisions
            ],
            "deleted": [one.as_dict() for one in self.deleted],
        }


def decide(snapshots: Sequence[SnapshotInfo], policy: Policy) -> list[Decision]:
    """Return what becomes of each snapshot, the youngest first; one that holds more than disks is always kept.

    Raises:
        InvalidRequest: the policy keeps nothing at all, or a number is negative.
    """
    counts = {"last": policy.last, **{name: getattr(policy, name) for name in _PERIODS}}
    if min(counts.values()) < 0:
        raise InvalidRequest("policy", "no number may be negative")
    if not any(counts.values()):
        raise InvalidRequest("policy", "would keep nothing: give at least one of --keep-last, -hourly, -daily, ...")
    # Two of one second: a child is younger than its parent.
    youngest = sorted(snapshots, key=lambda one: (-one.creation_time, -_generation(one, snapshots), one.name))
    reasons: dict[str, list[str]] = {one.name: [] for one in youngest}
    for one in youngest[: policy.last]:
        reasons[one.name].append("last")
    for rule, period in _PERIODS.items():
        seen: list[tuple[int, ...]] = []
        for one in youngest:
            when = period(time.localtime(one.creation_time))
            if when not in seen and len(seen) < counts[rule]:
                seen.append(when)
                reasons[one.name].append(rule)
    for one in youngest:
        if one.memory != "no" or one.location != "external":
            reasons[one.name].append("is no external snapshot of disks alone")
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
    policy: Policy,
    *,
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> PruneReport:
    """Delete the snapshots that the policy does not keep; with `dry_run` only tell every operation.

    Raises:
        InvalidRequest: the policy cannot be.
        DomainError, VmdkSnapError, OSError: see `delete`; those deleted before are gone.
    """
    domain = find_domain(conn, domain_name)
    recovered = recover_by_name(conn, domain_name)
    decisions = decide(list_snapshots(conn, domain_name), policy)
    going = [decision.name for decision in decisions if not decision.reasons]
    notes: tuple[str, ...] = ()
    if dry_run or not going:
        deleted = tuple(preview(State.read(conn, domain), chosen(domain, going, "one"))) if going else ()
    else:
        report = delete(conn, domain_name, going, on_progress=on_progress)
        deleted, notes = report.deleted, report.notes
    return PruneReport(domain.name(), tuple(decisions), deleted, recovered, notes, dry_run=dry_run)
