"""`snapshot revert`: go back to a snapshot, in new overlays; what the domain had is kept unless it is discarded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run, add_orphans
from qemu_vmdk_snap.cli.snapshot.report import disk_lines, show
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest

if TYPE_CHECKING:
    from qemu_vmdk_snap.domain.revert.run import RevertReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("snapshotname", metavar="SNAPSHOT", nargs="?", help="name of the snapshot")
    parser.add_argument("--current", action="store_true", help="the current snapshot")
    state = parser.add_mutually_exclusive_group()
    for name, what in (("running", "start"), ("paused", "start, without running,"), ("shutoff", "leave")):
        line = f"{what} the domain afterwards" if name != "shutoff" else "leave the domain shut off (as disks alone do)"
        state.add_argument(f"--{name}", dest="after", action="store_const", const=name, default="as-saved", help=line)
    parser.add_argument(
        "--discard",
        action="store_true",
        help="delete what was written since the last snapshot (default: the file is kept)",
    )
    parser.add_argument("--force", action="store_true", help="accepted: no revert here needs it")
    parser.add_argument("--reset-nvram", action="store_true", help="not possible: says what is")
    add_orphans(parser)
    add_dry_run(parser)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Go back and say what was done."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.dry_run import plan_revert
    from qemu_vmdk_snap.domain.registry import snapshot_info
    from qemu_vmdk_snap.domain.revert.run import revert

    if (args.snapshotname is None) is not args.current:
        raise InvalidRequest(f"domain {args.domain}", "name a snapshot, or say --current, one of them")
    if args.reset_nvram:
        way = "revert with --shutoff, and `virsh start --reset-nvram` makes the UEFI variables anew"
        raise InvalidRequest("--reset-nvram", way)
    with connection(args.connect) as conn:
        name = args.snapshotname or snapshot_info(conn, args.domain).name
        if args.dry_run:
            report = plan_revert(conn, args.domain, name, after=args.after, discard=args.discard)
        else:
            orphans = [path.absolute() for path in args.orphan]
            report = revert(conn, args.domain, name, after=args.after, discard=args.discard, orphans=orphans)
    show(ui, report, report.as_dict(), _lines(report))


def _lines(report: RevertReport) -> list[str]:
    is_back = "would be back" if report.dry_run else "is back"
    already = ["  nothing was written since: it is there already"] if report.already else []
    return [
        f"Domain {report.domain} {is_back} at snapshot {report.snapshot}, {report.state}",
        *already,
        *disk_lines(report.disks),
        *(f"  kept: {path}: no snapshot has it" for path in report.kept),
        *(f"  discarded: {path}" for path in report.discarded),
    ]
