"""`serve stop`: stop the servers of a domain's disks."""

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
    """Stop them; the domain must be shut off."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.served.commands import stop_servers

    with connection(args.connect) as conn:
        stopped = stop_servers(conn, args.domain)
    if ui.json_output:
        ui.json({"domain": args.domain, "stopped": stopped})
    else:
        ui.text(f"Stopped serving {', '.join(stopped)}" if stopped else "Nothing to stop: none of its disks is served")
