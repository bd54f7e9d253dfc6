"""`image commit`: merge an image into one below it."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.image.common import (
    add_allow_dir,
    add_cache,
    add_orphan,
    add_progress,
    add_quiet,
    add_rate_limit,
    as_seen_from,
    need_vmdk,
)
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image commit`."""
    parser.add_argument("-f", "--format", default="vmdk", metavar="FMT", help="format of the image: vmdk")
    add_cache(parser, "-t", "--cache", "accepted, without effect")
    add_rate_limit(parser)
    parser.add_argument(
        "-b",
        "--base",
        metavar="BASE",
        help="the image to merge into, relative to the folder of the image (default: its parent)",
    )
    parser.add_argument(
        "-d",
        "--delete",
        action="store_true",
        help="delete the image and those between it and the base instead of emptying it; its children are rebased",
    )
    parser.add_argument(
        "--keep-siblings",
        action="store_true",
        help="copy data first, so that other children of the base keep their contents",
    )
    parser.add_argument(
        "--child",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a child of the image in another folder (may be repeated)",
    )
    add_quiet(parser)
    add_progress(parser)
    add_allow_dir(parser)
    add_orphan(parser)
    parser.add_argument("filename", type=image_file, help="the image")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Merge and say so, in qemu-img's words."""
    from qemu_vmdk_snap.chain.resolver import confined
    from qemu_vmdk_snap.ops.edit.commit import commit

    need_vmdk(args.filename, args.format)
    report = commit(
        args.filename,
        base=None if args.base is None else as_seen_from(args.filename, args.base),
        delete=args.delete,
        keep_siblings=args.keep_siblings,
        children=args.child,
        orphans=args.orphan,
        resolver=confined(args.allow_dir),
        rate_limit=args.rate_limit,
        on_progress=ui.progress,
    )
    if ui.json_output:
        ui.json(report.as_dict())
        return
    for path in report.relinked:
        ui.text(f"{path}: its parent is now {report.base}")
    for path in report.deleted:
        ui.text(f"{path}: deleted")
    ui.text("Image committed.")
