"""What an operation tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Progress(NamedTuple):
    """How far a stage is. A callback that raises cancels the operation cleanly."""

    stage: str
    done: int
    """Guest bytes, never decreasing within a stage."""
    total: int
    """Guest bytes, fixed when the stage starts."""


OnProgress = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """Do nothing with progress: the default of every operation."""
