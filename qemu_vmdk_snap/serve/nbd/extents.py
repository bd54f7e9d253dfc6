"""Answers to block status: what is allocated, and what changed since a snapshot. The caller has the turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from qemu_vmdk_snap import HOLE, RunTable
from qemu_vmdk_snap.ops.copy.transfer import upper_tables
from qemu_vmdk_snap.serve.disk.disk import Disk
from qemu_vmdk_snap.serve.nbd import wire
from qemu_vmdk_snap.serve.nbd.handshake import BASE_ALLOCATION, SINCE
from qemu_vmdk_snap.vmdk.runs import DATA

_MOST_EXTENTS: Final = 1024
_MOST_BYTES: Final = 1 << 32
"""Of the disk, in one answer: lengths are 32 bits wide, and the turn is not held for long."""


def block_status(disk: Disk, context: str, offset: int, length: int, *, one: bool) -> list[tuple[int, int]]:
    """Return (length, flags) of the extents from `offset` on, as the context has them; `one` asks for the first only.

    They may end before the range does; there is always at least one.
    """
    end = offset + min(length, _MOST_BYTES - 1)
    found: list[tuple[int, int]] = []
    for size, flags in _flagged(disk, context, offset, end):
        if found and found[-1][1] == flags:
            found[-1] = (found[-1][0] + size, flags)
        elif len(found) == (1 if one else _MOST_EXTENTS):
            break
        else:
            found.append((size, flags))
    return found


def _flagged(disk: Disk, context: str, offset: int, end: int) -> Iterator[tuple[int, int]]:
    chain, depth = disk.stack.chain, disk.places.depth
    if context == BASE_ALLOCATION:
        for start, stop in chain.windows(offset, end):
            table = chain.resolve(start, stop, depth)
            stored = table.kinds >= DATA
            yield from _pairs(table, np.where(stored, 0, wire.STATE_HOLE | wire.STATE_ZERO).tolist())
        return
    name = context.removeprefix(SINCE)
    paths = [Path(link.path).name for link in chain.links]
    if name not in paths[depth + 1 :]:  # merged away since it was asked for: all may have changed
        yield end - offset, wire.STATE_CHANGED
        return
    count = paths.index(name, depth + 1)
    for table in upper_tables(chain, count, offset, end - offset):
        yield from _pairs(table, np.where(table.kinds != HOLE, wire.STATE_CHANGED, 0).tolist())


def _pairs(table: RunTable, flags: list[int]) -> Iterator[tuple[int, int]]:
    return zip(table.lengths.tolist(), flags, strict=True)
