"""`snapshot delete`: delete snapshots; the domain and every other snapshot keep their contents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qemu_vmdk_snap.cli.image.common import size_argument
from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run, add_orphans
from qemu_vmdk_snap.cli.snapshot.report import pause_line, show
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING, Any
from qemu_vmdk_snap.units import MIB

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.delete.run import DeleteReport
    from qemu_vmdk_snap.domain.delete.work import Deleted


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("snapshotname", metavar="SNAPSHOT", nargs="?", help="name of the snapshot")
    parser.add_argument("--current", action="store_true", help="the current snapshot")
    scope = parser.add_mutually_exclusive_group()
    for option, what in (("children", "the snapshot and its descendants"), ("children-only", "only its descendants")):
        scope.add_argument(
            f"--{option}", dest="scope", action="store_const", const=option, default="one", help=f"delete {what}"
        )
    parser.add_argument(
        "--metadata", action="store_true", help="only delete the metadata in libvirt; files are not changed"
    )
    parser.add_argument(
        "--bandwidth",
        type=_bandwidth,
        default=0,
        metavar="RATE",
        help="let the servers of a running guest's disks copy at most RATE a second: MiB, or with a suffix (512K)",
    )
    add_orphans(parser)
    add_dry_run(parser)
    parser.add_argument("-p", "--progress", action="store_true", help="show progress")


def _bandwidth(text: str) -> int:
    """Return bytes a second; a number without a suffix is MiB, as for `virsh blockcommit`."""
    rate = size_argument(text) * (MIB if text.isdecimal() else 1)
    if not rate:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError("must be more than 0 bytes a second")
    return rate


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Delete, and say what was done."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.delete.run import delete
    from qemu_vmdk_snap.domain.dry_run import plan_delete
    from qemu_vmdk_snap.domain.journal.pending import delete_of_current
    from qemu_vmdk_snap.domain.registry import snapshot_info

    if (args.snapshotname is None) is not args.current:
        raise InvalidRequest(f"domain {args.domain}", "needs either a snapshot or --current")
    with connection(args.connect) as conn:
        wanted: dict[str, Any] = {
            "scope": args.scope,
            "metadata": args.metadata,
            "orphans": [path.absolute() for path in args.orphan],
            "bandwidth": args.bandwidth,
        }
        if args.dry_run:
            name = args.snapshotname or snapshot_info(conn, args.domain).name
            report = plan_delete(conn, args.domain, name, **wanted)
        else:
            name = args.snapshotname or delete_of_current(conn, args.domain) or snapshot_info(conn, args.domain).name
            report = delete(conn, args.domain, name, keep_going=True, on_progress=ui.progress, **wanted)
    if report.deleted or not report.failed:
        show(ui, report, report.as_dict(), _lines(report))
    for name, error in report.failed[1:]:
        ui.warn(f"snapshot {name} was not deleted: {error}")
    if report.failed:
        if report.deleted:
            ui.streams()  # the report has been printed, and names what failed
        raise report.failed[0][1]


def _lines(report: DeleteReport) -> Iterator[str]:
    yield from deleted_lines(report.deleted, "would be deleted" if report.dry_run else "deleted")
    if report.pause is not None:
        yield f"  {pause_line(report.pause)}"


def deleted_lines(deleted: Iterable[Deleted], verb: str = "deleted") -> Iterator[str]:
    """Yield what was done to the files of each deleted snapshot."""
    for snapshot in deleted:
        yield f"Domain snapshot {snapshot.name} {verb}"
        for work in snapshot.work:
            yield from (f"  {work.target}: {line}" for line in work.lines())
