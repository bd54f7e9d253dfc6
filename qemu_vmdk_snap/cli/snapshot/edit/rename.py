"""`snapshot rename`: give a snapshot another name; files and tree stay."""

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
    parser.add_argument("newname", metavar="NEW-NAME", help="the new name")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Rename it."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.edit import rename

    with connection(args.connect) as conn:
        recovered = rename(conn, args.domain, args.snapshotname, args.newname)
    tell_recovery(recovered, ui)
    if ui.json_output:
        ui.json({"domain": args.domain, "snapshot": args.newname, "old-name": args.snapshotname})
        return
    ui.text(f"Domain snapshot {args.snapshotname} renamed to {args.newname}")
