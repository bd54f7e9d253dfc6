"""What the doctor says of one thing, and how it can be put right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Verdict = Literal["good", "note", "bad"]


class Repair(NamedTuple):
    """What `doctor --repair` does about a finding."""

    what: str
    """What has been done then, as a line of a report."""
    do: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its result."""

    subject: str
    verdict: Verdict
    """`note`: could be better, but does not prevent anything."""
    found: str
    remedy: str | None = None
    """What the user can do, where something can be done."""
    repair: Repair | None = field(default=None, compare=False, repr=False)

    @property
    def text(self) -> str:
        """Return what was found, with the remedy beside it."""
        return self.found if self.remedy is None else f"{self.found}: {self.remedy}"

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"subject": self.subject, "verdict": self.verdict, "text": self.text, "remedy": self.remedy}
