"""`snapshot dumpxml`: the XML of a snapshot, as libvirt keeps it."""

from __future__ import annotations

from qemu_vmdk_snap.cli.snapshot.options import add_domain, warn_pending
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)
    parser.add_argument("snapshotname", metavar="SNAPSHOT", help="name of the snapshot")
    parser.add_argument("--security-info", action="store_true", help="with passwords and other secrets")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print it."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.journal.pending import pending_line
    from qemu_vmdk_snap.domain.registry import snapshot_xml

    with connection(args.connect) as conn:
        warn_pending(pending_line(conn, args.domain), ui)
        text = snapshot_xml(conn, args.domain, args.snapshotname, secure=args.security_info)
    if ui.json_output:
        ui.json({"domain": args.domain, "snapshot": args.snapshotname, "xml": text})
        return
    for line in text.splitlines():
        ui.text(line)
