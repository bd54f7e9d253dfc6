"""Which blocks of the device hold a part of a file: two parts in the same blocks are the same bytes, without a look.

Source: the kernel's Documentation/filesystems/fiemap.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

_FIEMAP: Final = 0xC020660B  # _IOWR('f', 11, struct fiemap)
_HEAD: Final = struct.Struct("=QQIIII")
_EXTENT: Final = struct.Struct("=QQQ16xI12x")
_COUNT: Final = 256
_SYNC: Final = 1
_LAST, _PLAIN = 1, 0x1 | 0x1000 | 0x2000
"""The last extent of the file; with that, the flags that leave the place as it is told: merged, shared."""


def in_same_blocks(one: int, one_offset: int, two: int, two_offset: int, length: int) -> bool:
    """Return whether the parts of two open files are stored in the very same blocks; False where that is not known.

    What is written but not stored yet is stored first: until then the blocks are not those of the content.
    """
    if os.fstat(one).st_dev != os.fstat(two).st_dev:
        return False
    mine = _blocks(one, one_offset, length)
    return mine is not None and mine == _blocks(two, two_offset, length)


def _blocks(fd: int, offset: int, length: int) -> list[tuple[int, int]] | None:
    """Return (byte on the device, length) of the parts of the range, neighbours joined; None where one has no place."""
    found: list[tuple[int, int]] = []
    end = offset + length
    while offset < end:
        extents = _extents(fd, offset, end - offset)
        if not extents:
            return None
        for logical, physical, size, flags in extents:
            if flags & ~_PLAIN or logical > offset:
                return None  # not written, packed or compressed; or a hole
            skip = offset - logical
            part = min(size - skip, end - offset)
            if part <= 0:
                continue
            place = physical + skip
            if found and sum(found[-1]) == place:
                found[-1] = found[-1][0], found[-1][1] + part
            else:
                found.append((place, part))
            offset += part
        if extents[-1][3] & _LAST and offset < end:
            return None
    return found


def _extents(fd: int, offset: int, length: int) -> list[tuple[int, int, int, int]]:
    buffer = bytearray(_HEAD.pack(offset, length, _SYNC, 0, _COUNT, 0) + bytes(_COUNT * _EXTENT.size))
    try:
        fcntl.ioctl(fd, _FIEMAP, buffer)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADR):
            raise
        return []
    count = _HEAD.unpack_from(buffer)[3]
    return [_EXTENT.unpack_from(buffer, _HEAD.size + number * _EXTENT.size) for number in range(count)]
