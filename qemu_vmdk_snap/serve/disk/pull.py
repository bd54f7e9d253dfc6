"""Copying what one link stores into the link above it, piece by piece, while clients write the disk.

Each piece is copied in one turn: nobody writes between the look at the tables and the copy. A link above reads the same
before and after, so nobody notices when this stops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from qemu_vmdk_snap import HOLE, Link
from qemu_vmdk_snap.chain.windows import windows
from qemu_vmdk_snap.ops.copy.transfer import LinkWriter, View, restricted
from qemu_vmdk_snap.serve.disk.stack import Stack
from qemu_vmdk_snap.units import MIB

PIECE: Final = MIB
_FLUSH_EVERY: Final = 256 * MIB


def stored_pieces(stack: Stack, lower: Link) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the pieces of the disk of which `lower` stores anything."""
    for start, stop in windows([lower.extents], 0, lower.capacity):
        with stack.turn:
            table = lower.resolve(start, stop)
        last = -1
        for row in table.rows():
            if row.kind == HOLE:
                continue
            for piece in range(max(row.offset // PIECE, last + 1), -(-(row.offset + row.length) // PIECE)):
                yield piece * PIECE, min((piece + 1) * PIECE, lower.capacity)
                last = piece


class Puller:
    """Copies into one link of the stack that is open for writing: nobody else may have its tables in memory."""

    def __init__(self, stack: Stack, target: Link, lower: Link) -> None:
        self._stack, self._target, self._lower = stack, target, lower
        self._unflushed = 0

    def pull(self, start: int, end: int) -> int:
        """Copy what the target lacks of the piece; return the bytes that were copied."""
        stack = self._stack
        end = min(end, int(self._target.capacity))
        if start >= end:
            return 0
        stack.gate.wait()
        with stack.turn:
            copied = self._pull(start, end)
            self._unflushed += copied
            if self._unflushed >= _FLUSH_EVERY:
                self.flush()
        return copied

    def flush(self) -> None:
        """Make all that was copied durable; the caller has the turn."""
        self._unflushed = 0
        if self._target is self._stack.top:
            self._stack.flush()
        else:
            self._target.flush()

    def _pull(self, start: int, end: int) -> int:
        stack, chain = self._stack, self._stack.chain
        depth = stack.links.index(self._lower)
        held = self._lower.resolve(start, end).with_source(0)
        mine = self._target.resolve(start, end)
        wanted = restricted(chain.resolve(start, end, depth), (mine, True), (held, False))
        if not wanted:
            return 0
        above = stack.links.index(self._target)
        writer = LinkWriter(self._target, View(chain, above + 1), lambda _: None, later=View(chain, depth + 1))
        live = self._target is stack.top
        with stack.noting_late() if live else contextlib.nullcontext():
            writer.put_rows(wanted, chain)
        if live:
            stack.moved(start, end - start)
        return sum(row.length for row in wanted)
