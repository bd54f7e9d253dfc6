"""The seeded pattern that the probe guest writes; its definition is in guests/probe/README.md."""

from __future__ import annotations

import numpy as np

from qemu_vmdk_snap.units import SECTOR_SIZE

_WORDS = SECTOR_SIZE // 4
_MASK = 0xFFFF_FFFF


def pattern(seed: int, lba: int, count: int) -> bytes:
    """Return `count` sectors of the pattern of `seed` (32 bits), the first being sector `lba` of the disk."""
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
