"""Killed at any point, does taking a repair back leave what the next command brings to its end?

The children kill themselves before their n-th change, for every n: of `take_back`, of `recover` of a killed repair, and
of `recover` of a killed `take_back`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import CorruptChain, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.check.repair import repair, take_back
from qemu_vmdk_snap.ops.journal.recover import recover
from qemu_vmdk_snap.storage.journal.record import Operation, pending_in
from tests.crash.killed.test_killed_operations import SIZE, killed_at, lost_directory, unclean_with_leaks
from tests.support.tree import Tree, line

Fault = Callable[[Tree], None]
FAULTS = [unclean_with_leaks, lost_directory]


class Lab:
    """A repaired image, of which a fresh copy with the same inode is made for every kill."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        folder.mkdir()
        tree = Tree(folder, SIZE)
        line(tree, 2)
        fault(tree)
        self.path, self.undo = tree.path("image-2"), tree.path("image-2").with_name("image-2.vmdk.undo")
        self.model = tree.model["image-2"]
        self.broken = self.path.read_bytes()
        repair(self.path, resolver=confined())
        self.repaired, self.record = self.path.read_bytes(), self.undo.read_bytes()

    def renew(self, content: bytes) -> None:
        """Make the image what it was, in place: an undo file names an inode."""
        self.path.write_bytes(content)
        self.undo.write_bytes(self.record)
        for leftover in self.path.parent.glob(".*"):
            leftover.unlink()

    def is_taken_back(self) -> None:
        # What leaked and was cut off reads as zeros: only what an entry could have named is kept.
        now = self.path.read_bytes()
        assert len(now) == len(self.broken)
        assert now[: len(self.repaired)] == self.broken[: len(self.repaired)] or now == self.broken
        assert pending_in(self.path.parent) == []
        with open_chain(self.path) as chain:
            assert chain.read_at(0, chain.capacity) == self.model

    def can_be_repaired(self) -> None:
        self.undo.unlink(missing_ok=True)
        repair(self.path, resolver=confined())
        self.undo.unlink()
        assert check_image(self.path, resolver=confined()).findings == ()


@pytest.fixture(params=FAULTS, ids=[fault.__name__ for fault in FAULTS])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Lab:
    return Lab(tmp_path / "lab", request.param)


@pytest.mark.parametrize("again", ["take-back", "recover"])
def test_a_killed_take_back_ends(lab: Lab, again: str) -> None:
    number, lived = 0, False
    while not lived:
        lab.renew(lab.repaired)
        lived = killed_at(number, functools.partial(take_back, lab.undo))
        number += 1
        begun, untouched = bool(pending_in(lab.path.parent)), lab.path.read_bytes() == lab.repaired
        if again == "recover":
            recover(lab.path.parent)
        if (begun and again == "take-back") or (untouched and not begun):
            take_back(lab.undo)
        lab.is_taken_back()
    assert number > 5
    lab.can_be_repaired()


def killed_repair(lab: Lab, number: int) -> bool:
    lab.renew(lab.broken)
    lab.undo.unlink()
    return killed_at(number, functools.partial(repair, lab.path, resolver=confined()))


def test_a_killed_recovery_of_a_killed_repair_ends(lab: Lab) -> None:
    """Also between removing the undo file and removing the record."""
    half = next(number for number in range(100) if killed_repair(lab, number) or _is_half(lab))
    number, lived = 0, False
    while not lived:
        killed_repair(lab, half)
        lived = killed_at(number, functools.partial(recover, lab.path.parent))
        number += 1
        recover(lab.path.parent)
        lab.is_taken_back()
        assert not lab.undo.exists()
    assert number > 5
    lab.can_be_repaired()


def _is_half(lab: Lab) -> bool:
    """Return whether the image was changed, and the repair has not ended."""
    return lab.path.read_bytes() != lab.broken and bool(pending_in(lab.path.parent))


def test_without_the_record_a_killed_take_back_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the length of the image tells nothing between the first write and the last."""
    monkeypatch.setattr(Operation, "begin", lambda self: None)
    with pytest.raises((CorruptChain, AssertionError)):
        test_a_killed_take_back_ends(Lab(tmp_path / "lab", unclean_with_leaks), "recover")


@pytest.mark.parametrize("guarded", [True, False], ids=["by the record too", "by the undo file alone"])
def test_what_a_guest_wrote_after_a_killed_take_back_stays(lab: Lab, guarded: bool) -> None:
    assert any(_killed_half(lab, number) for number in range(100))
    raw = bytearray(lab.path.read_bytes())
    at = raw.index(b"\nCID=") + 5
    raw[at : at + 8] = b"0badcafe"  # as QEMU does before it writes
    lab.path.write_bytes(raw)
    if not guarded:  # as where the image could not be read when the repair began
        [pending] = pending_in(lab.path.parent)
        assert pending.operation is not None
        pending.operation.update(cids=[]).hold.close()
    for finish in (lambda: take_back(lab.undo), lambda: recover(lab.path.parent)):
        with pytest.raises(CorruptChain, match="CID 0badcafe"):
            finish()
        assert lab.path.read_bytes() == raw
        assert lab.undo.exists()


def _killed_half(lab: Lab, number: int) -> bool:
    lab.renew(lab.repaired)
    killed_at(number, functools.partial(take_back, lab.undo))
    return lab.path.read_bytes() != lab.repaired and bool(pending_in(lab.path.parent))
