"""Runs: where the bytes of a range of the guest's disk are stored. Every operation uses this map.

A RunTable is the columns of consecutive runs as NumPy arrays, so that resolving, merging and counting work on whole
tables. Its runs cover [start, end) without gap or overlap; offsets are bytes, relative to the maker of the table (an
extent, a link or the whole disk).
"""

from __future__ import annotations

from qemu_vmdk_snap.light import TYPE_CHECKING, Any, Final, NamedTuple, Self, dataclass
from qemu_vmdk_snap.light import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]
    Kinds = npt.NDArray[np.uint8]
else:
    Int64s = Kinds = object  # for annotations alone

HOLE: Final = 0
"""Not in this link: read from the parent, or zeros where there is none."""
ZERO: Final = 1
"""Zeros, whatever the parent contains."""
DATA: Final = 2
"""Stored as it is, at `file_offset` of the source."""
COMPRESSED: Final = 3
"""Stored deflated; one run is (part of) one grain, `file_offset` is where the grain's record begins."""

NO_SOURCE: Final = -1


class Row(NamedTuple):
    """One run of a table, as plain integers."""

    offset: int
    length: int
    kind: int
    source: int
    file_offset: int


@dataclass(frozen=True, slots=True)
class RunTable:
    """Columns of equal length n, one run a row; `end` closes the last run."""

    starts: Int64s
    kinds: Kinds
    sources: Int64s
    file_offsets: Int64s
    end: int

    @classmethod
    def single(cls, start: int, end: int, kind: int, source: int = NO_SOURCE, file_offset: int = 0) -> Self:
        """Return a table of one run."""
        return cls(
            np.array([start], np.int64),
            np.array([kind], np.uint8),
            np.array([source], np.int64),
            np.array([file_offset], np.int64),
            end,
        )

    @classmethod
    def concatenate(cls, tables: list[Self]) -> Self:
        """Return the rows of consecutive tables as one."""
        if len(tables) == 1:
            return tables[0]
        return cls(
            np.concatenate([table.starts for table in tables]),
            np.concatenate([table.kinds for table in tables]),
            np.concatenate([table.sources for table in tables]),
            np.concatenate([table.file_offsets for table in tables]),
            tables[-1].end,
        )

    @property
    def lengths(self) -> Int64s:
        """Length of each run in bytes."""
        return np.diff(self.starts, append=self.end)

    @property
    def has_holes(self) -> bool:
        """Whether any run is read from the parent."""
        return bool((self.kinds == HOLE).any())

    def rows(self) -> list[Row]:
        """Return the runs one by one, for work that is done a run at a time."""
        columns: list[list[Any]] = [
            column.tolist() for column in (self.starts, self.lengths, self.kinds, self.sources, self.file_offsets)
        ]
        return list(map(Row._make, zip(*columns, strict=True)))

    def shifted(self, by: int) -> RunTable:
        """Return the same runs moved by `by` bytes."""
        return RunTable(self.starts + by, self.kinds, self.sources, self.file_offsets, self.end + by)

    def with_source(self, source: int) -> RunTable:
        """Return the same runs, all but the holes naming `source`."""
        sources = np.where(self.kinds != HOLE, source, NO_SOURCE).astype(np.int64)
        return RunTable(self.starts, self.kinds, sources, self.file_offsets, self.end)

    def coalesced(self) -> RunTable:
        """Return the table with neighbours joined wherever one run continues the other."""
        if len(self.starts) < 2:
            return self
        lengths, kinds = self.lengths, self.kinds
        same = (kinds[1:] == kinds[:-1]) & (self.sources[1:] == self.sources[:-1])
        follows = self.file_offsets[1:] == self.file_offsets[:-1] + lengths[:-1]
        stored = kinds[1:] >= DATA
        # Pieces of one compressed grain keep its one file offset.
        one_grain = (kinds[1:] == COMPRESSED) & (self.file_offsets[1:] == self.file_offsets[:-1])
        joined = same & (~stored | ((kinds[1:] == DATA) & follows) | one_grain)
        if not joined.any():
            return self
        keep = np.concatenate([[True], ~joined])
        return RunTable(self.starts[keep], kinds[keep], self.sources[keep], self.file_offsets[keep], self.end)

    def over(self, below: RunTable) -> RunTable:
        """Return the table with its holes filled from `below`, which covers the same range."""
        if not self.has_holes:
            return self
        if len(self.starts) == 1:
            return below
        starts = _merged(self.starts, below.starts)
        upper = np.searchsorted(self.starts, starts, "right") - 1
        lower = np.searchsorted(below.starts, starts, "right") - 1
        hole = self.kinds[upper] == HOLE
        # Drop the cuts of `below` that fall inside runs of ours: they split nothing.
        wanted = hole | (self.starts[upper] == starts)
        starts, upper, lower, hole = starts[wanted], upper[wanted], lower[wanted], hole[wanted]
        mine, theirs = self._advanced(starts, upper), below._advanced(starts, lower)
        return RunTable(
            starts,
            np.where(hole, below.kinds[lower], self.kinds[upper]),
            np.where(hole, below.sources[lower], self.sources[upper]),
            np.where(hole, theirs, mine),
            self.end,
        )

    def _advanced(self, starts: Int64s, rows: npt.NDArray[np.intp]) -> Int64s:
        """File offsets of `starts`, which lie in `rows`: moved on inside stored runs, not inside compressed grains."""
        moved = self.file_offsets[rows] + (starts - self.starts[rows])
        return np.where(self.kinds[rows] == DATA, moved, self.file_offsets[rows])

    def clipped(self, start: int, end: int) -> RunTable:
        """Return the part of the table in [start, end), which it must cover."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        last = int(np.searchsorted(self.starts, end, "left"))
        rows = np.arange(first, last)
        starts = np.maximum(self.starts[first:last], start)
        return RunTable(starts, self.kinds[first:last], self.sources[first:last], self._advanced(starts, rows), end)


def _merged(one: Int64s, two: Int64s) -> Int64s:
    """Return the values of two ascending arrays, ascending, each once."""
    both = np.concatenate([one, two])
    both.sort(kind="stable")  # merges two sorted halves in one pass, which np.union1d does not
    keep = np.ones(len(both), bool)
    np.not_equal(both[1:], both[:-1], out=keep[1:])
    return both[keep]


def from_entries(kinds: Kinds, file_offsets: Int64s, unit: int, start: int, end: int) -> RunTable:
    """Return the runs of consecutive grains of `unit` bytes, the first at `start`; `end` may cut the last short.

    `kinds` and `file_offsets` have one value a grain. Neighbours of one kind become one run; compressed grains stay
    single.
    """
    count = len(kinds)
    cut = np.ones(count, bool)
    if count > 1:
        stored = kinds[1:] >= DATA
        follows = (kinds[1:] == DATA) & (file_offsets[1:] == file_offsets[:-1] + unit)
        cut[1:] = (kinds[1:] != kinds[:-1]) | (stored & ~follows)
    rows = np.flatnonzero(cut)
    kept = kinds[rows]
    return RunTable(
        start + rows * unit,
        kept,
        np.full(len(rows), NO_SOURCE, np.int64),
        np.where(kept >= DATA, file_offsets[rows], 0),
        end,
    )
