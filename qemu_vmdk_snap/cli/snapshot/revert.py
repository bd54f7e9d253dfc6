"""`snapshot revert`: revert to a snapshot, in new overlays; the previous files are kept unless they are discarded."""

from __future__ import annotations

from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run, add_orphans
from qemu_vmdk_snap.cli.snapshot.report import disk_lines, show
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.revert.run import RevertReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("snapshotname", metavar="SNAPSHOT", nargs="?", help="name of the snapshot")
    parser.add_argument("--current", action="store_true", help="the current snapshot")
    state = parser.add_mutually_exclusive_group()
    for name, what in (
        ("running", "start the domain"),
        ("paused", "start the domain paused"),
        ("shutoff", "leave the domain shut off"),
    ):
        state.add_argument(
            f"--{name}", dest="after", action="store_const", const=name, default="as-saved", help=f"{what} afterwards"
        )
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
    """Revert and say what was done."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.dry_run import plan_revert
    from qemu_vmdk_snap.domain.registry import snapshot_info
    from qemu_vmdk_snap.domain.revert.run import revert

    if (args.snapshotname is None) is not args.current:
        raise InvalidRequest(f"domain {args.domain}", "needs either a snapshot or --current")
    if args.reset_nvram:
        way = "revert with --shutoff, and `virsh start --reset-nvram` creates the UEFI variables again"
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
    reverted = "would be reverted" if report.dry_run else "reverted"
    already = ["  nothing was written since: it is there already"] if report.already else []
    return [
        f"Domain {report.domain} {reverted} to snapshot {report.snapshot}, {report.state}",
        *already,
        *disk_lines(report.disks),
        *(f"  kept: {path}: belongs to no snapshot" for path in report.kept),
        *(f"  discarded: {path}" for path in report.discarded),
    ]
