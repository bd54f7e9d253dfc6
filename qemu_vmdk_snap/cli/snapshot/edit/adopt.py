"""`snapshot adopt`: register snapshots that VMware made, or that were made by hand."""

from __future__ import annotations

import time
from pathlib import Path

from qemu_vmdk_snap.cli.snapshot.options import add_domain, add_dry_run
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument(
        "--vmsd",
        type=Path,
        metavar="FILE",
        help="snapshot dictionary of VMware (default: the .vmsd file in the folder of the disks)",
    )
    add_dry_run(parser)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Adopt, and show what was adopted."""
    from qemu_vmdk_snap.domain.adopt.run import adopt
    from qemu_vmdk_snap.domain.connect import connection

    with connection(args.connect) as conn:
        report = adopt(conn, args.domain, vmsd=args.vmsd, dry_run=args.dry_run)
    if ui.json_output:
        ui.json(report.as_dict())
        return
    verb = "would be registered" if args.dry_run else "registered"
    for one in report.adopted:
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.creation_time))
        ui.text(f"Snapshot {one.name} of {created} {verb}" + (f", on {one.parent}" if one.parent else ""))
        for target, path in one.frozen.items():
            ui.text(f"  {target}: {path}")
    if report.spelt_out:
        named = "would name" if args.dry_run else "names now"
        ui.text(f"The XML {named} the whole chain of {', '.join(report.spelt_out)}")
    for name, reason in report.passed:
        ui.warn(f"domain {report.domain}: snapshot {name!r} of {report.vmsd} was left out: {reason}")
    if not report.adopted:
        ui.text("Nothing to adopt.")
