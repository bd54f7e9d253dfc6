"""`image convert`: copy what a guest sees into a new image."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap.cli.image.common import (
    add_open_options,
    add_progress,
    as_seen_from,
    need_vmdk,
    open_disk,
    size_argument,
    split_options,
)
from qemu_vmdk_snap.cli.image.create import overlay_options, parse_options
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from qemu_vmdk_snap.chain.disk import Disk
    from qemu_vmdk_snap.ops.copy.convert import ConvertReport
    from qemu_vmdk_snap.ops.make.create import ImageOptions

CACHE_MODES: Final = ("none", "writeback", "unsafe", "directsync", "writethrough")
"""qemu-img's; the others differ only in the use of the page cache, so only `unsafe` has an effect here."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image convert`."""
    add_open_options(parser, raw=True)
    parser.add_argument(
        "-O", "--target-format", default="vmdk", metavar="FMT", help="format of the new image: vmdk (default) or raw"
    )
    parser.add_argument(
        "-B",
        "--backing",
        type=Path,
        metavar="FILE",
        help="create an overlay backed by FILE (relative to the folder of the new image) that stores only what differs",
    )
    parser.add_argument("-F", "--backing-format", default="vmdk", metavar="FMT", help="format of the base: vmdk")
    parser.add_argument(
        "-o", "--options", action="append", default=[], metavar="NAME=VALUE,...", help="options, as for image create"
    )
    parser.add_argument(
        "-S",
        "--sparse-size",
        type=size_argument,
        default=0,
        metavar="SIZE",
        help="do not store zeros, in units of SIZE (default 0: everything that the source stores is stored)",
    )
    parser.add_argument(
        "-t",
        "--cache",
        default="writeback",
        choices=CACHE_MODES,
        metavar="CACHE",
        help="unsafe (the default of qemu-img) does not flush the new image to the disk; all others do",
    )
    for ignored in ("-T", "-m"):
        parser.add_argument(ignored, dest=f"ignored{ignored}", metavar="X", help=argparse.SUPPRESS)
    parser.add_argument("-W", dest="ignored_w", action="store_true", help=argparse.SUPPRESS)
    add_progress(parser)
    parser.add_argument(
        "filename", type=Path, help="the image; - reads a streamOptimized or raw image from standard input"
    )
    parser.add_argument(
        "output_filename",
        type=Path,
        help="the new image, which must not exist; - writes a streamOptimized or raw image to standard output",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Convert, silently as qemu-img does."""
    from qemu_vmdk_snap.ops.copy.convert import convert

    if args.target_format not in ("vmdk", "raw"):
        raise Unsupported(args.output_filename, f"format {args.target_format!r} is not supported: vmdk and raw are")
    if args.backing_format != "vmdk":
        raise Unsupported(
            args.output_filename, f"a base of format {args.backing_format!r} is not supported: only vmdk is"
        )
    words = split_options(args.options)
    backing = words.pop("backing_file", args.backing)
    args.backing = None if backing is None else as_seen_from(args.output_filename, backing)
    need_vmdk(args.output_filename, words.pop("backing_fmt", "vmdk"))
    if args.backing is not None:
        options = overlay_options(words, args.backing)
    else:
        options = parse_options(words) if words else None
    to_pipe = str(args.output_filename) == "-"
    if to_pipe:
        ui.streams()
    with _open_source(args) as source:
        if to_pipe:
            report = _to_pipe(source, args, options)
        else:
            report = convert(
                source,
                args.output_filename,
                output_format=args.target_format,
                options=options,
                backing=args.backing,
                sparse_size=args.sparse_size,
                durable=args.cache != "unsafe",
                on_progress=ui.progress,
            )
    if ui.json_output and not to_pipe:
        ui.json(report.as_dict())


def _open_source(args: argparse.Namespace) -> Disk:
    if str(args.filename) != "-":
        return open_disk(args.filename, args.format, args)
    import tempfile  # needed only for pipes, as these are

    from qemu_vmdk_snap.ops.copy.pipes import StreamDisk, spooled_raw
    from qemu_vmdk_snap.storage.pipes import PipeReader

    pipe = PipeReader(sys.stdin.fileno(), Path("standard input"))
    if args.format == "raw":
        folder = Path(tempfile.gettempdir()) if str(args.output_filename) == "-" else args.output_filename.parent
        return spooled_raw(pipe, folder)
    need_vmdk("standard input", args.format)
    return StreamDisk(pipe)


def _to_pipe(source: Disk, args: argparse.Namespace, options: ImageOptions | None) -> ConvertReport:
    from qemu_vmdk_snap.ops.copy.convert import convert_to_pipe
    from qemu_vmdk_snap.storage.pipes import PipeWriter

    if args.backing is not None:
        raise InvalidRequest("-B", "an overlay cannot be written to a pipe")
    pipe = PipeWriter(sys.stdout.fileno(), Path("standard output"))
    return convert_to_pipe(
        source, pipe, output_format=args.target_format, options=options, sparse_size=args.sparse_size
    )
