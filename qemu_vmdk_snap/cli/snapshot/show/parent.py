"""`snapshot parent`: the snapshot that another one was made on."""

from __future__ import annotations

from qemu_vmdk_snap.cli.snapshot.options import add_domain, warn_pending
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest, NoSnapshot
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("snapshotname", metavar="SNAPSHOT", nargs="?", help="name of the snapshot")
    parser.add_argument("--current", action="store_true", help="of the current snapshot")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print its name."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.journal.pending import pending_line
    from qemu_vmdk_snap.domain.registry import snapshot_info

    if (args.snapshotname is None) is not args.current:
        raise InvalidRequest(f"domain {args.domain}", "needs either a snapshot or --current")
    with connection(args.connect) as conn:
        warn_pending(pending_line(conn, args.domain), ui)
        child = snapshot_info(conn, args.domain, args.snapshotname)
        if child.parent is None:
            raise NoSnapshot(child.domain, f"snapshot {child.name!r} has no parent", snapshot=child.name)
        parent = snapshot_info(conn, args.domain, child.parent)
    if ui.json_output:
        ui.json(parent.as_dict())
        return
    ui.text(parent.name)
