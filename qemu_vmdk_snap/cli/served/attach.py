"""`serve attach`: let disks of a shut-off domain be served from its next start on."""

from __future__ import annotations

from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run, tell_recovery
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.domain.attach.run import AttachReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("disk", metavar="DISK", nargs="*", help="disks, by target or file (default: every VMDK disk)")
    add_dry_run(parser)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Let the disks be served, and say which."""
    from qemu_vmdk_snap.domain.attach.run import attach
    from qemu_vmdk_snap.domain.connect import connection

    with connection(args.connect) as conn:
        report = attach(conn, args.domain, args.disk, dry_run=args.dry_run)
    tell_recovery(report.recovered, ui)
    if ui.json_output:
        ui.json(report.as_dict())
        return
    for line in lines(report):
        ui.text(line)


def lines(report: AttachReport) -> list[str]:
    """Return what was done, a line for each disk."""
    will = "would be" if report.dry_run else "is"
    found = [f"Disk {disk.target}: {disk.file} {will} served on {disk.socket}" for disk in report.disks]
    return found or ["Nothing to change: these disks are served already"]
