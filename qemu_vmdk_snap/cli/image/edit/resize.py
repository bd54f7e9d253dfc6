"""`image resize`: make the disk of an image larger."""

from __future__ import annotations

import argparse
from pathlib import Path

from qemu_vmdk_snap.cli.image.common import add_allow_dir, add_orphan, add_progress, add_quiet, need_vmdk
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.units import parse_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image resize`."""
    parser.add_argument("-f", "--format", default="vmdk", metavar="FMT", help="format of the image: vmdk")
    add_quiet(parser)
    add_progress(parser)
    add_allow_dir(parser)
    add_orphan(parser)
    parser.add_argument("filename", type=Path, help="the image")
    parser.add_argument("size", metavar="[+]SIZE", help="the new size, or with + the number of bytes to add")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Resize and say so, in qemu-img's words."""
    from qemu_vmdk_snap.chain.resolver import confined
    from qemu_vmdk_snap.ops.edit.resize import resize

    need_vmdk(args.filename, args.format)
    report = resize(
        args.filename, _size(args), orphans=args.orphan, resolver=confined(args.allow_dir), on_progress=ui.progress
    )
    if ui.json_output:
        ui.json(report.as_dict())
        return
    ui.text("Image resized.")


def _size(args: argparse.Namespace) -> int:
    try:
        size = parse_size(args.size.lstrip("+"))
    except ValueError as error:
        raise InvalidRequest(args.filename, str(error)) from None
    if not args.size.startswith("+"):
        return size
    from qemu_vmdk_snap.chain.link import read_descriptor
    from qemu_vmdk_snap.storage.blockfile import PosixFile
    from qemu_vmdk_snap.units import sector_bytes

    file = PosixFile.open(args.filename)
    try:
        return sector_bytes(read_descriptor(file)[0].sectors) + size
    finally:
        file.close()
