"""`snapshot describe`: give a snapshot another description."""

from __future__ import annotations

from qemu_vmdk_snap.cli.snapshot.options import add_domain, tell_recovery
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("snapshotname", metavar="SNAPSHOT", help="name of the snapshot")
    parser.add_argument("description", metavar="TEXT", nargs="?", help="the new description (default: remove it)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Change it."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.edit import describe

    with connection(args.connect) as conn:
        recovered = describe(conn, args.domain, args.snapshotname, args.description)
    tell_recovery(recovered, ui)
    if ui.json_output:
        ui.json({"domain": args.domain, "snapshot": args.snapshotname, "description": args.description})
        return
    ui.text(f"Description of domain snapshot {args.snapshotname} {'changed' if args.description else 'removed'}")
