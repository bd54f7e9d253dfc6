"""`snapshot info`: one snapshot, its disks, and whether its files are still there."""

from __future__ import annotations

from qemu_vmdk_snap.cli.snapshot.options import add_domain, warn_pending
from qemu_vmdk_snap.cli.ui import Ui, keyed
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.registry import DiskState, SnapshotInfo


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("snapshotname", metavar="SNAPSHOT", nargs="?", help="name of the snapshot")
    parser.add_argument("--current", action="store_true", help="the current snapshot")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Show the snapshot."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.journal.pending import pending_line
    from qemu_vmdk_snap.domain.registry import snapshot_info

    if (args.snapshotname is None) is not args.current:
        raise InvalidRequest(f"domain {args.domain}", "needs either a snapshot or --current")
    with connection(args.connect) as conn:
        warn_pending(pending_line(conn, args.domain), ui)
        snapshot = snapshot_info(conn, args.domain, args.snapshotname)
    if ui.json_output:
        ui.json(snapshot.as_dict())
        return
    for line in keyed(_fields(snapshot)):
        ui.text(line)
    for disk in snapshot.disks:
        for line in _disk_lines(disk):
            ui.text(line)


def _fields(snapshot: SnapshotInfo) -> dict[str, object]:
    """Return what virsh's snapshot-info shows, in its order; our own lines follow."""
    fields: dict[str, object] = {
        "Name": snapshot.name,
        "Domain": snapshot.domain,
        "Current": "yes" if snapshot.current else "no",
        "State": snapshot.state,
        "Location": snapshot.location,
        "Parent": snapshot.parent or "-",
        "Children": len(snapshot.children),
        "Descendants": snapshot.descendants,
        "Metadata": "yes",
    }
    if snapshot.memory_file is not None:
        fields["Memory"] = snapshot.memory_file
    if snapshot.foreign:
        fields["Foreign"] = f"{snapshot.foreign}: virsh reverts to it and deletes it"
    if snapshot.description:
        fields["Description"] = " ".join(snapshot.description.split())
    return fields


def _disk_lines(disk: DiskState) -> list[str]:
    if disk.mode != "external":
        return [f"Disk {disk.target}: snapshot {disk.mode}"]
    depth = "" if disk.depth is None else f", chain of {disk.depth}"
    lines = [
        f"Disk {disk.target}: frozen {disk.frozen} ({_size(disk.frozen_bytes)}{depth})",
        f"  overlay: {disk.overlay} ({_size(disk.overlay_bytes)})",
    ]
    return lines + ([f"  problem: {disk.problem}"] if disk.problem else [])


def _size(allocated: int | None) -> str:
    return "missing" if allocated is None else format_size(allocated)
