"""`image rebase`: change the parent of an image, or with `-b ""` remove it."""

from __future__ import annotations

from qemu_vmdk_snap.cli.image.common import add_allow_dir, add_cache, add_progress, add_quiet, as_seen_from, need_vmdk
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.line.plain import HIDDEN
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image rebase`."""
    parser.add_argument("-f", "--format", default="vmdk", metavar="FMT", help="format of the image: vmdk")
    parser.add_argument("-F", "--backing-format", default="vmdk", metavar="FMT", help="format of the parent: vmdk")
    add_cache(parser, "-t", "--cache", "accepted, without effect")
    add_cache(parser, "-T", "--src-cache", "accepted, without effect")
    parser.add_argument("-U", "--force-share", action="store_true", help=HIDDEN)
    parser.add_argument(
        "-u", "--unsafe", action="store_true", help="only change the name of the parent: no data is copied"
    )
    parser.add_argument(
        "-b",
        "--backing",
        required=True,
        metavar="PARENT",
        help='the new parent, relative to the folder of the image; "" for none (flatten)',
    )
    add_quiet(parser)
    add_progress(parser)
    add_allow_dir(parser)
    parser.add_argument("filename", type=image_file, help="the image")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Rebase; silent on success, as qemu-img is."""
    from qemu_vmdk_snap.chain.resolver import confined
    from qemu_vmdk_snap.ops.edit.rebase import rebase

    need_vmdk(args.filename, args.format)
    if args.force_share:
        raise Unsupported(args.filename, "-U: an image that another process may be writing is not changed")
    parent = as_seen_from(args.filename, args.backing) if args.backing else None
    if parent is not None:
        need_vmdk(parent, args.backing_format)
    trusted = [*args.allow_dir, *([] if parent is None else [parent.parent])]
    report = rebase(args.filename, parent, unsafe=args.unsafe, resolver=confined(trusted), on_progress=ui.progress)
    if ui.json_output:
        ui.json(report.as_dict())
