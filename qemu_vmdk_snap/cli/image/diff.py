"""`image diff`: what changed between a base and a top, as runs or as a delta image."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.image.common import add_open_options, add_progress, need_vmdk, split_options
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image diff`."""
    add_open_options(parser)
    parser.add_argument(
        "-d", "--delta", type=Path, metavar="FILE", help="write the changes to FILE, an image for image apply"
    )
    parser.add_argument(
        "-o",
        "--options",
        action="append",
        default=[],
        metavar="subformat=KIND",
        help=("kind of the delta: streamOptimized (default) or monolithicSparse"),
    )
    add_progress(parser)
    parser.add_argument("base", type=image_file, help="an image in the backing chain of top")
    parser.add_argument("top", type=image_file, help="the image with the changes")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Show the changes, or write them to a delta."""
    from qemu_vmdk_snap.chain.chain import open_chain
    from qemu_vmdk_snap.ops.copy.diff import changes, depth_of, make_delta

    need_vmdk(args.top, args.format)
    kind = split_options(args.options).get("subformat", "streamOptimized")
    if kind not in ("streamOptimized", "monolithicSparse"):
        raise Unsupported(args.top, f"a delta cannot be {kind}: only streamOptimized and monolithicSparse")
    stream = kind == "streamOptimized"
    with open_chain(args.top, trusted_dirs=args.allow_dir, lock=not args.force_share) as chain:
        depth = depth_of(chain, args.base)
        if args.delta is not None:
            report = make_delta(chain, depth, args.delta, stream=stream, on_progress=ui.progress)
            if ui.json_output:
                ui.json(report.as_dict())
            else:
                ui.text(f"{report.path}: {report.changed} bytes changed")
            return
        found = list(changes(chain, depth, ui.progress))
        base, top = chain.links[depth], chain.links[0]
    if ui.json_output:
        ui.json(
            {
                "base": str(base.path),
                "top": str(top.path),
                "base-cid": base.cid,
                "top-cid": top.cid,
                "virtual-size": chain.capacity,
                "runs": [change.as_dict() for change in found],
            }
        )
        return
    ui.table(["Offset", "Length", "Kind"], [[f"{o:#x}", f"{n:#x}", "zero" if z else "data"] for o, n, z in found])
