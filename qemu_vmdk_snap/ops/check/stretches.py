"""Where the grains of an extent are in its file: stretches of grains that follow one another, and shared places."""

from __future__ import annotations

from qemu_vmdk_snap.light import Final, dataclass, field
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.vmdk.runs import Int64s

_FOLD_AT: Final = 1 << 20
"""How many stretches are collected before those that share places are joined: a damaged table may repeat one place."""
_EXACT_GRAINS: Final = 1 << 22
"""Up to how many grains shared places are reported one by one."""
_NONE: Final = np.zeros(0, np.int64)


@dataclass(slots=True)
class Stretches:
    """Collects stretches, sectors of the file. Memory: 16 bytes for each that shares no place with another."""

    step: int
    """Sectors of a grain."""
    shared: list[Int64s] = field(default_factory=list)
    """Sectors of grains that overlap another one; of very many only the first of each stretch."""
    shared_count: int = 0
    _parts: list[tuple[Int64s, Int64s]] = field(default_factory=list)
    _held: int = 0
    _fold_at: int = _FOLD_AT

    def add(self, starts: Int64s, ends: Int64s) -> None:
        """Add stretches of whole grains."""
        self._parts.append((starts, ends))
        self._held += len(starts)
        if self._held > self._fold_at:
            self._fold()
            self._fold_at = max(_FOLD_AT, 2 * self._held)

    def sorted(self) -> tuple[Int64s, Int64s]:
        """Return where stretches begin and end, sorted; those that share places are one."""
        self._fold()
        return self._parts[0]

    def shared_sectors(self) -> Int64s:
        """Return the sectors of shared grains, sorted; complete after `sorted`."""
        return np.unique(np.concatenate(self.shared)) if self.shared else _NONE

    def _fold(self) -> None:
        starts, ends = (
            (np.concatenate(columns) for columns in zip(*self._parts, strict=True)) if self._parts else (_NONE, _NONE)
        )
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], ends[order]
        if (starts[1:] < ends[:-1]).any():
            self._note_shared(starts, ends)
            reach = np.maximum.accumulate(ends)
            opens = np.flatnonzero(np.concatenate([[True], starts[1:] >= reach[:-1]]))
            starts, ends = starts[opens], reach[np.append(opens[1:] - 1, len(reach) - 1)]
        self._parts, self._held = [(starts, ends)], len(starts)

    def _note_shared(self, starts: Int64s, ends: Int64s) -> None:
        step = self.step
        if int((ends - starts).sum()) // step <= _EXACT_GRAINS:
            sectors = np.sort(np.concatenate([np.arange(a, b, step) for a, b in zip(starts, ends, strict=True)]))
            over = sectors[1:][np.diff(sectors) < step]
            self.shared.append(np.unique(over))
            self.shared_count += len(over)
            return
        reach = np.maximum.accumulate(ends)[:-1]
        over = np.flatnonzero(starts[1:] < reach) + 1
        inside = np.minimum(reach[over - 1], ends[over]) - starts[over]
        self.shared.append(np.unique(starts[over]))
        self.shared_count += int((-(-inside // step)).sum())
