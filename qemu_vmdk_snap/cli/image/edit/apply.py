"""`image apply`: merge a delta of `image diff` into a copy of its base."""

from __future__ import annotations

from qemu_vmdk_snap.cli.image.common import add_allow_dir, add_orphan, add_progress, add_quiet
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image apply`."""
    parser.add_argument("--force", action="store_true", help="apply the delta even if its base has another CID")
    add_quiet(parser)
    add_progress(parser)
    add_allow_dir(parser)
    add_orphan(parser)
    parser.add_argument("delta", type=image_file, help="a delta of image diff")
    parser.add_argument("filename", type=image_file, help="the copy of the base, which is changed")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Merge and say so."""
    from qemu_vmdk_snap.chain.resolver import confined
    from qemu_vmdk_snap.ops.edit.apply import apply_delta

    find = confined(args.allow_dir)
    report = apply_delta(
        args.delta, args.filename, force=args.force, orphans=args.orphan, resolver=find, on_progress=ui.progress
    )
    if ui.json_output:
        ui.json(report.as_dict())
        return
    ui.text("Delta applied.")
