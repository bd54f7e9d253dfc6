"""`image info`: what an image is, or every image of its chain."""

from __future__ import annotations

from qemu_vmdk_snap.cli.image.common import add_open_options, need_vmdk
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.ops.info import ImageInfo


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image info`."""
    add_open_options(parser, raw=True)
    parser.add_argument("--backing-chain", action="store_true", help="show every image of the chain, the top first")
    parser.add_argument("filename", type=image_file, help="the image")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Show what the image is, with qemu-img's words and JSON keys."""
    from qemu_vmdk_snap.ops.info import chain_info, image_info

    if args.format == "raw":
        _run_raw(args, ui)
        return
    need_vmdk(args.filename, args.format)
    lock = not args.force_share
    if args.backing_chain:
        images = chain_info(args.filename, trusted_dirs=args.allow_dir, lock=lock, allow_devices=args.allow_devices)
    else:
        images = [image_info(args.filename, trusted_dirs=args.allow_dir, lock=lock, allow_devices=args.allow_devices)]
    for image in images:
        for note in image.notes:
            ui.warn(note)
    if ui.json_output:
        values = [image.as_dict() for image in images]
        ui.json(values if args.backing_chain else values[0])
        return
    for i, image in enumerate(images):
        if i:
            ui.text()
        for line in _as_text(image):
            ui.text(line)


def _run_raw(args: argparse.Namespace, ui: Ui) -> None:
    from qemu_vmdk_snap.ops.info import raw_info

    image = raw_info(args.filename, lock=not args.force_share, allow_devices=args.allow_devices)
    if ui.json_output:
        ui.json([image.as_dict()] if args.backing_chain else image.as_dict())
        return
    ui.text(f"image: {image.path}")
    ui.text("file format: raw")
    ui.text(f"virtual size: {format_size(image.virtual_size)} ({image.virtual_size} bytes)")
    ui.text(f"disk size: {format_size(image.actual_size)}")


def _as_text(image: ImageInfo) -> list[str]:
    lines = [
        f"image: {image.path}",
        "file format: vmdk",
        f"virtual size: {format_size(image.virtual_size)} ({image.virtual_size} bytes)",
        f"disk size: {format_size(image.actual_size)}",
    ]
    if image.grain_bytes:
        lines.append(f"cluster_size: {image.grain_bytes}")
    if image.hint is not None:
        missing = "" if image.parent else " (not found, or not in a folder that may be opened)"
        actual = f" (actual path: {image.parent})" if image.parent and str(image.parent) != image.hint else missing
        lines += [f"backing file: {image.hint}{actual}", "backing file format: vmdk"]
    lines += [
        "Format specific information:",
        f"    cid: {image.cid:08x}",
        f"    parent cid: {image.parent_cid:08x}",
        f"    create type: {image.create_type}",
        "    extents:",
    ]
    for i, extent in enumerate(image.extents):
        lines.append(f"        [{i}]:")
        if extent.compressed:
            lines.append("            compressed: true")
        lines.append(f"            virtual size: {extent.virtual_size}")
        lines.append(f"            filename: {extent.path or '(none)'}")
        if extent.grain_bytes:
            lines.append(f"            cluster size: {extent.grain_bytes}")
        lines.append(f"            format: {extent.type}")
    return lines
