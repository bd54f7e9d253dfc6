"""What a check finds: each finding names the file, the byte, the value there and the rule it breaks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.light import Final, dataclass

LISTED: Final = 50
"""Findings of one field in one file that are listed one by one; the rest is only counted."""


class Severity(StrEnum):
    """What a finding means for the data."""

    CORRUPTION = "corruption"
    """What the guest reads is wrong or in doubt, or a later write may destroy data."""
    ERROR = "error"
    """Something could not be checked; this says nothing about the data."""
    LEAK = "leak"
    """Space that nothing refers to: waste, no harm."""
    NOTE = "note"
    """Worth knowing; counts neither as an error nor as a leak."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule."""

    severity: Severity
    path: Path
    offset: int
    """Byte of the file where the value is."""
    field: str
    value: object
    rule: str
    count: int = 1
    """How many entries, grains or values it stands for."""

    def __str__(self) -> str:
        return f"{self.path}: byte {self.offset:#x}: {self.field} = {self.value!r}: {self.rule}"

    def as_dict(self) -> dict[str, object]:
        """Return the finding with JSON's own types."""
        value = self.value if isinstance(self.value, int | str | None) else repr(self.value)
        return {
            "severity": str(self.severity),
            "filename": str(self.path),
            "offset": self.offset,
            "field": self.field,
            "value": value,
            "rule": self.rule,
            "count": self.count,
        }


@dataclass(slots=True)
class GrainCounts:
    """Counts over the tables of an extent, in grains."""

    total: int = 0
    allocated: int = 0
    fragmented: int = 0
    """Allocated grains that do not follow the allocated grain before them in the file."""
    compressed: int = 0

    def add(self, other: GrainCounts) -> None:
        """Add the counts of another extent."""
        self.total += other.total
        self.allocated += other.allocated
        self.fragmented += other.fragmented
        self.compressed += other.compressed


class Findings:
    """Collects findings: counts all of them, lists the first `LISTED` of each field in each file."""

    def __init__(self) -> None:
        self.listed: list[Finding] = []
        self._counts: Counter[Severity] = Counter()
        self._per_field: Counter[tuple[Path, str]] = Counter()
        self.repairable = 0
        """How many notes are on values that a repair corrects, though the data is right."""

    def add(
        self, severity: Severity, path: Path, offset: int, field: str, value: object, rule: str, count: int = 1
    ) -> None:
        """Note one finding, which stands for `count` entries or grains."""
        self._counts[severity] += count
        kind = field.rstrip("0123456789 ")
        self._per_field[path, kind] += 1
        if self._per_field[path, kind] <= LISTED:
            self.listed.append(Finding(severity, path, offset, field, value, rule, count))

    def corrupt(self, path: Path, offset: int, field: str, value: object, rule: str, count: int = 1) -> None:
        """Note a corruption."""
        self.add(Severity.CORRUPTION, path, offset, field, value, rule, count)

    def broken(self, error: FormatError) -> None:
        """Add what the parser refused."""
        self.corrupt(error.path, error.offset, error.field, error.value, error.rule)

    def unchecked(self, path: Path, offset: int, field: str, value: object, rule: str) -> None:
        """Note what could not be checked."""
        self.add(Severity.ERROR, path, offset, field, value, rule)

    def corrupt_many(self, path: Path, field: str, items: Iterable[tuple[int, object, str]], count: int) -> None:
        """Note `count` corruptions; of `items` (byte, value, rule) only as many are worked out as are still listed."""
        self._add_many(Severity.CORRUPTION, path, field, items, count)

    def repairable_many(self, path: Path, field: str, items: Iterable[tuple[int, object, str]], count: int) -> None:
        """Note `count` values that are not damage, and that a repair or the next writer corrects."""
        self._add_many(Severity.NOTE, path, field, items, count)
        self.repairable += count

    def _add_many(
        self, severity: Severity, path: Path, field: str, items: Iterable[tuple[int, object, str]], count: int
    ) -> None:
        room = max(0, LISTED - self._per_field[path, field])
        for offset, value, rule in itertools.islice(items, room):
            self.listed.append(Finding(severity, path, offset, field, value, rule))
        self._per_field[path, field] += count
        self._counts[severity] += count

    def count(self, severity: Severity) -> int:
        """Return how many findings of the severity there were, listed or not."""
        return self._counts[severity]
