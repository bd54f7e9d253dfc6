"""Emptying a hosted sparse extent in place, without NumPy, as a hook at a guest's start must be fast.

The tables become holes of the file, in both copies; when that is durable, the space of the grains is freed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import sector_bytes
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader

_STEP: Final = 1 << 20


def clear_extent(file: BlockFile, header: SparseExtentHeader) -> int:
    """Remove every grain of the extent in `file`, durably, and return the new length of the file.

    Interrupted at any point, each entry of the tables is what it was or 0; repeating it finishes it.
    """
    end: int = sector_bytes(header.overhead)
    for start, length in _tables(file, header):
        _zero(file, start, length)
        end = max(end, start + length)
    file.flush()  # barrier: no table names a grain any more when the space goes
    end = min(file.size(), end)
    file.truncate(end)
    file.flush()
    return end


def _tables(file: BlockFile, header: SparseExtentHeader) -> Iterator[tuple[int, int]]:
    """Yield where the tables of each copy are, as (byte, length), those that follow one another joined."""
    for offset in {header.gd_offset, header.rgd_offset if header.redundant else header.gd_offset}:
        raw = file.read_at(sector_bytes(offset), header.gd_entries * 4)
        sectors = sorted({sector for (sector,) in struct.iter_unpack("<I", raw) if sector})
        start = end = 0
        for sector in sectors:
            if sector != end:
                if end:
                    yield sector_bytes(start), sector_bytes(end - start)
                start = sector
            end = sector + header.gt_sectors
        if end:
            yield sector_bytes(start), sector_bytes(end - start)


def _zero(file: BlockFile, start: int, length: int) -> None:
    """Make the range read as zeros: a hole where the file system has holes, else zeros where there is data."""
    if file.discard_range(start, length):
        return
    at, end = start, min(file.size(), start + length)
    while (at := file.next_data(at)) < end:
        stop = min(end, file.next_hole(at), at + _STEP)
        file.write_at(at, bytes(stop - at))
        at = stop
