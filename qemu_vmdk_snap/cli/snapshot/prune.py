"""`snapshot prune`: delete the snapshots that a policy does not keep."""

from __future__ import annotations

import time

from qemu_vmdk_snap.cli.snapshot.delete import deleted_lines
from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_orphans, tell_recovery, warn_pending
from qemu_vmdk_snap.cli.snapshot.report import pause_line
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.delete.prune import PruneReport

_RULES = {
    "last": "the N newest",
    "hourly": "the newest of each of the N latest hours that have a snapshot",
    "daily": "the newest of each of the N latest days",
    "weekly": "the newest of each of the N latest weeks",
    "monthly": "the newest of each of the N latest months",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    for rule, what in _RULES.items():
        parser.add_argument(f"--keep-{rule}", metavar="N", type=int, default=0, help=f"keep {what}")
    parser.add_argument("--explain", action="store_true", help="list every snapshot with the rules that keep it")
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="print every operation on files, and change nothing"
    )
    add_orphans(parser)
    parser.add_argument("-p", "--progress", action="store_true", help="show progress")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Prune, and say what was done."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.delete.prune import Retention, prune
    from qemu_vmdk_snap.domain.journal.pending import pending_line

    policy = Retention(**{rule: getattr(args, f"keep_{rule}") for rule in _RULES})
    with connection(args.connect) as conn:
        if args.dry_run:
            warn_pending(pending_line(conn, args.domain), ui)
        orphans = [path.absolute() for path in args.orphan]
        report = prune(conn, args.domain, policy, dry_run=args.dry_run, orphans=orphans, on_progress=ui.progress)
    tell_recovery(report.recovered, ui)
    for note in report.notes:
        ui.warn(f"domain {report.domain}: {note}")
    if ui.json_output:
        ui.json(report.as_dict())
    else:
        _show(report, args, ui)
    for name, error in report.failed[1:]:
        ui.warn(f"snapshot {name} was not deleted: {error}")
    if report.failed:
        ui.streams()  # the report has been printed, and names what failed
        raise report.failed[0][1]


def _show(report: PruneReport, args: argparse.Namespace, ui: Ui) -> None:
    if args.explain:
        _explain(report, ui)
    for line in deleted_lines(report.deleted, "would be deleted" if args.dry_run else "deleted"):
        ui.text(line)
    if report.pause is not None:
        ui.text(f"  {pause_line(report.pause)}")
    for name, reason in report.waiting:
        ui.text(f"Domain snapshot {name} waits until the guest is shut off: {reason}")
    for name, _error in report.failed:
        ui.text(f"Domain snapshot {name} {'cannot be' if args.dry_run else 'was not'} deleted")
    if not report.deleted and not report.failed and not report.waiting:
        ui.text("Nothing to delete.")


def _explain(report: PruneReport, ui: Ui) -> None:
    rows = []
    for one in report.decisions:
        created = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(one.creation_time))
        rows.append([one.name, created, ", ".join(one.reasons) or "-", "kept" if one.reasons else "deleted"])
    ui.table(["Name", "Creation Time", "Kept By", "Decision"], rows)
    ui.text()
