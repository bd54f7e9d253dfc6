"""A delta holds what changed, reads as the top beside its base, and makes a copy of the base into the top."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qemu_vmdk_snap import CidMismatch, CorruptChain, InvalidRequest, StillNeeded, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.copy.diff import changes, depth_of, make_delta
from qemu_vmdk_snap.ops.edit.apply import apply_delta
from qemu_vmdk_snap.ops.journal.recover import recover
from qemu_vmdk_snap.ops.progress import Progress
from tests.support.tree import Tree, line

MIB = 1 << 20
SIZE = 2 * MIB + 1536


@pytest.fixture(params=[(65536, False), (4096, False), (65536, True)], ids=["64k", "4k", "zeroed"])
def tree(tmp_path: Path, request: pytest.FixtureRequest) -> Tree:
    (tmp_path / "live").mkdir()
    tree = Tree(tmp_path / "live", SIZE)
    grain, zeroed = request.param
    line(tree, 4, grain=grain, zeroed=zeroed)
    return tree


STREAM = True


@pytest.fixture(autouse=True, params=[True, False], ids=["stream", "sparse"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "STREAM", request.param)


def delta(tree: Tree, base: str, top: str, path: Path) -> Path:
    with open_chain(tree.path(top)) as chain:
        make_delta(chain, depth_of(chain, tree.path(base)), path, stream=STREAM)
    return path


def test_changes_cover_every_byte_that_differs(tree: Tree) -> None:
    with open_chain(tree.path("image-4")) as chain:
        found = list(changes(chain, depth_of(chain, tree.path("image-2"))))
    old, new = tree.model["image-2"], tree.model["image-4"]
    patched = bytearray(old)
    for offset, length, zero in found:
        patched[offset : offset + length] = new[offset : offset + length]
        assert not zero or not any(new[offset : offset + length])
    assert patched == new
    assert sum(change.length for change in found) < SIZE, "not everything changed"


def test_delta_beside_its_base_reads_as_the_top(tree: Tree) -> None:
    path = delta(tree, "image-1", "image-3", tree.folder / "delta.vmdk")
    with open_chain(path) as chain, open_chain(tree.path("image-3")) as top:
        assert chain.depth == 2
        assert chain.links[0].cid == top.links[0].cid
        assert chain.read_at(0, SIZE) == tree.model["image-3"]


def test_incremental_backup_and_restore(tree: Tree, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    backup.mkdir()
    shutil.copy(tree.path("image-1"), backup / "full.vmdk")
    first = delta(tree, "image-1", "image-2", backup / "first.vmdk")
    second = delta(tree, "image-2", "image-4", backup / "second.vmdk")
    with pytest.raises(CidMismatch):
        apply_delta(second, backup / "full.vmdk")
    for path, name in ((first, "image-2"), (second, "image-4")):
        report = apply_delta(path, backup / "full.vmdk")
        with open_chain(backup / "full.vmdk") as chain:
            assert chain.read_at(0, SIZE) == tree.model[name]
            assert chain.links[0].cid == report.cid


def test_force(tree: Tree, tmp_path: Path) -> None:
    copy = tmp_path / "copy.vmdk"
    assert main(["image", "convert", "-O", "vmdk", str(tree.path("image-2")), str(copy)]) == 0
    path = delta(tree, "image-2", "image-4", tmp_path / "delta.vmdk")
    with pytest.raises(CidMismatch):
        apply_delta(path, copy)
    apply_delta(path, copy, force=True)
    with open_chain(copy) as chain:
        assert chain.read_at(0, SIZE) == tree.model["image-4"]


def test_refusals(tree: Tree, tmp_path: Path) -> None:
    path = delta(tree, "image-2", "image-4", tmp_path / "delta.vmdk")
    with pytest.raises(StillNeeded, match=r"image-3\.vmdk names it as its parent"):
        apply_delta(path, tree.path("image-2"))
    with pytest.raises(FileExistsError):
        delta(tree, "image-2", "image-4", path)
    with pytest.raises(InvalidRequest, match="is not below it"):
        delta(tree, "image-4", "image-2", tmp_path / "other.vmdk")
    assert {entry.name for entry in tmp_path.iterdir()} == {"delta.vmdk", "live"}
    tree.verify()


def test_beside_its_base_it_stands_in_the_way_and_says_so(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """As a stream it can be written no more, so its base cannot change, nor go."""
    path = tree.folder / "delta.vmdk"
    with open_chain(tree.path("image-3")) as chain:
        make_delta(chain, 1, path, stream=True)
    for words in (["commit"], ["commit", "-d"], ["remove"]):
        top = "image-2" if words == ["remove"] else "image-3"
        assert main(["image", *words, str(tree.path(top))]) == 63
        told = capsys.readouterr().err
        assert told.startswith(f"qemu-vmdk-snap: {path}: streamOptimized images are written once")
        assert told.endswith(
            f"; it is backed by {tree.path('image-2')}, and would no longer read the same: move it to "
            "another folder, or delete it\n"
        )
    path.unlink()
    tree.verify()


def test_cancelled_apply_is_finished_by_recover(tree: Tree, tmp_path: Path) -> None:
    copy = tmp_path / "copy.vmdk"
    shutil.copy(tree.path("image-2"), copy)
    shutil.copy(tree.path("image-1"), tmp_path / "image-1.vmdk")
    path = delta(tree, "image-2", "image-4", tmp_path / "delta.vmdk")

    class Cancelled(Exception):
        pass

    def cancel(step: Progress) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        apply_delta(path, copy, on_progress=cancel)
    with pytest.raises(CorruptChain, match="an interrupted apply is not finished: run `recover"):
        open_chain(copy, writable=True)
    notes = [str(finding) for finding in check_image(copy, resolver=confined()).findings]
    assert f"{copy}: byte 0x0: interrupted operation = 'apply': must be finished: run `recover {tmp_path}`" in notes
    assert [one.operation for one in recover(tmp_path)] == ["apply"]
    with open_chain(copy) as chain:
        assert chain.read_at(0, SIZE) == tree.model["image-4"]


def test_commands(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, top = str(tree.path("image-1")), str(tree.path("image-2"))
    assert main(["image", "diff", "--output=json", base, top]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["virtual-size"] == SIZE
    assert answer["runs"][0].keys() == {"start", "length", "zero", "data"}
    copy, path = str(tmp_path / "copy.vmdk"), str(tmp_path / "delta.vmdk")
    shutil.copy(base, copy)
    assert main(["image", "diff", "-q", "-d", path, base, top]) == 0
    assert main(["image", "apply", path, copy]) == 0
    assert capsys.readouterr().out == "Delta applied.\n"
    assert main(["image", "compare", "-q", copy, top]) == 0
