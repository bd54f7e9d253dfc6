"""A power cut at any moment of any operation that writes, on every kind of image: is everything promised still there?

Each operation runs once, recorded (`tests/support/crash/powercut.py`), in the plans of
`tests/support/crash/cutplans.py`. Every state that a cut could leave is put back into the same inodes, `recover` runs,
and what was promised is read.

Every state is tried where they are few, a seeded sample where they explode: `VMDK_CUT_STATES` is how many there may be
between two barriers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from tests.support.crash.cutplans import KINDS, PLANS, RECOVERED, Cutter, Lost

STATES: Final = int(os.environ.get("VMDK_CUT_STATES", "6"))
LONG: Final = STATES > 6
RENEWED: Final = ("sparse", "zeroed", "flat")
"""Kinds whose overlays can be emptied in place: those in one file."""


ALIKE: Final = {
    "flat": {"create", "write_base", "commit", "commit_delete", "commit_siblings", "resize", "apply", "convert"},
    "zeroed": {"copy_on_write", "commit", "rebase", "flatten", "compact", "repair", "renew", "convert_onto"},
}
"""Plans of kinds that are otherwise like the first: the others are left to the long run."""


def cases(plans: list[str], *, recovery: bool = False) -> list[object]:
    """Return each plan on each kind, without those that every day need not repeat."""
    return [
        pytest.param(plan, kind, id=f"{plan}-{kind}")
        for plan in plans
        for kind in KINDS
        if (plan != "renew" or kind in RENEWED)
        and (LONG or kind not in ALIKE or (plan in ALIKE[kind] and not recovery))
    ]


def judge_all(cutter: Cutter, *, limit: int) -> int:
    """Judge every state; return how many there were."""
    count = 0
    for state in cutter.states(limit=limit):
        count += 1
        try:
            cutter.judge(state)
        except Lost as lost:
            pytest.fail(f"cut before {cutter.event(state)}: {lost}", pytrace=False)
    return count


@pytest.mark.timeout(1200 if LONG else 300)
@pytest.mark.parametrize(("plan", "kind"), cases(list(PLANS)))
def test_a_cut_within_an_operation(tmp_path: Path, plan: str, kind: str) -> None:
    assert judge_all(Cutter(tmp_path, plan, kind), limit=STATES) > 3  # those of a sample that are alike count once


@pytest.mark.timeout(3600 if LONG else 300)
@pytest.mark.parametrize(("plan", "kind"), cases(list(RECOVERED), recovery=True))
def test_a_cut_within_the_recovery(tmp_path: Path, plan: str, kind: str) -> None:
    """From some states that a first cut left: `recover` is cut itself, and runs again."""
    first = Cutter(tmp_path, plan, kind)
    pending = [state for state in first.states(limit=4) if first.is_pending(state)]
    step = max(1, len(pending) // (12 if LONG else 1))
    judged = 0
    for state in pending[len(pending) // 2 :: step] if not LONG else pending[::step]:
        judged += judge_all(first.recovering(state), limit=max(3, STATES // 2))
    assert judged > 2
