"""`snapshot move`: move all files of a domain and its snapshots to another folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run, add_orphans
from qemu_vmdk_snap.cli.snapshot.report import show
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.move.run import MoveReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder for the files; it must be there")
    add_orphans(parser)
    add_dry_run(parser)
    parser.add_argument("-p", "--progress", action="store_true", help="show progress")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Move them, and say what is where."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.move.run import move

    with connection(args.connect) as conn:
        orphans = [path.absolute() for path in args.orphan]
        folder = args.folder.absolute()
        report = move(conn, args.domain, folder, orphans=orphans, dry_run=args.dry_run, on_progress=ui.progress)
    show(ui, report, report.as_dict(), _lines(report))


def _lines(report: MoveReport) -> Iterator[str]:
    if not report.files:
        yield f"Nothing to move: the files of domain {report.domain} are in {report.folder}"
    else:
        yield f"Domain {report.domain} {'would be moved' if report.dry_run else 'moved'} to {report.folder}"
    for file in report.files:
        how = "renamed" if file.mode == "rename" else f"copied, {format_size(file.size)}"
        yield f"  {file.source} -> {file.path} ({how})"
    for path, reason in report.kept:
        yield f"  {path} kept: it {reason}"
