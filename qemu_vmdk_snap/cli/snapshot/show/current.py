"""`snapshot current`: the snapshot of which the next one will be a child."""

from __future__ import annotations

from qemu_vmdk_snap.cli.snapshot.options import add_domain, tell_recovery, warn_pending
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("snapshotname", metavar="SNAPSHOT", nargs="?", help="make this snapshot the current one")
    parser.add_argument(
        "--name", action="store_true", help="print only the name (always the case without --output=json)"
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Show or change it."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.edit import set_current
    from qemu_vmdk_snap.domain.journal.pending import pending_line
    from qemu_vmdk_snap.domain.registry import snapshot_info

    with connection(args.connect) as conn:
        if args.snapshotname is not None:
            tell_recovery(set_current(conn, args.domain, args.snapshotname), ui)
        else:
            warn_pending(pending_line(conn, args.domain), ui)
        info = snapshot_info(conn, args.domain)
    if ui.json_output:
        ui.json(info.as_dict())
        return
    ui.text(info.name)
