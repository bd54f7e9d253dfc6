"""`image compact`: free the space of leaked grains and of zeros."""

from __future__ import annotations

from qemu_vmdk_snap.cli.image.common import add_allow_dir, add_progress, add_quiet, need_vmdk
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image compact`."""
    parser.add_argument("-f", "--format", default="vmdk", metavar="FMT", help="format of the image: vmdk")
    add_quiet(parser)
    add_progress(parser)
    add_allow_dir(parser)
    parser.add_argument("filename", type=image_file, help="the image")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Compact and show how much was freed."""
    from qemu_vmdk_snap.chain.resolver import confined
    from qemu_vmdk_snap.ops.edit.compact import compact

    need_vmdk(args.filename, args.format)
    report = compact(args.filename, resolver=confined(args.allow_dir), on_progress=ui.progress)
    if ui.json_output:
        ui.json(report.as_dict())
        return
    saved = report.before - report.after
    ui.text(f"Image compacted: {format_size(saved)} freed." if saved else "Nothing to free.")
