"""`image resize`: make the disk of an image larger, or smaller where its end is empty."""

from __future__ import annotations

from qemu_vmdk_snap.cli.image.common import add_allow_dir, add_orphan, add_progress, add_quiet, need_vmdk
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.light import TYPE_CHECKING
from qemu_vmdk_snap.units import parse_size

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image resize`."""
    parser.add_argument("-f", "--format", default="vmdk", metavar="FMT", help="format of the image: vmdk")
    parser.add_argument(
        "--shrink", action="store_true", help="allow a smaller size, where nothing is stored in what is cut off"
    )
    parser.add_argument("--preallocation", default="off", metavar="off", help="space set aside: none")
    add_quiet(parser)
    add_progress(parser)
    add_allow_dir(parser)
    add_orphan(parser)
    parser.add_argument("filename", type=image_file, help="the image")
    parser.add_argument("size", metavar="[+|-]SIZE", help="the new size, or with + or - the bytes to add or cut off")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Resize and say so, in qemu-img's words."""
    from qemu_vmdk_snap.chain.resolver import confined
    from qemu_vmdk_snap.ops.edit.resize import resize

    need_vmdk(args.filename, args.format)
    if args.preallocation != "off":
        feature = f"--preallocation={args.preallocation}: what is added to a VMDK image is never allocated before use"
        raise Unsupported(args.filename, feature)
    report = resize(
        args.filename,
        _size(args),
        shrink=args.shrink,
        orphans=args.orphan,
        resolver=confined(args.allow_dir),
        on_progress=ui.progress,
    )
    if ui.json_output:
        ui.json(report.as_dict())
        return
    ui.text("Image resized.")


def _size(args: argparse.Namespace) -> int:
    try:
        size = parse_size(args.size.removeprefix("+").removeprefix("-"))
    except ValueError as error:
        raise InvalidRequest(args.filename, str(error)) from None
    if not args.size.startswith(("+", "-")):
        return size
    from qemu_vmdk_snap.chain.link import read_descriptor
    from qemu_vmdk_snap.storage.blockfile import PosixFile
    from qemu_vmdk_snap.units import sector_bytes

    file = PosixFile.open(args.filename)
    try:
        before = sector_bytes(read_descriptor(file)[0].sectors)
        return before - size if args.size.startswith("-") else before + size
    finally:
        file.close()
