"""What a server has done so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(slots=True)
class Statistics:
    """Counters of one server, changed with the turn in hand; bytes are the guest's."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    flushes: int = 0
    trims: int = 0
    zeroes: int = 0
    failures: int = 0
    last_failure: str | None = None

    def failed(self, error: BaseException) -> None:
        """Count a request that failed, and keep why."""
        self.failures += 1
        self.last_failure = str(error)

    def as_dict(self) -> dict[str, object]:
        """Return the counters with the names that the control socket has."""
        return dataclasses.asdict(self)
