"""Killed at any point, does every operation leave each surviving snapshot as it was, and does `recover` finish it?

The operation runs in a forked child that kills itself with SIGKILL just before its n-th call that changes anything on
disk, for every n. So there is no point between two changes that is not tried.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from qemu_vmdk_snap import VmdkSnapError, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.check.repair import repair
from qemu_vmdk_snap.ops.copy.diff import changes
from qemu_vmdk_snap.ops.edit.apply import apply_delta
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.compact import compact
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.ops.edit.remove import remove
from qemu_vmdk_snap.ops.edit.resize import resize
from qemu_vmdk_snap.ops.journal.recover import recover
from qemu_vmdk_snap.storage.journal.record import Operation
from tests.support.esxi import cowd
from tests.support.tree import Tree, line

SIZE: Final = (1 << 20) + 1536
CHANGES: Final = (
    "pwrite",
    "ftruncate",
    "copy_file_range",
    "fsync",
    "fdatasync",
    "replace",
    "rename",
    "unlink",
    "link",
)


class Case(NamedTuple):
    name: str
    run: Callable[[Tree], object]
    after: Callable[[Tree], None]
    """Changes the model to what holds when the operation is done."""
    changing: frozenset[str]
    """Images whose content the operation may change: the base of a merge."""


def _committed(top: str, base: str, gone: tuple[str, ...] = ()) -> Callable[[Tree], None]:
    def after(tree: Tree) -> None:
        tree.model[base] = tree.model[top]
        for name in gone:
            tree.forget(name)

    return after


def _nothing(tree: Tree) -> None:
    pass


def _applied(tree: Tree) -> None:
    """The fourth image taken as a delta: what it stores replaces what the third has there."""
    with open_chain(tree.path("image-4")) as chain:
        found = list(changes(chain, 1))
    content = bytearray(tree.model["image-3"])
    for offset, length, _ in found:
        content[offset : offset + length] = tree.model["image-4"][offset : offset + length]
    tree.model["image-3"] = bytes(content)


def _grown(tree: Tree) -> None:
    tree.model["image-3"] += bytes((40 << 20) - SIZE)


CASES: Final = [
    Case(
        "commit-top",
        lambda tree: commit(tree.path("image-3"), keep_siblings=True),
        _committed("image-3", "image-2"),
        frozenset({"image-2"}),
    ),
    Case(
        "commit-delete-middle",
        lambda tree: commit(tree.path("image-2"), delete=True, keep_siblings=True),
        _committed("image-2", "image-1", ("image-2",)),
        frozenset({"image-1", "image-2"}),
    ),
    Case(
        "commit-deep",
        lambda tree: commit(tree.path("image-3"), base=tree.path("image-1")),
        _committed("image-3", "image-1"),
        frozenset({"image-1"}),
    ),
    Case("compact", lambda tree: compact(tree.path("image-2")), _nothing, frozenset()),
    Case("resize", lambda tree: resize(tree.path("image-3"), 40 << 20), _grown, frozenset({"image-3"})),
    Case(
        "apply",
        lambda tree: apply_delta(tree.path("image-4"), tree.path("image-3"), force=True),
        _applied,
        frozenset({"image-3"}),
    ),
    Case("rebase", lambda tree: rebase(tree.path("image-3"), tree.path("image-4")), _nothing, frozenset()),
    Case("flatten", lambda tree: rebase(tree.path("image-2"), None), _nothing, frozenset()),
    Case(
        "remove", lambda tree: remove(tree.path("image-2")), lambda tree: tree.forget("image-2"), frozenset({"image-2"})
    ),
]


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    assert isinstance(request.param, Case)
    return request.param


def planted(folder: Path) -> Tree:
    """A chain of three, and a fourth image beside the third."""
    folder.mkdir()
    tree = Tree(folder, SIZE)
    line(tree, 3)
    tree.scribble(tree.overlay("image-2", grain=16384))
    return tree


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies before its change number `number`; return whether it lived to the end."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return False
        assert os.WEXITSTATUS(status) == 0, "the operation failed"
        return True
    left = [number]

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **keywords: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **keywords)

        return wrapper

    try:
        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        fcntl.ioctl = counted(fcntl.ioctl)  # type: ignore[assignment]
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_killed_before_every_change(case: Case, tmp_path: Path) -> None:
    origin = planted(tmp_path / "origin")
    number, lived = 0, False
    while not lived:
        tree = copy_of(origin, tmp_path / "run")
        lived = killed_at(number, functools.partial(case.run, tree))
        number += 1
        readable = survivors_read_the_same(tree, case)
        recovered = recover(tree.folder)
        if lived or recovered:
            case.after(tree)
            tree.verify(leaks=False)
        elif readable:  # nothing had begun, or it had ended: a record tells of everything between
            done = copy_of(tree, tree.folder, files=False)
            case.after(done)
            assert reads_as(tree, done) or reads_as(tree, tree)
        assert recover(tree.folder) == []
        assert readable or recovered, "what cannot be read is mended by recover alone"
    assert number > 10, "the operation changes something"


def survivors_read_the_same(tree: Tree, case: Case) -> bool:
    """Return whether all that survives can be read; what can be must read what it read."""
    readable = True
    for name in tree.model.keys() - case.changing:
        try:
            content = tree.read(name)
        except VmdkSnapError:
            readable = False
        else:
            assert content == tree.model[name], f"{name} reads something else after the kill"
    return readable


def reads_as(tree: Tree, model: Tree) -> bool:
    """Return whether the files of `tree` are what `model` says, leaving temporary files aside."""
    if {name for name in tree.files() if not name.startswith(".")} != {f"{name}.vmdk" for name in model.model}:
        return False
    return all(tree.read(name) == model.model[name] for name in model.model)


def copy_of(tree: Tree, folder: Path, *, files: bool = True) -> Tree:
    if files:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tree.folder, folder)
    copy = Tree(folder, tree.size)
    copy.model, copy.parents = dict(tree.model), dict(tree.parents)
    return copy


def unclean_with_leaks(tree: Tree) -> None:
    with tree.path("image-2").open("r+b") as file:
        file.seek(72)
        file.write(b"\1")  # not closed cleanly
        file.seek(0, os.SEEK_END)
        file.write(b"leaked" * 30000)


def lost_directory(tree: Tree) -> None:
    with tree.path("image-2").open("r+b") as file:
        file.seek(56)
        file.write(bytes([255]) * 8)


@pytest.mark.parametrize("fault", [unclean_with_leaks, lost_directory])
def test_killed_repair_is_taken_back_and_can_be_asked_for_again(tmp_path: Path, fault: Callable[[Tree], None]) -> None:
    (tmp_path / "origin").mkdir()
    origin = Tree(tmp_path / "origin", SIZE)
    line(origin, 2)
    fault(origin)
    number, lived = 0, False
    while not lived:
        tree = copy_of(origin, tmp_path / "run")
        path = tree.path("image-2")
        lived = killed_at(number, functools.partial(repair, path, resolver=confined()))
        number += 1
        assert tree.read("image-2") == tree.model["image-2"]
        recover(tree.folder)
        path.with_name("image-2.vmdk.undo").unlink(missing_ok=True)
        repair(path, resolver=confined())
        path.with_name("image-2.vmdk.undo").unlink(missing_ok=True)
        assert reads_as(tree, tree)
        assert check_image(path, resolver=confined()).findings == ()
    assert number > 10


def test_killed_repair_of_cowd(tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    grains = {grain: bytes([grain + 1]) * 512 for grain in (0, 1, 2, 50)}
    cowd(tmp_path / "origin" / "disk.vmdk", 5000, grains)
    with (tmp_path / "origin" / "disk.vmdk").open("r+b") as file:
        file.seek(28)
        (free,) = struct.unpack("<I", file.read(4))
        file.seek(28)
        file.write(struct.pack("<I", free - 2))
        file.seek(5 * 512 + 7 * 4)
        file.write(struct.pack("<I", free - 1))  # grain 7 where grain 50 is
    model = bytearray(5000 * 512)
    for grain, data in {**grains, 7: grains[50]}.items():
        model[grain * 512 : grain * 512 + 512] = data
    number, lived = 0, False
    while not lived:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "origin", tmp_path / "run")
        path = tmp_path / "run" / "disk.vmdk"
        lived = killed_at(number, functools.partial(repair, path, resolver=confined()))
        number += 1
        recover(path.parent)
        path.with_name("disk.vmdk.undo").unlink(missing_ok=True)
        repair(path, resolver=confined())
        with open_chain(path) as chain:
            assert chain.read_at(0, chain.capacity) == model
        assert check_image(path, resolver=confined()).findings == ()
    assert number > 10


def test_without_the_intent_record_the_kill_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: between the two CIDs of a commit, nothing but the record makes the chain readable again."""
    monkeypatch.setattr(Operation, "begin", lambda self: None)
    with pytest.raises(AssertionError, match="is mended by recover alone"):
        test_killed_before_every_change(CASES[0], tmp_path)
