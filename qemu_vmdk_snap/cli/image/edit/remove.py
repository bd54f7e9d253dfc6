"""`image remove`: delete an image; the images that it backs keep their contents."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.image.common import add_allow_dir, add_orphan, add_progress, add_quiet
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image remove`."""
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
    """Remove and show the new parent of the children."""
    from qemu_vmdk_snap.chain.resolver import confined
    from qemu_vmdk_snap.ops.edit.remove import remove

    report = remove(
        args.filename,
        children=args.child,
        orphans=args.orphan,
        resolver=confined(args.allow_dir),
        on_progress=ui.progress,
    )
    if ui.json_output:
        ui.json(report.as_dict())
        return
    for path in report.moved:
        ui.text(f"{path}: " + (f"its parent is now {report.parent}" if report.parent else "has no parent any more"))
    ui.text("Image removed.")
