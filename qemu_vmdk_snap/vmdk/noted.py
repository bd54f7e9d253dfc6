"""Faults of an extent that do not prevent reading it, in few lines, however many there are."""

from __future__ import annotations

from collections.abc import Iterator

from qemu_vmdk_snap.light import Final

MOST_COUNTED: Final = 1 << 16
"""How many cases of one kind in one extent are distinguished, to bound the memory."""


class Notes:
    """Of each kind of fault the first case, in one line, and how many cases there are. Iterates over the lines."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._cases: dict[str, set[int]] = {}

    def add(self, kind: str, line: str, *, case: int | None = None, count: int = 1) -> None:
        """Add `count` faults of the kind, of which `line` says the first.

        A `case`, a number that identifies a fault of the kind, counts once, however often it is added.
        """
        if case is not None:
            cases = self._cases.setdefault(kind, set())
            if case in cases or len(cases) == MOST_COUNTED:
                return
            cases.add(case)
        self._first.setdefault(kind, line)
        self._counts[kind] = self._counts.get(kind, 0) + count

    def merge(self, other: Notes) -> None:
        """Add the faults of another extent."""
        for kind, line in list(other._first.items()):
            self.add(kind, line, count=other._counts[kind])

    def __iter__(self) -> Iterator[str]:
        """Yield the lines in the order in which the kinds were found."""
        for kind, line in list(self._first.items()):  # another thread may read, and add
            more = self._counts[kind] - 1
            least = "at least " if len(self._cases.get(kind, ())) == MOST_COUNTED else ""
            yield f"{line} (and {least}{more} more like it)" if more else line
