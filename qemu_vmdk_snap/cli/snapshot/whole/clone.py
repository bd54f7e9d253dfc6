"""`snapshot clone`: a new domain that shows what a snapshot holds, or what the domain has now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run
from qemu_vmdk_snap.cli.snapshot.report import show
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.clone.run import CloneReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("snapshotname", metavar="SNAPSHOT", nargs="?", help="name of the snapshot (default: as it is)")
    parser.add_argument("newname", metavar="NEW", help="name of the new domain")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--linked",
        dest="mode",
        action="store_const",
        const="linked",
        help="overlays on the frozen files, which the original then keeps (default with a snapshot)",
    )
    kind.add_argument(
        "--full", dest="mode", action="store_const", const="full", help="copies (default without a snapshot)"
    )
    parser.add_argument("--dir", type=Path, metavar="DIR", help="folder of the new files (default: beside the others)")
    add_dry_run(parser)
    parser.add_argument("-p", "--progress", action="store_true", help="show progress")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Clone, and say what was made."""
    from qemu_vmdk_snap.domain.clone.run import clone
    from qemu_vmdk_snap.domain.connect import connection

    with connection(args.connect) as conn:
        report = clone(
            conn,
            args.domain,
            args.snapshotname,
            args.newname,
            mode=args.mode,
            folder=None if args.dir is None else args.dir.absolute(),
            dry_run=args.dry_run,
            on_progress=ui.progress,
        )
    show(ui, report, report.as_dict(), _lines(report))


def _lines(report: CloneReport) -> Iterator[str]:
    of = report.domain if report.snapshot is None else f"snapshot {report.snapshot} of {report.domain}"
    verb = "would be made" if report.dry_run else "made"
    yield f"Domain {report.clone} {verb}: a {report.mode} clone of {of}"
    for disk in report.disks:
        how = "an overlay on" if report.mode == "linked" else f"a copy ({disk.size} bytes) of"
        yield f"  {disk.target}: {disk.path}, {how} {disk.source}"
    if report.nvram is not None:
        yield f"  UEFI variables: {report.nvram}"
