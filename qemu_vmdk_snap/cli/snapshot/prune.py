"""`snapshot prune`: delete the snapshots that a policy does not keep."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from qemu_vmdk_snap.cli.snapshot.delete import deleted_json, deleted_lines
from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_orphans, tell_recovery, warn_pending
from qemu_vmdk_snap.cli.ui import Ui

if TYPE_CHECKING:
    from qemu_vmdk_snap.domain.delete.prune import PruneReport

_RULES = {
    "last": "the N youngest",
    "hourly": "the youngest of each of the N latest hours that have one",
    "daily": "... days",
    "weekly": "... weeks",
    "monthly": "... months",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    for rule, what in _RULES.items():
        parser.add_argument(f"--keep-{rule}", metavar="N", type=int, default=0, help=f"keep {what}")
    parser.add_argument("--explain", action="store_true", help="say of every snapshot why it is kept, or that it goes")
    parser.add_argument("-n", "--dry-run", action="store_true", help="print every operation on files, and do nothing")
    add_orphans(parser)
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")


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
        ui.json(as_json(report, dry_run=args.dry_run))
    else:
        _show(report, args, ui)
    for name, error in report.failed[1:]:
        ui.warn(f"snapshot {name} was not deleted: {error}")
    if report.failed:
        raise report.failed[0][1]


def _show(report: PruneReport, args: argparse.Namespace, ui: Ui) -> None:
    if args.explain:
        _explain(report, ui)
    for line in deleted_lines(report.deleted, "would be deleted" if args.dry_run else "deleted"):
        ui.text(line)
    for name, _error in report.failed:
        ui.text(f"Domain snapshot {name} {'cannot be' if args.dry_run else 'was not'} deleted")
    if not report.deleted and not report.failed:
        ui.text("Nothing to delete.")


def as_json(report: PruneReport, *, dry_run: bool) -> dict[str, object]:
    """Return the report for programs."""
    return {
        "domain": report.domain,
        "dry-run": dry_run,
        "snapshots": [
            {"name": one.name, "creation-time": one.creation_time, "kept-by": list(one.reasons)}
            for one in report.decisions
        ],
        "deleted": [deleted_json(one) for one in report.deleted],
        "failed": [{"snapshot": name, "reason": str(error)} for name, error in report.failed],
    }


def _explain(report: PruneReport, ui: Ui) -> None:
    rows = []
    for one in report.decisions:
        created = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(one.creation_time))
        rows.append([one.name, created, ", ".join(one.reasons) or "-", "kept" if one.reasons else "goes"])
    ui.table(["Name", "Creation Time", "Kept By", "Decision"], rows)
    ui.text()
