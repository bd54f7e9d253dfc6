"""The kernel as the ELF file that QEMU starts at its own entry point (PVH): the guest unpacks nothing.

bzImage      setup sectors, then code for protected mode; in this a payload: the ELF file, compressed, and its size
lz4 payload  the magic 0x184c2102, then blocks: a length, and the block, of which each unpacks to 8 MiB but the last

Sources: the kernel's Documentation/arch/x86/boot.rst; lz4's doc/lz4_Block_format.md; Xen's public/elfnote.h.
"""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from typing import Final

_MAGIC: Final = b"HdrS"
_ELF: Final = b"\x7fELF\x02"
_PT_NOTE: Final = 4
_PVH_ENTRY: Final = 18  # XEN_ELFNOTE_PHYS32_ENTRY
_GZIP: Final = b"\x1f\x8b\x08"
_XZ: Final = b"\xfd7zXZ\0"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_LZ4: Final = b"\x02\x21\x4c\x18"


def unpacked_kernel(image: bytes) -> bytes | None:
    """Return the ELF file inside a bzImage, or None where QEMU could not start it or nothing here unpacks it."""
    try:
        elf = _unpack(_payload(image))
        return elf if elf[:5] == _ELF and _PVH_ENTRY in _xen_notes(elf) else None
    except (ValueError, IndexError, struct.error, lzma.LZMAError, zlib.error, subprocess.CalledProcessError):
        return None


def without_signature(module: bytes) -> bytes:
    """Return a module without its signature, which takes the guest long to check, and which it does not insist on."""
    end = b"~Module signature appended~\n"
    if not module.endswith(end):
        return module
    signature = struct.unpack_from(">I", module, len(module) - len(end) - 4)[0]
    return module[: -len(end) - 12 - signature]


def _payload(image: bytes) -> bytes:
    if image[0x202:0x206] != _MAGIC:
        raise ValueError("no bzImage")
    start = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    return image[start + offset : start + offset + length - 4]


def _unpack(payload: bytes) -> bytes:
    if payload.startswith(_LZ4):
        return _unlz4(payload)
    if payload.startswith(_GZIP):
        return zlib.decompressobj(31).decompress(payload)
    if payload.startswith(_XZ):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    if payload.startswith(_ZSTD) and (zstd := shutil.which("zstd")) is not None:
        return subprocess.run([zstd, "-dc"], input=payload, capture_output=True, check=True).stdout
    raise ValueError("an unknown compression")


def _unlz4(payload: bytes) -> bytes:
    out = bytearray()
    at = len(_LZ4)
    while at < len(payload):
        (length,) = struct.unpack_from("<I", payload, at)
        _unlz4_block(payload, at + 4, at + 4 + length, out)
        at += 4 + length
    return bytes(out)


def _unlz4_block(data: bytes, at: int, end: int, out: bytearray) -> None:
    """Append what the block between the two places unpacks to: literals and copies by turns, literals at the end."""
    while True:
        token = data[at]
        at += 1
        count = token >> 4
        if count == 15:
            more, at = _length(data, at)
            count += more
        out += data[at : at + count]
        at += count
        if at >= end:
            return
        back = data[at] | data[at + 1] << 8
        at += 2
        count = (token & 15) + 4
        if count == 19:
            more, at = _length(data, at)
            count += more
        start = len(out) - back
        # A copy may reach into what it writes itself: then it repeats.
        out += out[start : start + count] if count <= back else (out[start:] * (count // back + 1))[:count]


def _length(data: bytes, at: int) -> tuple[int, int]:
    total = 0
    while data[at] == 255:
        total, at = total + 255, at + 1
    return total + data[at], at + 1


def _xen_notes(elf: bytes) -> Iterator[int]:
    """Yield the types of Xen's notes in an ELF file of 64 bits."""
    (offset,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    for number in range(count):
        kind, _, at, _, _, length = struct.unpack_from("<IIQQQQ", elf, offset + size * number)
        end = at + length
        while kind == _PT_NOTE and at + 12 <= end:
            name, described, note = struct.unpack_from("<III", elf, at)
            if elf[at + 12 : at + 12 + name] == b"Xen\0":
                yield note
            at += 12 + -(-name // 4) * 4 + -(-described // 4) * 4
