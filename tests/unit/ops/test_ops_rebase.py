"""After a rebase, a flatten or a removal every image that is left reads what it read."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap import CidMismatch, CorruptChain, InvalidRequest, LockBusy, create_image, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.ops.edit.remove import remove
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


def test_onto_an_ancestor(tree: Tree) -> None:
    report = rebase(tree.path("image-4"), tree.path("image-1"))
    assert (report.path, report.parent) == (tree.path("image-4"), tree.path("image-1"))
    with open_chain(tree.path("image-4")) as chain:
        assert [link.path.name for link in chain.links] == ["image-4.vmdk", "image-1.vmdk"]
    tree.verify()


def test_onto_another_branch(tree: Tree) -> None:
    branch = tree.overlay("image-2", grain=16384)
    tree.scribble(branch)
    rebase(tree.path("image-4"), tree.path(branch))
    tree.verify()


def test_onto_an_image_with_nothing_in_common(tree: Tree) -> None:
    other = tree.base(grain=8192)
    tree.scribble(other, 30)
    rebase(tree.path("image-3"), tree.path(other))
    tree.verify()  # image-4 stands on image-3


def test_only_what_differs_is_copied(tree: Tree) -> None:
    twin = tree.overlay("image-1")
    with open_chain(tree.path("image-2")) as chain:
        same = [(row.offset, chain.read_at(row.offset, row.length)) for row in chain.rows() if row.source == 0]
    for offset, data in same:
        tree.write(twin, offset, data)
    before = tree.path("image-3").stat().st_size
    rebase(tree.path("image-3"), tree.path(twin))
    tree.verify()
    grown = tree.path("image-3").stat().st_size - before
    assert grown <= tree.path("image-2").stat().st_size // 4


def test_flatten(tree: Tree) -> None:
    rebase(tree.path("image-3"), None)
    with open_chain(tree.path("image-3")) as chain:
        assert chain.depth == 1
        assert chain.links[0].hint is None
    tree.verify()


def test_unsafe(tree: Tree) -> None:
    moved = tree.folder / "elsewhere.vmdk"
    tree.path("image-3").rename(moved)
    with pytest.raises(CorruptChain):
        tree.read("image-4")
    rebase(tree.path("image-4"), moved, unsafe=True)
    assert tree.read("image-4") == tree.model["image-4"]
    moved.rename(tree.path("image-3"))
    rebase(tree.path("image-4"), tree.path("image-3"), unsafe=True)
    tree.verify()


def test_unsafe_takes_the_cid_of_a_parent_that_was_written(tree: Tree) -> None:
    with open_chain(tree.path("image-3"), writable=True) as chain:
        chain.write_at(0, chain.read_at(0, 512))
    with pytest.raises(CidMismatch):
        tree.read("image-4")
    with pytest.raises(CidMismatch):
        rebase(tree.path("image-4"), tree.path("image-2"))
    rebase(tree.path("image-4"), tree.path("image-3"), unsafe=True)
    tree.verify()


def test_smaller_new_parent(tree: Tree) -> None:
    small = tree.folder / "small.vmdk"
    create_image(small, MIB, durable=False)
    with open_chain(small, writable=True) as chain:
        chain.write_at(0, b"x" * MIB)
    rebase(tree.path("image-2"), small)
    for name in ("image-2", "image-3", "image-4"):
        assert tree.read(name) == tree.model[name]


def test_refusals(tree: Tree) -> None:
    with pytest.raises(InvalidRequest, match="which is backed by it"):
        rebase(tree.path("image-2"), tree.path("image-4"))
    with pytest.raises(InvalidRequest, match="its own parent"):
        rebase(tree.path("image-2"), tree.path("image-2"), unsafe=True)
    with open_chain(tree.path("image-4")), pytest.raises(LockBusy):
        rebase(tree.path("image-4"), None)
    with open_chain(tree.path("image-4")), pytest.raises(LockBusy):
        remove(tree.path("image-3"))
    with pytest.raises(CorruptChain, match="is not backed by"):
        remove(tree.path("image-3"), children=[tree.path("image-1")])
    tree.verify()


@pytest.mark.parametrize("name", ["image-1", "image-2", "image-3", "image-4"])
def test_remove(tree: Tree, name: str) -> None:
    twin = tree.overlay(name)
    tree.scribble(twin)
    report = remove(tree.path(name))
    assert set(report.moved) == {tree.path(child) for child in tree.children(name)}
    tree.forget(name)
    tree.verify()


def test_unsafe_makes_no_loop(tree: Tree) -> None:
    """Through links that hold together or not, by whatever name."""
    names = ["image-1", "image-2", "image-3", "image-4"]
    before = {name: tree.path(name).read_bytes() for name in names}
    alias = tree.folder / "alias.vmdk"
    alias.hardlink_to(tree.path("image-2"))
    for path, parent in [("image-2", tree.path("image-4")), ("image-1", tree.path("image-2")), ("image-2", alias)]:
        with pytest.raises(InvalidRequest, match=r"^\S+: cannot have \S+ as its parent, which is backed by it$"):
            rebase(tree.path(path), parent, unsafe=True)
    alias.unlink()
    assert {name: tree.path(name).read_bytes() for name in names} == before
    with open_chain(tree.path("image-4"), writable=True) as chain:
        chain.write_at(0, b"CID")
    rebase(tree.path("image-1"), None, unsafe=True)
    with open_chain(tree.path("image-2"), writable=True) as chain:
        chain.write_at(0, b"CID")  # from here on image-3 does not fit, and yet stands on it
    with pytest.raises(InvalidRequest, match="which is backed by it"):
        rebase(tree.path("image-1"), tree.path("image-4"), unsafe=True)


def test_nobody_writes_an_image_that_is_being_removed(tree: Tree) -> None:
    refused = []

    def opener(path: Path, writable: bool) -> BlockFile:
        if path == tree.path("image-4"):  # the first file of the child's chain: the rest of it is not locked by it yet
            with pytest.raises(LockBusy) as caught:
                open_chain(tree.path("image-3"), writable=True).close()
            refused.append(caught.value.path)
        return open_posix(path, writable)

    remove(tree.path("image-3"), opener=opener)
    assert set(refused) == {tree.path("image-3")}
    tree.forget("image-3")
    tree.verify()


def test_cancelled(tree: Tree) -> None:
    class Cancelled(Exception):
        pass

    def cancel(step: Progress) -> None:
        if step.done > SIZE // 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        rebase(tree.path("image-4"), None, on_progress=cancel)
    tree.verify()
    with pytest.raises(Cancelled):
        remove(tree.path("image-1"), on_progress=cancel)
    tree.verify()
    steps: list[Progress] = []
    rebase(tree.path("image-4"), None, on_progress=steps.append)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert (steps[-1].done, steps[-1].total) == (SIZE, SIZE)


def test_commands(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "rebase", "-b", str(tree.path("image-1")), str(tree.path("image-3"))]) == 0
    assert capsys.readouterr().out == ""
    assert main(["image", "remove", str(tree.path("image-2"))]) == 0
    assert capsys.readouterr().out == "Image removed.\n"
    tree.forget("image-2")
    assert main(["image", "rebase", "-b", "", str(tree.path("image-4"))]) == 0
    assert main(["image", "rebase", "-u", "-b", str(tree.path("image-4")), str(tree.path("image-3"))]) == 0
    with open_chain(tree.path("image-3")) as chain:
        assert chain.links[1].path == tree.path("image-4")
