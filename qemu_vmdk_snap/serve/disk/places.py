"""Where each unit of a served disk is, as one number: a request costs two indexings, however deep the chain is.

    place  >= 0: slot << 48 | offset in the file of that slot, the whole unit in one piece
           ZERO: reads as zeros, stored nowhere (a hole of all links, or a mark)
          MIXED: in pieces, deflated, or smaller than a unit: the chain itself is asked

A window is the places of 512 units. It is filled from the run table of that stretch when it is first asked for, and
only a bounded number of windows is kept. Places name files, not depths: they stay right when a new top is added.
"""

from __future__ import annotations

from array import array
from typing import Final

import numpy as np

from qemu_vmdk_snap import Link
from qemu_vmdk_snap.serve.disk.stack import Stack
from qemu_vmdk_snap.vmdk.runs import DATA
from qemu_vmdk_snap.vmdk.runs import ZERO as ZERO_RUN

ZERO: Final = -1
MIXED: Final = -2
SLOT_SHIFT: Final = 48
OFFSET_MASK: Final = (1 << SLOT_SHIFT) - 1
WINDOW_SHIFT: Final = 9
WINDOW_UNITS: Final = 1 << WINDOW_SHIFT
MOST_WINDOWS: Final = 4096

_SMALLEST_UNIT: Final = 4096
_NOMINAL_UNIT: Final = 64 << 10


def unit_of(link: Link) -> int:
    """Return the bytes of a unit of a disk whose top is `link`: its grain, where that is of a usable size."""
    grain = link.grain_bytes
    return grain if grain >= _SMALLEST_UNIT and not grain & (grain - 1) else _NOMINAL_UNIT


class Places:
    """The places of a disk as seen from one link downwards. The caller has the turn of the stack."""

    def __init__(self, stack: Stack, link: Link | None) -> None:
        self._stack, self._link = stack, link
        seen = stack.top if link is None else link
        self.unit = unit_of(seen)
        self.shift = self.unit.bit_length() - 1
        self.capacity = int(seen.capacity)
        self.windows: dict[int, array[int]] = {}

    @property
    def depth(self) -> int:
        """How far below the top the link is now."""
        return 0 if self._link is None else self._stack.links.index(self._link)

    def window(self, number: int) -> array[int]:
        """Return the places of units [512 * number, ...), read from the tables where they are not known."""
        found = self.windows.get(number)
        if found is None:
            if len(self.windows) >= MOST_WINDOWS:
                del self.windows[next(iter(self.windows))]
            found = self.windows[number] = self._load(number)
        return found

    def forget(self, offset: int, length: int) -> None:
        """Ask the tables again about the range when it is used next."""
        shift = self.shift + WINDOW_SHIFT
        for number in range(offset >> shift, (offset + length - 1 >> shift) + 1):
            self.windows.pop(number, None)

    def _load(self, number: int) -> array[int]:
        unit = self.unit
        start = number << (self.shift + WINDOW_SHIFT)
        end = min(start + (unit << WINDOW_SHIFT), self.capacity)
        table = self._stack.chain.resolve(start, end, self.depth)
        edges = np.arange(start, end, unit, dtype=np.int64)
        rows = np.searchsorted(table.starts, edges, "right") - 1
        whole = np.append(table.starts[1:], table.end)[rows] >= np.minimum(edges + unit, end)
        kinds = table.kinds[rows]
        offsets = table.file_offsets[rows] + edges - table.starts[rows]
        slots = self._stack.slots[table.sources[rows]]
        places = np.where(kinds == DATA, slots << SLOT_SHIFT | offsets, MIXED)
        places[kinds <= ZERO_RUN] = ZERO
        places[~whole] = MIXED
        return array("q", places.astype("<i8").tobytes())
