"""`image compare`: exit status 0 where a guest would see the same bytes, 1 where not, 2 on an error."""

from __future__ import annotations

from qemu_vmdk_snap.cli.image.common import add_cache, add_open_options, add_progress, open_disk
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image compare`."""
    add_open_options(parser, raw=True)
    parser.add_argument(
        "-F", "--second-format", default="vmdk", metavar="FMT", help="format of the second image: vmdk (default) or raw"
    )
    parser.add_argument("-s", "--strict", action="store_true", help="also compare the sizes and what is allocated")
    add_cache(parser, "-T", "--src-cache", "accepted, without effect")
    add_progress(parser)
    parser.add_argument("filename1", type=image_file, help="the first image")
    parser.add_argument("filename2", type=image_file, help="the second image")
    parser.set_defaults(error_status=2)


def run(args: argparse.Namespace, ui: Ui) -> int:
    """Compare and say where they differ first, in qemu-img's words."""
    from qemu_vmdk_snap.ops.copy.compare import compare

    with (
        open_disk(args.filename1, args.format, args) as one,
        open_disk(args.filename2, args.second_format, args) as two,
    ):
        report = compare(one, two, strict=args.strict, on_progress=ui.progress)
    if ui.json_output:
        ui.json(report.as_dict())
        return 0 if report.identical else 1
    if report.reason == "size":
        ui.text("Strict mode: Image size mismatch!")
    elif report.sizes:
        ui.text("Warning: Image size mismatch!")
    if report.reason == "allocation":
        ui.text(f"Strict mode: Offset {report.offset} block status mismatch!")
    elif report.reason == "content":
        ui.text(f"Content mismatch at offset {report.offset}!")
    elif report.identical:
        ui.text("Images are identical.")
    return 0 if report.identical else 1
