"""Are faults counted once, and shown in one line for each kind?"""

from __future__ import annotations

import pytest

from qemu_vmdk_snap.vmdk import noted
from qemu_vmdk_snap.vmdk.noted import Notes


def test_the_first_of_each_kind_stands_for_all() -> None:
    notes, other = Notes(), Notes()
    notes.add("grain", "grain 1 is cut", case=1)
    notes.add("size", "the size is odd")
    notes.add("grain", "grain 2 is cut", case=2)
    notes.add("grain", "grain 1 is cut", case=1)
    assert list(notes) == ["grain 1 is cut (and 1 more like it)", "the size is odd"]
    other.add("grain", "grain 9 is cut", case=1)
    other.merge(notes)
    assert list(other) == ["grain 9 is cut (and 2 more like it)", "the size is odd"]


def test_the_count_is_bounded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noted, "MOST_COUNTED", 4)
    notes = Notes()
    for case in range(10):
        notes.add("grain", f"grain {case} is cut", case=case)
    assert list(notes) == ["grain 0 is cut (and at least 3 more like it)"]
