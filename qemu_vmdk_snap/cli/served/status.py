"""`serve status`: the served disks of a domain, and how their servers are."""

from __future__ import annotations

from qemu_vmdk_snap.cli.snapshot.options import add_domain
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_domain(parser)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Show them."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.served.commands import served_status

    with connection(args.connect) as conn:
        found = served_status(conn, args.domain)
    if ui.json_output:
        ui.json([one.as_dict() for one in found])
        return
    rows = [
        [one.target, str(one.file), "-" if one.server is None else str(one.server.get("pid")), one.state]
        for one in found
    ]
    ui.table(["Target", "File", "Server", "State"], rows)
