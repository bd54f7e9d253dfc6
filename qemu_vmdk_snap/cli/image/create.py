"""`image create`: create an empty image, or an overlay on another one."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.chain.identity import no_protocol, random_uuid
from qemu_vmdk_snap.cli.image.common import add_quiet, as_bool, as_seen_from, need_vmdk, size_argument, split_options
from qemu_vmdk_snap.cli.image.names import file_name, image_file
from qemu_vmdk_snap.cli.line.plain import HIDDEN
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.light import TYPE_CHECKING, Any, Final, replace
from qemu_vmdk_snap.ops.make.create import ImageOptions, create_image, create_overlay, inherited_options
from qemu_vmdk_snap.ops.make.layout import KINDS
from qemu_vmdk_snap.units import parse_size

if TYPE_CHECKING:
    import argparse

OPTION_HELP: Final = {
    "adapter_type": "virtual adapter type: ide (default), lsilogic, buslogic or legacyESX",
    "backing_file": "file name of a base image",
    "backing_fmt": "must be 'vmdk' if present",
    "compat6": "VMDK version 6 image: hardware version 6 (on/off)",
    "grain_size": "allocation unit in bytes: a power of two from 4k to 1G (default 64k)",
    "hwversion": "VMDK hardware version (default 4)",
    "size": "virtual disk size",
    "subformat": "monolithicSparse (default), monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, "
    "streamOptimized, vmfs, vmfsThin or vmfsSparse",
    "toolsversion": "VMware guest tools version",
    "zeroed_grain": "allow grains to be marked as zeros, version 2 (on/off)",
}

RAW_OPTION_HELP: Final = {"preallocation": "space set aside: off (default), falloc or full"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image create`."""
    parser.add_argument("-f", "--format", default="vmdk", metavar="FMT", help="format of the new image: vmdk")
    parser.add_argument(
        "-b",
        "--backing",
        metavar="FILE",
        help="create an overlay backed by FILE, relative to the folder of the new image",
    )
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="format of the base: vmdk")
    parser.add_argument("-u", "--unsafe", action="store_true", help=HIDDEN)
    parser.add_argument(
        "-o", "--options", action="append", default=[], metavar="NAME=VALUE,...", help="options; -o help lists them"
    )
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="open the base even if another process is writing to it"
    )
    add_quiet(parser)
    parser.add_argument(
        "filename",
        nargs="?",
        type=image_file,
        help="the new image, which must not exist or be an empty file; without it, -b makes UUID.vmdk beside the base",
    )
    parser.add_argument(
        "size",
        nargs="?",
        type=size_argument,
        help="virtual size in bytes, or with suffix K, M, G, T (default of an overlay: that of its base)",
    )


def run(args: argparse.Namespace, ui: Ui) -> int | None:
    """Create the image and print what was created, as qemu-img does."""
    words = split_options(args.options)
    if "help" in words or "?" in words:
        return list_options(ui)
    backing = words.pop("backing_file", None) or args.backing
    named = args.filename is not None
    if not named:
        if backing is None:
            raise InvalidRequest("image create", "the name of the new image is missing")
        base = image_file(backing)
        args.filename, backing = base.with_name(f"{random_uuid()}.vmdk"), base.name
    need_vmdk(args.filename, args.format)
    need_vmdk(backing or args.filename, words.pop("backing_fmt", args.backing_format or "vmdk"))
    size = _size(words.pop("size")) if "size" in words else args.size
    if args.unsafe:
        raise Unsupported(args.filename, "-u: an overlay has to record its base's CID, so the base is opened")
    if backing is None:
        if size is None:
            raise InvalidRequest(args.filename, "an image needs a size (or a base: -b)")
        create_image(args.filename, size, options=parse_options(words), over_empty=True)
    else:
        base = as_seen_from(args.filename, backing)
        _check_writers(base, ui, allowed=args.force_share)
        options = overlay_options(words, base)
        hint = no_protocol(file_name(str(backing), args.filename.parent))
        create_overlay(args.filename, base, hint=hint, size=size, options=options, over_empty=True)
        _warn_if_outside(args.filename, base, ui)
    if named or ui.json_output:
        _report(args.filename, size, ui)
    else:
        ui.text(str(args.filename))  # nobody else can know it
    return None


def parse_options(words: dict[str, str]) -> ImageOptions:
    """Return the options of an image without a base, of which `-o` words name some.

    Raises:
        InvalidRequest: an unknown name, an invalid value, or an option that does not apply to the kind.
    """
    return ImageOptions(**_named_options(words))


def overlay_options(words: dict[str, str], base: Path) -> ImageOptions | None:
    """Return the options that an overlay on `base` inherits, changed by the `-o` words; None where there are none.

    Raises:
        InvalidRequest: as `parse_options`.
    """
    named = _named_options(words)
    return replace(inherited_options(base), **named) if named else None


def _named_options(words: dict[str, str]) -> dict[str, Any]:
    unknown = sorted(set(words) - set(OPTION_HELP))
    if unknown:
        raise InvalidRequest(f"-o {unknown[0]}", f"no such option (known: {', '.join(OPTION_HELP)})")
    for name in ("backing_file", "backing_fmt", "size"):
        if name in words:
            raise InvalidRequest(f"-o {name}", "can only be given to `image create`")
    named: dict[str, Any] = {
        name: words[name] for name in ("adapter_type", "hwversion", "toolsversion", "subformat") if name in words
    }
    if as_bool("compat6", words.get("compat6", "off")):
        if "hwversion" in words:
            raise InvalidRequest("-o compat6", "cannot go with hwversion")
        named["hwversion"] = "6"
    if "grain_size" in words:
        named["grain_size"] = _size(words["grain_size"])
    if "zeroed_grain" in words:
        named["zeroed_grain"] = as_bool("zeroed_grain", words["zeroed_grain"])
    _refuse_idle(named)
    return named


def _refuse_idle(named: dict[str, Any]) -> None:
    """Refuse an option that does not apply to the kind, instead of ignoring it silently."""
    subformat = named.get("subformat", ImageOptions().subformat)
    kind = KINDS.get(subformat)
    if kind is None or kind.extent_type == "SPARSE":
        return
    grains = "has grains of one sector" if kind.may_have_parent else "has no grains"
    for name in ("grain_size", "zeroed_grain"):
        if named.get(name):
            raise InvalidRequest(f"-o {name}", f"cannot go with {subformat}, which {grains}")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise InvalidRequest("-o", str(error)) from None


def _check_writers(base: Path, ui: Ui, *, allowed: bool) -> None:
    """Refuse a base that is open for writing: its next change of the CID makes the overlay invalid.

    Raises:
        LockBusy: it is. If that is `allowed`, there is only a warning.
    """
    from qemu_vmdk_snap.errors import LockBusy
    from qemu_vmdk_snap.storage.blockfile import PosixFile
    from qemu_vmdk_snap.storage.locks import lock_image

    file = PosixFile.open(base)
    try:
        lock_image(file.fileno(), base, writable=False)
    except LockBusy:
        if not allowed:
            raise
        ui.warn(f"{base} is being written to: the overlay is valid only after its writer has switched to the overlay")
    finally:
        file.close()


def _warn_if_outside(overlay: Path, base: Path, ui: Ui) -> None:
    """Warn if the new overlay cannot be opened without `--allow-dir`."""
    folder = base.resolve().parent
    if folder != overlay.parent.resolve():
        ui.warn(f"{base} is outside the folder of {overlay}: opening the overlay needs --allow-dir {folder}")


def list_options(ui: Ui, *, raw: bool = False) -> int:
    """Show what `-o` takes for a VMDK image, or for a raw one."""
    known = RAW_OPTION_HELP if raw else OPTION_HELP
    if ui.json_output:
        ui.json([{"name": name, "description": text} for name, text in known.items()])
        return 0
    ui.text("Supported options:")
    for name, text in known.items():
        ui.text(f"  {name:<16} - {text}")
    return 0


def _report(path: Path, asked: int | None, ui: Ui) -> None:
    if ui.quiet and not ui.json_output:
        return
    from qemu_vmdk_snap.chain.link import read_descriptor
    from qemu_vmdk_snap.storage.blockfile import PosixFile
    from qemu_vmdk_snap.units import sector_bytes

    file = PosixFile.open(path)
    try:
        descriptor, _ = read_descriptor(file)
    finally:
        file.close()
    size = sector_bytes(descriptor.sectors)
    if ui.json_output:
        ui.json(
            {
                "filename": str(path),
                "format": "vmdk",
                "virtual-size": size,
                "cid": descriptor.cid,
                "backing-filename": descriptor.parent_hint,
            }
        )
        return
    backing = f" backing_file={descriptor.parent_hint} backing_fmt=vmdk" if descriptor.parent_hint else ""
    shown = size if asked is None else asked  # as qemu-img: what was asked for, not what it is rounded up to
    ui.text(f"Formatting '{path}', fmt=vmdk size={shown}{backing} subformat={descriptor.create_type}")
