"""`guest linux`: make the Linux guest of the distribution's packages, into the cache."""

from __future__ import annotations

from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `guest linux`."""
    parser.add_argument(
        "--kernel",
        choices=("cloud", "generic"),
        default="cloud",
        help="the distribution's kernel for clouds (default), or its usual one, which has a driver for AHCI",
    )
    parser.add_argument("--anew", action="store_true", help="make it again, of the newest packages")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Make it if need be, and say where it is."""
    from qemu_vmdk_snap.harness.linux.build import build_guest

    made = build_guest(args.kernel, anew=args.anew)
    if ui.json_output:
        ui.json({"kernel": str(made.kernel), "initrd": str(made.initrd), "key": made.key})
        return
    for path in (made.kernel, made.initrd):
        ui.text(f"{path}: {path.stat().st_size} bytes")
