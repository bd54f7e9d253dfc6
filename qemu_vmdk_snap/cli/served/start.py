"""`serve start`: start the servers of a domain's disks, where no hook does it, or after they have died."""

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
    """Start them; a guest that the loss of one has paused goes on."""
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.served.commands import start_servers

    with connection(args.connect) as conn:
        started = start_servers(conn, args.domain)
    if ui.json_output:
        ui.json({"domain": args.domain, "started": started})
    else:
        ui.text(f"Serving {', '.join(started)}" if started else "Nothing to start: all of its served disks are served")
