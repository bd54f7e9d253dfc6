"""`image measure`: how much space a new image would take."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.image.common import add_open_options, add_progress, open_disk, size_argument, split_options
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.line.plain import HIDDEN
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image measure`."""
    add_open_options(parser, raw=True)
    parser.add_argument(
        "-O", "--target-format", default="vmdk", metavar="FMT", help="format of the new image: vmdk (default) or raw"
    )
    parser.add_argument(
        "-o", "--options", action="append", default=[], metavar="NAME=VALUE,...", help="options of the new image"
    )
    parser.add_argument("--size", type=size_argument, metavar="SIZE", help="measure an empty disk of this size instead")
    parser.add_argument("-l", "--snapshot", metavar="SNAPSHOT", help=HIDDEN)
    add_progress(parser)
    parser.add_argument("filename", type=image_file, nargs="?", help="the image")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Show both sizes, with qemu-img's words or keys."""
    from qemu_vmdk_snap.cli.image.create import parse_options
    from qemu_vmdk_snap.ops.copy.measure import measure

    if args.snapshot is not None:
        raise Unsupported(args.filename or Path("-l"), "-l: a VMDK image has no internal snapshots")
    if (args.filename is None) == (args.size is None):
        raise InvalidRequest("measure", "needs either an image or --size")
    if args.target_format not in ("vmdk", "raw"):
        raise Unsupported(Path("-O"), f"format {args.target_format!r} is not supported: only vmdk and raw are")
    options = parse_options(split_options(args.options))
    if args.filename is None:
        sizes = measure(None, args.size, output_format=args.target_format, options=options)
    else:
        with open_disk(args.filename, args.format, args) as disk:
            sizes = measure(disk, 0, output_format=args.target_format, options=options, on_progress=ui.progress)
    if ui.json_output:
        ui.json(sizes.as_dict())
        return
    ui.text(f"required size: {sizes.required}")
    ui.text(f"fully allocated size: {sizes.fully_allocated}")
