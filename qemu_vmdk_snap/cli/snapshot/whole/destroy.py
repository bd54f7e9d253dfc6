"""`snapshot destroy`: undefine a domain, and delete every file that is its alone."""

from __future__ import annotations

from collections.abc import Iterator

from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run, add_orphans
from qemu_vmdk_snap.cli.snapshot.report import show
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.destroy.run import DestroyReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument(
        "--storage",
        action="store_true",
        help="delete the files that belong to the domain only (without it: virsh undefine --snapshots-metadata)",
    )
    add_orphans(parser)
    add_dry_run(parser)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Destroy it, and say what is gone and what stays."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.destroy.run import destroy

    if not args.storage:
        reason = "give --storage to delete its files; `virsh undefine --snapshots-metadata` undefines it and keeps them"
        raise InvalidRequest(f"domain {args.domain}", reason)
    with connection(args.connect) as conn:
        orphans = [path.absolute() for path in args.orphan]
        report = destroy(conn, args.domain, orphans=orphans, dry_run=args.dry_run)
    show(ui, report, report.as_dict(), _lines(report))


def _lines(report: DestroyReport) -> Iterator[str]:
    would = "would be " if report.dry_run else ""
    yield f"Domain {report.domain} {would}undefined" + (
        f", with {len(report.snapshots)} snapshots" if report.snapshots else ""
    )
    for path, size in report.deleted:
        yield f"  {path} {would}deleted ({format_size(size)})"
    for path, reason in report.kept:
        yield f"  {path} kept: it {reason}"
