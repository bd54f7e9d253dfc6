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
    """The current files, the top first."""

    @property
    def frozen(self) -> Path:
        """The current top, which becomes the parent of the overlay."""
        return self.chain[0]

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types; its chain is the one with the overlay."""
        return {
            "target": self.target,
            "frozen": str(self.frozen),
            "overlay": str(self.overlay),
            "chain": [str(self.overlay), *map(str, self.chain)],
        }
