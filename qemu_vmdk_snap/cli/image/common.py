"""What the image commands share: qemu-img's options for opening, and the opening itself."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.cli.image.names import file_name
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.light import TYPE_CHECKING, Final
from qemu_vmdk_snap.units import parse_size

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.chain.disk import Disk


def add_open_options(parser: argparse.ArgumentParser, *, raw: bool = False) -> None:
    """Add the options of a command that opens images: `-U`, `--allow-dir`, `-q`, and `-f` where `raw` may be read."""
    kinds = "vmdk (default) or raw; the format is never probed" if raw else "vmdk"
    parser.add_argument(
        "-f", "--format", dest="format", default="vmdk", metavar="FMT", help=f"format of the image: {kinds}"
    )
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="open the image even if another process is writing to it"
    )
    parser.add_argument(
        "--allow-devices",
        action="store_true",
        help="allow block devices of this machine as extents" + (", and raw images" if raw else ""),
    )
    add_quiet(parser)
    add_allow_dir(parser)


def add_allow_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--allow-dir`, the folders outside an image's own where its parents and extents may be."""
    parser.add_argument(
        "--allow-dir",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="also open parents and extents in DIR, not only in the folder of the image (may be repeated)",
    )


def add_orphan(parser: argparse.ArgumentParser) -> None:
    """Add `--orphan`, which ignores a file that needs the image."""
    parser.add_argument(
        "--orphan",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="continue although FILE needs the image, or may need it; FILE becomes unreadable (may be repeated)",
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add `-q`."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print only errors")


CACHE_MODES: Final = ("none", "writeback", "unsafe", "directsync", "writethrough")
"""qemu-img's; the others differ only in the use of the page cache, so only `unsafe` has an effect here."""


def add_cache(parser: argparse.ArgumentParser, short: str, long: str, meaning: str) -> None:
    """Add `-t` or `-T`; what it means is told of its values but `unsafe`."""
    default = "writeback" if short == "-t" else None
    parser.add_argument(short, long, default=default, choices=CACHE_MODES, metavar="CACHE", help=meaning)


def add_rate_limit(parser: argparse.ArgumentParser) -> None:
    """Add `-r`."""
    parser.add_argument(
        "-r", "--rate-limit", type=_rate, default=0, metavar="RATE", help="store at most RATE bytes a second"
    )


def _rate(text: str) -> int:
    rate = size_argument(text)
    if not rate:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError("must be more than 0 bytes a second")
    return rate


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add `-p`."""
    parser.add_argument("-p", "--progress", action="store_true", help="show progress")


def need_vmdk(path: Path | str, image_format: str) -> None:
    """Refuse any format but VMDK, in one line with the status of "not supported"."""
    if image_format != "vmdk":
        raise Unsupported(Path(path), f"format {image_format!r} is not supported here: only vmdk is")


def as_seen_from(image: Path, name: str | Path) -> Path:
    """Return the path of the backing file `name`: relative to the folder of `image`, as for qemu-img."""
    return image.parent / file_name(str(name), image.parent)


def open_disk(path: Path, image_format: str, args: argparse.Namespace) -> Disk:
    """Open an image for reading in the format that the user named.

    Raises:
        Unsupported: the format is neither vmdk nor raw; and all that `open_chain` raises.
    """
    if image_format == "raw":
        from qemu_vmdk_snap.chain.disk import RawDisk

        return RawDisk(path, lock=not args.force_share, allow_devices=args.allow_devices)
    need_vmdk(path, image_format)
    from qemu_vmdk_snap.chain.chain import open_chain

    lock, devices = not args.force_share, args.allow_devices
    return open_chain(path, trusted_dirs=args.allow_dir, lock=lock, allow_devices=devices)


def split_options(words: list[str]) -> dict[str, str]:
    """Return the `-o name=value,name=value` options of a command; a doubled comma is one comma of a value."""
    options: dict[str, str] = {}
    for word in words:
        for part in word.replace(",,", "\0").split(","):
            name, equals, value = part.replace("\0", ",").partition("=")
            if name:
                options[name] = value if equals else "on"
    return options


def as_bool(name: str, value: str) -> bool:
    """Return the value of an on/off option."""
    if value not in ("on", "off", "yes", "no", "true", "false"):
        raise InvalidRequest(f"-o {name}", f"{value!r} must be on or off")
    return value in ("on", "yes", "true")


def size_argument(text: str) -> int:
    """Parse a size on the command line."""
    try:
        return parse_size(text)
    except ValueError as error:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(str(error)) from None
