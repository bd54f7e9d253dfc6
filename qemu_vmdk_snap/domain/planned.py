"""A disk that takes part in a change of a domain's snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PlannedDisk:
    """A disk that takes part."""

    target: str
    overlay: Path
    chain: tuple[Path, ...]
    """The files that are there now, the top first."""

    @property
    def frozen(self) -> Path:
        """The top of today, the parent of the overlay."""
        return self.chain[0]
