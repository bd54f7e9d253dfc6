"""The seeded pattern that the probe guest writes; its definition is in guests/probe/README.md."""

from __future__ import annotations

import numpy as np

from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.units import SECTOR_SIZE

_WORDS = SECTOR_SIZE // 4
_MASK = 0xFFFF_FFFF


def pattern(seed: int, offset: int, length: int) -> bytes:
    """Return the `length` bytes of the pattern of `seed` (32 bits) from byte `offset` of the disk on.

    Raises:
        InvalidRequest: one of them is not a multiple of the sector size.
    """
    if offset % SECTOR_SIZE or length % SECTOR_SIZE:
        raise InvalidRequest("pattern", f"bytes {offset} to {offset + length} are not whole sectors of {SECTOR_SIZE}")
    count = length // SECTOR_SIZE
    lba = offset // SECTOR_SIZE
    sectors = np.arange(lba, lba + count, dtype=np.uint64)
    low, high = sectors & np.uint64(_MASK), sectors >> np.uint64(32)
    state = (low * np.uint64(0x9E3779B1)) ^ (high * np.uint64(0x85EBCA77)) ^ np.uint64(seed & _MASK)
    word = state.astype(np.uint32)
    word[word == 0] = 0x6D2B79F5
    out = np.empty((count, _WORDS), "<u4")
    for i in range(_WORDS):
        word ^= word << np.uint32(13)
        word ^= word >> np.uint32(17)
        word ^= word << np.uint32(5)
        out[:, i] = word
    return out.tobytes()
