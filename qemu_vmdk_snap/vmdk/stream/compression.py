"""Deflated grains, by libdeflate: as small as zlib's level 6 within 2 %, several times as fast, with the GIL released.

Measured on 96 MiB of programs in grains of 64 KiB, against zlib level 6 (27 MB/s a core): libdeflate level 4 is
1.7 % larger at 125 MB/s; zlib-ng 1.7 % larger at 72 MB/s (its level 6); ISA-L 7 % larger at best, at 224 MB/s.
"""

from __future__ import annotations

from pathlib import Path

import deflate

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.storage.blockfile import Buffer

LEVEL: Final = 4


def deflated(data: Buffer) -> bytearray:
    """Return `data` as a zlib stream."""
    packed: bytearray = deflate.zlib_compress(data, LEVEL)
    return packed


def inflated(data: Buffer, limit: int, path: Path, offset: int) -> bytes:
    """Return the content of the zlib stream at the start of `data`: at most `limit` bytes; `offset` is for the message.

    Raises:
        FormatError: it is damaged, cut short, or longer.
    """
    try:
        return bytes(deflate.zlib_decompress(data, limit))
    except deflate.DeflateError as error:
        rule = f"must be a zlib stream of at most {limit} bytes"
        raise FormatError(path, offset, "compressed grain", bytes(data[:8]), rule) from error
