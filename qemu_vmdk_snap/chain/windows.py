"""Cutting a disk into windows that are resolved one at a time, so that memory is bounded however large the disk is.

The cost of a window is the runs that may be in it: at most one a grain. So a window ends where the finest link has had
its number of grains; where there are none (an extent of zeros, past the end of a flat file) it continues.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.vmdk.extent import Extent, PlacedExtent

TABLE_GRAINS: Final = 1 << 18
"""Grains of a window that is worked on as arrays: some tens of bytes each."""

ROW_GRAINS: Final = 1 << 16
"""Grains of a window whose runs are taken one at a time, from several tables: some hundreds of bytes each."""


def windows(
    links: Sequence[Sequence[PlacedExtent]], start: int, end: int, grains: int = ROW_GRAINS
) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of consecutive windows of [start, end) in which no link has more than about `grains` runs.

    A link is its extents, in order; offsets are bytes of the guest's disk.
    """
    while start < end:
        stop = min([end, *(_reach(extents, start, end, grains) for extents in links)])
        yield start, stop
        start = stop


def extent_windows(extent: Extent, grains: int = TABLE_GRAINS) -> Iterator[tuple[int, int]]:
    """Yield the windows of a single extent, in bytes from its start."""
    start = 0
    while start < extent.capacity:
        stop = min(extent.capacity, _reach_inside(extent, start, grains)[0])
        yield start, stop
        start = stop


def _reach(extents: Sequence[PlacedExtent], start: int, end: int, grains: int) -> int:
    """Return how far the extents can be resolved from `start` on: to `end`, or to where they have enough runs."""
    first = bisect.bisect_right(extents, start, key=lambda placed: placed.start) - 1
    for placed in extents[max(0, first) :]:
        inside = max(0, start - placed.start)
        if placed.start >= end:
            break
        if inside >= placed.extent.capacity:
            continue
        reach, used = _reach_inside(placed.extent, inside, grains)
        grains -= used
        if reach < placed.extent.capacity or grains <= 0:
            return placed.start + min(reach, placed.extent.capacity)
    return end


def _reach_inside(extent: Extent, start: int, grains: int) -> tuple[int, int]:
    """Return how far the extent can be resolved from `start` on, and how many runs that may give."""
    unit = extent.grain_bytes
    first, last = start // unit, -(-extent.varied_bytes // unit)
    if last - first > grains:
        return (first + grains) * unit, grains
    return extent.capacity, max(0, last - first) + 1
