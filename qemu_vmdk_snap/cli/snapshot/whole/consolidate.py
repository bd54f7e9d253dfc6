"""`snapshot consolidate`: merge the links of a domain's chains that no snapshot has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run, add_orphans
from qemu_vmdk_snap.cli.snapshot.report import show
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.consolidate.run import ConsolidateReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument(
        "--include",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="merge this link too, whose overlay's name is not derived from it (may be repeated)",
    )
    add_orphans(parser)
    add_dry_run(parser)
    parser.add_argument("-p", "--progress", action="store_true", help="show progress")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Merge them, and say what was merged and what stays."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.consolidate.run import consolidate

    include, orphans = ([path.absolute() for path in paths] for paths in (args.include, args.orphan))
    with connection(args.connect) as conn:
        report = consolidate(
            conn, args.domain, include=include, orphans=orphans, dry_run=args.dry_run, on_progress=ui.progress
        )
    show(ui, report, report.as_dict(), _lines(report))


def _lines(report: ConsolidateReport) -> Iterator[str]:
    for one in report.merged:
        yield f"Leftover {one.path} {'would be merged' if report.dry_run else 'merged'}"
        yield from (f"  {one.target}: {line}" for line in one.operations)
    if not report.merged:
        yield f"Domain {report.domain} needs no consolidation"
    for path, reason in report.kept:
        yield f"  {path} kept: {reason}"
    for path in report.orphans:
        yield f"  {path} is in no chain: `doctor {report.domain}` says what it is"
