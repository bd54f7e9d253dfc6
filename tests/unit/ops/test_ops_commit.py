"""After a commit everything above the base reads what it read, whoever else stands on the links."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qemu_vmdk_snap import InvalidRequest, LockBusy, StillNeeded, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.ops.progress import Progress
from qemu_vmdk_snap.storage.blockfile import BlockFile, open_posix
from tests.support.tree import Tree, line

MIB = 1 << 20
SIZE = 3 * MIB + 1536


@pytest.fixture(params=[(65536, False), (4096, False), (65536, True)], ids=["64k", "4k", "zeroed"])
def tree(tmp_path: Path, request: pytest.FixtureRequest) -> Tree:
    tree = Tree(tmp_path, SIZE)
    grain, zeroed = request.param
    line(tree, 4, grain=grain, zeroed=zeroed)
    return tree


def test_top_is_emptied(tree: Tree) -> None:
    top = tree.path("image-4")
    report = commit(top)
    assert (report.path, report.base, report.relinked, report.deleted) == (top, tree.path("image-3"), (), ())
    tree.model["image-3"] = tree.model["image-4"]
    tree.verify()
    with open_chain(top) as chain:
        assert all(run.depth > 0 for run in chain.map()), "the overlay is empty"


def test_top_is_deleted(tree: Tree) -> None:
    commit(tree.path("image-4"), delete=True)
    tree.model["image-3"] = tree.model["image-4"]
    tree.forget("image-4")
    tree.verify()


def test_middle_link_is_deleted_and_its_children_relinked(tree: Tree) -> None:
    twin = tree.overlay("image-3")
    tree.scribble(twin)
    report = commit(tree.path("image-3"), delete=True)
    assert set(report.relinked) == {tree.path("image-4"), tree.path(twin)}
    tree.model["image-2"] = tree.model["image-3"]
    tree.forget("image-3")
    tree.verify()


def test_middle_link_is_emptied_and_its_children_stay(tree: Tree) -> None:
    report = commit(tree.path("image-3"))
    assert report.relinked == ()
    tree.model["image-2"] = tree.model["image-3"]
    tree.verify()


def test_several_links_are_merged_and_deleted(tree: Tree) -> None:
    report = commit(tree.path("image-4"), base=tree.path("image-1"), delete=True)
    assert len(report.deleted) == 3
    tree.model["image-1"] = tree.model["image-4"]
    for name in ("image-2", "image-3", "image-4"):
        tree.forget(name)
    tree.verify()


def test_links_between_keep_what_they_read(tree: Tree) -> None:
    report = commit(tree.path("image-4"), base=tree.path("image-1"))
    assert report.relinked == (tree.path("image-4"),)
    tree.model["image-1"] = tree.model["image-4"]
    tree.verify()


def test_sibling_is_refused_or_kept(tree: Tree) -> None:
    sibling = tree.overlay("image-2", grain=16384)
    tree.scribble(sibling)
    before = {path: path.read_bytes() for path in tree.folder.iterdir()}
    with pytest.raises(StillNeeded, match=f"{sibling}.vmdk would no longer read the same"):
        commit(tree.path("image-3"))
    assert before == {path: path.read_bytes() for path in tree.folder.iterdir()}
    commit(tree.path("image-3"), keep_siblings=True, delete=True)
    tree.model["image-2"] = tree.model["image-3"]
    tree.forget("image-3")
    tree.verify()


def test_cancelled_while_a_sibling_is_kept(tree: Tree) -> None:
    sibling = tree.overlay("image-1", grain=4096)
    size = tree.path(sibling).stat().st_size

    def cancel(step: Progress) -> None:
        assert step.stage == "keep"
        if tree.path(sibling).stat().st_size > size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(tree.path("image-2"), keep_siblings=True, on_progress=cancel)
    assert main(["image", "check", "-q", str(tree.path(sibling))]) == 0, "nothing leaked"
    assert tree.path(sibling).stat().st_size == size
    tree.verify()


def test_link_between_with_another_child_is_not_deleted(tree: Tree) -> None:
    other = tree.overlay("image-3")
    with pytest.raises(StillNeeded, match=f"is still needed: .*{other}.vmdk names it as its parent"):
        commit(tree.path("image-4"), base=tree.path("image-1"), delete=True)
    tree.verify()


def test_refusals(tree: Tree) -> None:
    with pytest.raises(InvalidRequest, match="has no parent to commit to"):
        commit(tree.path("image-1"))
    with pytest.raises(InvalidRequest, match="is not below it in its backing chain"):
        commit(tree.path("image-2"), base=tree.path("image-3"))
    with open_chain(tree.path("image-3")), pytest.raises(LockBusy):
        commit(tree.path("image-4"))
    with open_chain(tree.path("image-4"), writable=True), pytest.raises(LockBusy):
        commit(tree.path("image-3"), delete=True)
    tree.verify()


def test_a_chain_that_changes_before_it_is_locked(tree: Tree) -> None:
    top, other = tree.path("image-4"), tree.folder / "other.vmdk"
    shutil.copy(top, other)
    rebase(other, tree.path("image-2"))  # what another process makes of the top while we look

    def opener(path: Path, writable: bool) -> BlockFile:
        if path == top and writable and other.exists():
            other.replace(top)
        return open_posix(path, writable)

    with pytest.raises(InvalidRequest, match="its backing chain was changed by another process just now"):
        commit(top, base=tree.path("image-2"), opener=opener)  # two links below it when we looked, one now
    tree.verify()


def test_cancelled(tree: Tree) -> None:
    class Cancelled(Exception):
        pass

    def cancel(step: Progress) -> None:
        if step.done > SIZE // 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        commit(tree.path("image-4"), on_progress=cancel)
    tree.model["image-3"] = tree.read("image-3")  # half merged, as it says
    tree.verify()
    steps: list[Progress] = []
    commit(tree.path("image-4"), on_progress=steps.append)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert (steps[-1].done, steps[-1].total) == (SIZE, SIZE)
    tree.model["image-3"] = tree.model["image-4"]
    tree.verify()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")], ids=["cancelled", "failed"])
def test_too_late_to_be_undone_it_says_how_to_go_on(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def strike(_names: list[str]) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("qemu_vmdk_snap.ops.edit.commit.delete_files", strike)
        assert main(["image", "commit", "-d", str(tree.path("image-4"))]) != 0
    told = capsys.readouterr().err
    assert told.startswith(
        f"qemu-vmdk-snap: {'cancelled' if isinstance(error, KeyboardInterrupt) else error.args[1]} ("
    )
    assert f"(the commit is not finished: `recover {tree.folder}`, or the next command there, finishes" in told
    assert main(["recover", "-q", str(tree.folder)]) == 0
    tree.model["image-3"] = tree.model["image-4"]
    tree.forget("image-4")
    tree.verify()


def test_command(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "commit", "-d", str(tree.path("image-4"))]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{tree.path('image-4')}: deleted", "Image committed."]
    assert main(["recover", str(tree.folder)]) == 0
    assert capsys.readouterr().out == "Nothing to recover.\n"
