"""The progress that an operation reports while it runs."""

from __future__ import annotations

from collections.abc import Callable

from qemu_vmdk_snap.light import NamedTuple


class Progress(NamedTuple):
    """The progress of a stage. A callback that raises cancels the operation cleanly."""

    stage: str
    done: int
    """Guest bytes, never decreasing within a stage."""
    total: int
    """Guest bytes, fixed when the stage starts."""


OnProgress = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """Do nothing with progress: the default of every operation."""


class Meter:
    """Counts guest bytes for the callback: within a row by steps, then exactly where the row ends."""

    def __init__(self, stage: str, total: int, on_progress: OnProgress) -> None:
        self._stage, self._total, self._report, self._done = stage, total, on_progress, 0

    def step(self, length: int) -> None:
        """Note `length` more bytes."""
        self._done = min(self._total, self._done + length)
        self._report(Progress(self._stage, self._done, self._total))

    def reach(self, offset: int) -> None:
        """Note that everything up to `offset` is done; reported if it has advanced."""
        if offset > self._done:
            self._done = offset
            self._report(Progress(self._stage, offset, self._total))
