"""Which snapshots `snapshot list` shows, and in which order: virsh's filters, the oldest first."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_vmdk_snap.errors import InvalidRequest, NoSnapshot
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.registry import SnapshotInfo

_STATES = {
    "inactive": (("shutoff",), "of a domain that was shut off"),
    "active": (("running", "paused", "blocked"), "with the memory of a guest"),
    "disk_only": (("disk-snapshot",), "of the disks of a running guest"),
}


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the filters, which all must hold, and the order."""
    for option in ("--roots", "--no-parent"):
        parser.add_argument(option, dest="roots", action="store_true", help="only snapshots without a parent")
    parser.add_argument("--leaves", action="store_true", help="only snapshots without children")
    parser.add_argument("--no-leaves", action="store_true", help="only snapshots with children")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--from", dest="start", metavar="SNAPSHOT", help="only children of this snapshot")
    start.add_argument("--current", action="store_true", help="only children of the current snapshot")
    parser.add_argument("--descendants", action="store_true", help="with --from or --current: their children too")
    for name, (_, what) in _STATES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=f"only snapshots {what}")
    for location in ("internal", "external"):
        parser.add_argument(f"--{location}", action="store_true", help=f"only {location} snapshots")
    parser.add_argument("--metadata", action="store_true", help="only those that libvirt knows (always the case)")
    parser.add_argument("--no-metadata", action="store_true", help="only those that libvirt does not know (none)")
    parser.add_argument("--topological", action="store_true", help="each after its parent, whatever the clock said")


def choose(snapshots: Sequence[SnapshotInfo], args: argparse.Namespace) -> list[SnapshotInfo]:
    """Return the snapshots that are asked for, the oldest first; of a tree, in virsh's order.

    Raises:
        NoSnapshot: there is none of the name in `--from`.
        InvalidRequest: `--descendants` of nothing.
    """
    below = _below(snapshots, args)
    states = {state for name, (group, _) in _STATES.items() if getattr(args, name) for state in group}
    chosen = [
        one
        for one in snapshots
        if (below is None or one.name in below)
        and not (args.roots and one.parent is not None)
        and not (args.leaves and one.children)
        and not (args.no_leaves and not one.children)
        and not (states and one.state not in states)
        and not (args.internal != args.external and one.location != ("internal" if args.internal else "external"))
        and not args.no_metadata
    ]
    if args.tree:
        return chosen
    depths = {one.name: _depth(one, snapshots) for one in snapshots}
    if args.topological:
        return _after_parents(chosen)
    return sorted(chosen, key=lambda one: (one.creation_time, depths[one.name], one.name))


def _below(snapshots: Sequence[SnapshotInfo], args: argparse.Namespace) -> set[str] | None:
    """Return the names that `--from` and `--current` leave; None for all."""
    if args.start is None and not args.current:
        if args.descendants:
            raise InvalidRequest("--descendants", "of which snapshot: --from SNAPSHOT or --current")
        return None
    start = args.start
    if args.current:
        start = next((one.name for one in snapshots if one.current), None)
    elif start not in {one.name for one in snapshots}:
        raise NoSnapshot(args.domain or "-", f"has no snapshot {start!r}", snapshot=start)
    found = {one.name for one in snapshots if start is not None and one.parent == start}
    while args.descendants and (more := {one.name for one in snapshots if one.parent in found} - found):
        found |= more
    return found


def _depth(snapshot: SnapshotInfo, snapshots: Sequence[SnapshotInfo]) -> int:
    parents = {one.name: one.parent for one in snapshots}
    depth, name = 0, snapshot.parent
    while name in parents and depth <= len(parents):
        depth, name = depth + 1, parents[name]
    return depth


def _after_parents(snapshots: list[SnapshotInfo]) -> list[SnapshotInfo]:
    """Return each after its parent, and before the next tree; the oldest child first."""
    names = {one.name for one in snapshots}
    found: list[SnapshotInfo] = []

    def add(parent: str | None) -> None:
        children = [one for one in snapshots if (one.parent if one.parent in names else None) == parent]
        for one in sorted(children, key=lambda one: (one.creation_time, one.name)):
            if one not in found:
                found.append(one)
                add(one.name)

    add(None)
    return found
