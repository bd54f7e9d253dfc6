"""`recover`: finish what a killed command has left half done."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.cli.image.common import add_allow_dir, add_quiet
from qemu_vmdk_snap.cli.ui import Ui

if TYPE_CHECKING:
    from qemu_vmdk_snap.domain.journal.recover import Recovery as DomainRecovery


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `recover`."""
    add_quiet(parser)
    parser.add_argument(
        "-c",
        "--connect",
        metavar="URI",
        help="finish or undo the operations on snapshots of the domains of this libvirt connection",
    )
    parser.add_argument("--domains", action="store_true", help="the same for the default connection of libvirt")
    parser.add_argument(
        "--abandon",
        action="store_true",
        help="delete the record of the operation instead of finishing it; the images are not changed",
    )
    add_allow_dir(parser)
    parser.add_argument(
        "path", type=Path, nargs="*", help="an image, or a folder of images (default: this folder, unless domains are)"
    )


def _recover_domains(uri: str | None) -> list[DomainRecovery]:
    from qemu_vmdk_snap.domain.connect import connection
    from qemu_vmdk_snap.domain.journal.recover import recover

    with connection(uri) as conn:
        return recover(conn)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Finish every interrupted operation and name it."""
    from qemu_vmdk_snap.ops.journal.recover import SWEEP, give_up, recover

    with_domains = args.domains or args.connect is not None
    domains = _recover_domains(args.connect) if with_domains else []
    paths = args.path or ([] if with_domains else [Path()])
    if args.abandon:
        found = [one for path in paths for one in give_up(path)]
    else:
        found = [one for path in paths for one in recover(path, trusted_dirs=args.allow_dir)]
    if ui.json_output:
        images = [{"operation": one.operation, "image": str(one.image)} for one in found]
        ui.json(images + [one.as_dict() for one in domains])
        return
    for one in found:
        if args.abandon:
            ui.text(f"{one.image}: gave up the interrupted {one.operation}")
            for path in one.images:
                ui.text(f"  left as it is: {path}")
        elif one.operation == SWEEP:
            ui.text(f"{one.image}: removed, a killed command has left it")
        else:
            ui.text(f"{one.image}: finished the interrupted {one.operation}")
    for settled in domains:
        what = "finished" if settled.finished else "took back"
        ui.text(f"domain {settled.domain}: {what} the interrupted {settled.operation} of snapshot {settled.snapshot}")
        for path in settled.left:
            ui.text(f"  left in place: {path}")
    if not found and not domains:
        ui.text("Nothing to recover.")
