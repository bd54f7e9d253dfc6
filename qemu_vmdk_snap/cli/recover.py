"""`recover`: finish what a killed command has left half done."""

from __future__ import annotations

import argparse
from pathlib import Path

from qemu_vmdk_snap.cli.image.common import add_quiet
from qemu_vmdk_snap.cli.ui import Ui


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `recover`."""
    add_quiet(parser)
    parser.add_argument(
        "path", type=Path, nargs="*", default=[Path()], help="an image, or a folder of images (default: this folder)"
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Finish every interrupted operation and name it."""
    from qemu_vmdk_snap.ops.recover import recover

    found = [recovery for path in args.path for recovery in recover(path)]
    if ui.json_output:
        ui.json([{"operation": one.operation, "image": str(one.image)} for one in found])
        return
    for one in found:
        ui.text(f"{one.image}: finished the interrupted {one.operation}")
    if not found:
        ui.text("Nothing to recover.")
