"""`image convert`: copy what a guest sees into a new image, or with -n into one that is there."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from qemu_vmdk_snap.cli.image.common import (
    add_cache,
    add_open_options,
    add_orphan,
    add_progress,
    add_rate_limit,
    as_seen_from,
    need_vmdk,
    open_disk,
    size_argument,
    split_options,
)
from qemu_vmdk_snap.cli.image.create import list_options, overlay_options, parse_options
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.line.plain import HIDDEN
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.light import TYPE_CHECKING, Final
from qemu_vmdk_snap.units import MIB, SECTOR_SIZE

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.chain.disk import Disk
    from qemu_vmdk_snap.ops.copy.convert import ConvertReport
    from qemu_vmdk_snap.ops.make.create import ImageOptions

_MAX_COROUTINES: Final = 16
_MAX_SPARSE: Final = 16 * MIB
_OTHER_FORMATS: Final = frozenset(
    (".raw", ".qcow2", ".qcow", ".qed", ".vdi", ".vhd", ".vhdx", ".vpc", ".iso", ".luks", ".parallels")
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image convert`."""
    add_open_options(parser, raw=True)
    parser.add_argument("-O", "--target-format", metavar="FMT", help="format of the new image: vmdk (default) or raw")
    parser.add_argument(
        "-B",
        "--backing",
        metavar="FILE",
        help="create an overlay backed by FILE (relative to the folder of the new image) that stores only what differs",
    )
    parser.add_argument("-F", "--backing-format", default="vmdk", metavar="FMT", help="format of the base: vmdk")
    parser.add_argument(
        "-o",
        "--options",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="options, as for image create (-o help lists them); for raw: preallocation=off|falloc|full",
    )
    parser.add_argument("-c", "--compress", action="store_true", help="compress: a streamOptimized image")
    parser.add_argument(
        "-S",
        "--sparse-size",
        type=_sparse_size,
        metavar="SIZE",
        help="do not store zeros, in units of SIZE; 0 stores whatever the source stores (default 4k; what the file "
        "system can share with the source is shared as it is)",
    )
    add_cache(parser, "-t", "--cache", "unsafe (the default of qemu-img) does not flush the new image to the disk")
    add_cache(parser, "-T", "--src-cache", "accepted, without effect")
    _add_existing(parser)
    _add_how(parser)
    add_progress(parser)
    parser.add_argument(
        "files",
        nargs="*",
        type=image_file,
        metavar="filename",
        help="the image (several are put one behind the other), then the new image, which must not exist or be an "
        "empty file; - reads a streamOptimized or raw image from standard input, or writes one to standard output",
    )


def _add_existing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n",
        "--no-create",
        action="store_true",
        help="write into an existing image, raw file or (--allow-devices) block device, over what it holds",
    )
    parser.add_argument(
        "--target-is-zero", action="store_true", help="with -n: the target reads as zeros now, so write no zeros"
    )
    add_orphan(parser)


def _add_how(parser: argparse.ArgumentParser) -> None:
    add_rate_limit(parser)
    parser.add_argument(
        "--salvage", action="store_true", help="read as zeros what cannot be read (I/O errors), and say so"
    )
    parser.add_argument("-C", "--copy-range", action="store_true", help="accepted: the kernel copies wherever it can")
    parser.add_argument(
        "-m", "--coroutines", type=_coroutines, metavar="NUMBER", help="1 to 16: accepted, without effect"
    )
    parser.add_argument("-W", "--out-of-order", action="store_true", help="accepted, without effect")
    parser.add_argument("-l", "-s", "--snapshot", metavar="SNAPSHOT", help=HIDDEN)


def run(args: argparse.Namespace, ui: Ui) -> int | None:
    """Convert, silently as qemu-img does."""
    words = split_options(args.options)
    if "help" in words or "?" in words:
        return list_options(ui, raw=args.target_format == "raw")
    if len(args.files) < 2:
        raise InvalidRequest("image convert", "needs an image and the name of the new one")
    *args.sources, args.output_filename = args.files
    args.filename = args.sources[0]  # for messages
    _check(args, words)
    to_pipe = str(args.output_filename) == "-"
    if to_pipe:
        ui.streams()
    elif args.target_format is None and args.output_filename.suffix.lower() in _OTHER_FORMATS and not args.no_create:
        ui.warn(f"{args.output_filename}: becomes a vmdk image, whatever its name says (-O names the format)")
    args.target_format = args.target_format or "vmdk"
    options = _image_options(args, words)
    with contextlib.ExitStack() as stack:
        source = _source(args, stack)
        if to_pipe:
            report = _to_pipe(source, args, options)
        elif args.no_create:
            report = _into(source, args, ui)
        else:
            report = _to_new(source, args, options, words.get("preallocation", "off"), ui)
    if ui.json_output and not to_pipe:
        ui.json(report.as_dict())
    return None


def _check(args: argparse.Namespace, words: dict[str, str]) -> None:
    """Refuse what does not go together, in qemu-img's sense."""
    target = args.output_filename
    if args.target_format not in (None, "vmdk", "raw"):
        hint = f"vmdk and raw are (qemu-img convert -O {args.target_format} makes it)"
        raise Unsupported(target, f"format {args.target_format!r} is not supported: {hint}")
    if args.backing_format != "vmdk":
        raise Unsupported(target, f"a base of format {args.backing_format!r} is not supported: only vmdk is")
    if args.snapshot is not None:
        raise Unsupported(args.filename, "-l, -s: a VMDK image has no internal snapshots; each overlay is an image")
    backed = args.backing is not None or "backing_file" in words
    never: tuple[tuple[bool, str, str], ...] = (
        (args.copy_range and args.compress, "-C", "cannot go with -c"),
        (args.copy_range and args.sparse_size is not None, "-C", "cannot go with -S"),
        (args.copy_range and args.salvage, "-C", "cannot go with --salvage"),
        (args.no_create and bool(words), "-o", "has no effect with -n: no image is created"),
        (args.no_create and backed, "-B", "has no effect with -n: no image is created"),
        (args.no_create and args.compress, "-c", "cannot go with -n: a streamOptimized image is written once"),
        (args.no_create and str(target) == "-", "-n", "needs an image that is there"),
        (args.target_is_zero and not args.no_create, "--target-is-zero", "needs -n"),
        (len(args.sources) > 1 and backed, "-B", "makes no sense with several images"),
        (len(args.sources) > 1 and "-" in map(str, args.sources), "-", "cannot be one of several images"),
        (backed and bool(args.rate_limit), "-r", "cannot go with -B"),
        (backed and args.compress, "-c", "cannot go with -B: a streamOptimized image has no parent"),
        (args.compress and args.target_format == "raw", "-c", "cannot go with -O raw"),
    )
    for refused, option, reason in never:
        if refused:
            raise InvalidRequest(option, reason)


def _image_options(args: argparse.Namespace, words: dict[str, str]) -> ImageOptions | None:
    target = args.output_filename
    backing = words.pop("backing_file", args.backing)
    args.backing = None if backing is None else as_seen_from(target, backing)
    need_vmdk(target, words.pop("backing_fmt", "vmdk"))
    if args.target_format == "raw":
        if unknown := sorted(set(words) - {"preallocation", "size"}):
            raise InvalidRequest(f"-o {unknown[0]}", "no such option of a raw image (known: preallocation)")
        return None
    if args.compress and words.setdefault("subformat", "streamOptimized") != "streamOptimized":
        raise Unsupported(target, f"-c: only streamOptimized images are compressed, not {words['subformat']}")
    named = {name: value for name, value in words.items() if name != "preallocation"}
    if words.get("preallocation", "off") != "off":
        feature = f"-o preallocation={words['preallocation']}: only raw images have it (or -o subformat=vmfs)"
        raise Unsupported(target, feature)
    if args.backing is not None:
        return overlay_options(named, args.backing)
    return parse_options(named) if named else None


def _to_new(
    source: Disk, args: argparse.Namespace, options: ImageOptions | None, preallocation: str, ui: Ui
) -> ConvertReport:
    from qemu_vmdk_snap.ops.copy.convert import convert

    return convert(
        source,
        args.output_filename,
        output_format=args.target_format,
        options=options,
        backing=args.backing,
        sparse_size=args.sparse_size,
        durable=args.cache != "unsafe",
        rate_limit=args.rate_limit,
        preallocation=preallocation,
        over_empty=True,
        on_progress=ui.progress,
    )


def _into(source: Disk, args: argparse.Namespace, ui: Ui) -> ConvertReport:
    from qemu_vmdk_snap.ops.copy.into import convert_into

    return convert_into(
        source,
        args.output_filename,
        output_format=args.target_format,
        sparse_size=args.sparse_size,
        target_is_zero=args.target_is_zero,
        allow_devices=args.allow_devices,
        rate_limit=args.rate_limit,
        orphans=args.orphan,
        trusted_dirs=args.allow_dir,
        on_progress=ui.progress,
    )


def _source(args: argparse.Namespace, stack: contextlib.ExitStack) -> Disk:
    """Return what is read: one disk, or several as one; open until `stack` closes."""
    disks = [stack.enter_context(_open_source(path, args)) for path in args.sources]
    if len(disks) == 1 and not args.salvage:
        return disks[0]
    from qemu_vmdk_snap.ops.copy.sources import JoinedDisk, SalvagedDisk

    one = disks[0] if len(disks) == 1 else JoinedDisk(disks)
    return SalvagedDisk(one) if args.salvage else one


def _open_source(path: Path, args: argparse.Namespace) -> Disk:
    if str(path) != "-":
        return open_disk(path, args.format, args)
    import tempfile  # needed only for pipes, as these are

    from qemu_vmdk_snap.ops.copy.pipes import StreamDisk, spooled_raw
    from qemu_vmdk_snap.storage.pipes import PipeReader

    pipe = PipeReader(sys.stdin.fileno(), Path("standard input"))
    if args.format == "raw":
        target = args.output_filename
        folder = Path(tempfile.gettempdir()) if str(target) == "-" or args.no_create else target.parent
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
        source,
        pipe,
        output_format=args.target_format,
        options=options,
        sparse_size=args.sparse_size,
        rate_limit=args.rate_limit,
    )


def _sparse_size(text: str) -> int:
    size = size_argument(text)
    if size % SECTOR_SIZE or size > _MAX_SPARSE:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r} must be a multiple of {SECTOR_SIZE} up to {_MAX_SPARSE}, or 0")
    return size


def _coroutines(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_COROUTINES:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r} must be from 1 to {_MAX_COROUTINES}")
    return int(text)
