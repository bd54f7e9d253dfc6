"""The runs of a small chain one by one, without NumPy: the same as its tables give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qemu_vmdk_snap.chain.link import Link
from qemu_vmdk_snap.light import Final, Protocol, runtime_checkable
from qemu_vmdk_snap.vmdk.runs import COMPRESSED, DATA, HOLE, NO_SOURCE, ZERO, Row
from qemu_vmdk_snap.vmdk.sparse.small import Piece

_MAX_ENTRIES: Final = 1 << 16
"""Of the grain tables of all links, to be gone through in some tens of milliseconds."""


@runtime_checkable
class InPieces(Protocol):
    """An extent that may be small."""

    def small_entries(self) -> int | None:
        """Return how many table entries it has to go through; None where it is not small, or is written."""

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Yield what is where in [start, end), in order, where `small_entries` is a number."""


def is_small(links: Sequence[Link]) -> bool:
    """Return whether `small_rows` can be asked."""
    total = 0
    for link in links:
        for placed in link.extents:
            count = placed.extent.small_entries() if isinstance(placed.extent, InPieces) else None
            if count is None:
                return False
            total += count
    return total <= _MAX_ENTRIES


def small_rows(links: Sequence[Link], start: int, end: int) -> Iterator[Row]:
    """Yield the runs of [start, end) as seen through all of `links`, neighbours joined."""
    last: Row | None = None
    for row in _through(links, 0, start, end):
        if last is not None:
            if continues(last, row):
                last = last._replace(length=last.length + row.length)
                continue
            yield last
        last = row
    if last is not None:
        yield last


def continues(last: Row, row: Row) -> bool:
    """Return whether `row`, which begins where `last` ends, belongs to it."""
    if (last.kind, last.source) != (row.kind, row.source):
        return False
    if row.kind == DATA:
        return row.file_offset == last.file_offset + last.length
    return row.kind != COMPRESSED or row.file_offset == last.file_offset


def _through(links: Sequence[Link], depth: int, start: int, end: int) -> Iterator[Row]:
    link = links[depth]
    for placed, first, stop in link.overlapping(start, end):
        extent = placed.extent
        assert isinstance(extent, InPieces)
        for offset, length, kind, file_offset in extent.pieces(first, stop):
            at = placed.start + offset
            if kind != HOLE:
                yield Row(at, length, kind, placed.source, file_offset)
            elif depth + 1 < len(links):
                yield from _through(links, depth + 1, at, at + length)
            else:
                yield Row(at, length, HOLE, NO_SOURCE, 0)
    if end > link.capacity:
        at = max(start, link.capacity)
        yield Row(at, end - at, ZERO, NO_SOURCE, 0)
