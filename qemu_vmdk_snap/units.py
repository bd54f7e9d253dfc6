"""Sectors and bytes: the two units of the format as two types, and sizes as users write them."""

from __future__ import annotations

from qemu_vmdk_snap.light import Final, NewType

Sector = NewType("Sector", int)
"""A count or position in 512-byte sectors, as nearly every field on disk has it."""

ByteOffset = NewType("ByteOffset", int)
"""A position in bytes in a file or on the guest's disk."""

SECTOR_SIZE: Final = 512
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

_SUFFIXES: Final = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB, "P": 1 << 50, "E": 1 << 60}


def sector_bytes(sectors: int) -> ByteOffset:
    """Return the byte offset (or length) of `sectors`."""
    return ByteOffset(sectors * SECTOR_SIZE)


def byte_sectors(length: int) -> Sector:
    """Return how many sectors hold `length` bytes, rounded up."""
    return Sector(-(-length // SECTOR_SIZE))


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` means, as for qemu-img: `512`, `64K`, `1.5G` (powers of 1024), `0x200`.

    Raises:
        ValueError: `text` is not a size, is negative, or is not a whole number of bytes.
    """
    number, suffix = text.strip(), ""
    if number[:2] in ("0x", "0X") and number.isascii() and "_" not in number:
        try:
            return int(number, 16)
        except ValueError:
            raise ValueError(f"size {text!r}: must have hexadecimal digits and no suffix") from None
    if number and number[-1].isalpha():
        number, suffix = number[:-1], number[-1].upper()
    if suffix not in _SUFFIXES or not number.replace(".", "", 1).isdecimal():
        raise ValueError(f"size {text!r}: must be a number with an optional suffix K, M, G, T, P or E")
    try:
        size = int(number) * _SUFFIXES[suffix] if number.isdigit() else float(number) * _SUFFIXES[suffix]
    except ValueError:
        raise ValueError(f"size {text!r}: must be a number with an optional suffix K, M, G, T, P or E") from None
    if size != int(size):
        raise ValueError(f"size {text!r}: must be a whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """Return `size` bytes as text, as qemu-img writes it: `512 B`, `64 KiB`, `1.5 GiB`."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 999.5 or unit == "EiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}"
