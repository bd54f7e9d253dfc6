"""Does QEMU read every surviving image of an operation as the model says, find no error, and write on?"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.check.repair import repair
from qemu_vmdk_snap.ops.copy.diff import make_delta
from qemu_vmdk_snap.ops.copy.measure import measure
from qemu_vmdk_snap.ops.edit.apply import apply_delta
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.compact import compact
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.ops.edit.remove import remove
from qemu_vmdk_snap.ops.edit.resize import resize
from tests.support.tree import Tree

pytestmark = [pytest.mark.needs("qemu-img", "qemu-io")]

MIB = 1 << 20
SIZE = 3 * MIB + 1536


def qemu(*words: object) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(params=["ours", "qemu"])
def tree(tmp_path: Path, request: pytest.FixtureRequest) -> Tree:
    """Four links, and a sibling of the third; made by us or by QEMU."""
    tree = Tree(tmp_path, SIZE, seed=7)
    if request.param == "ours":
        tree.base(zeroed=True)
        tree.scribble("image-1")
        for parent in ("image-1", "image-2", "image-3", "image-2"):
            tree.scribble(tree.overlay(parent))
        return tree
    for number, below in enumerate((None, 1, 2, 3, 2), 1):
        where: list[object] = [tree.path(f"image-{number}"), SIZE]
        if below is not None:
            where = ["-b", f"image-{below}.vmdk", "-F", "vmdk", where[0]]
        qemu("qemu-img", "create", "-q", "-f", "vmdk", *where)
        tree.model[f"image-{number}"] = bytes(SIZE) if below is None else tree.model[f"image-{below}"]
        tree.parents[f"image-{number}"] = None if below is None else f"image-{below}"
        tree._made = number
        write_with_qemu(tree, f"image-{number}")
    return tree


def write_with_qemu(tree: Tree, name: str) -> None:
    content = bytearray(tree.model[name])
    commands = []
    for _ in range(5):
        length = tree.random.randint(1, 300) * 512
        offset = tree.random.randint(0, (SIZE - length) // 512) * 512
        pattern = tree.random.randint(0, 255)
        commands += ["-c", f"write -P {pattern} {offset} {length}"]
        content[offset : offset + length] = bytes([pattern]) * length
    qemu("qemu-io", "-f", "vmdk", *commands, tree.path(name))
    tree.model[name] = bytes(content)


def agree(tree: Tree) -> None:
    """QEMU and we read the same on every image, and neither finds an error."""
    tree.verify()
    for name, content in tree.model.items():
        raw = tree.folder.parent / f"{tree.folder.name}-{name}.raw"
        raw.write_bytes(content)
        qemu("qemu-img", "compare", "-q", "-f", "vmdk", "-F", "raw", tree.path(name), raw)
        qemu("qemu-img", "check", "-q", "-f", "vmdk", tree.path(name))
        raw.unlink()


def committed(tree: Tree) -> None:
    commit(tree.path("image-4"))
    tree.model["image-3"] = tree.model["image-4"]


def committed_deep(tree: Tree) -> None:
    commit(tree.path("image-4"), base=tree.path("image-2"), delete=True, keep_siblings=True)
    tree.model["image-2"] = tree.model["image-4"]
    tree.forget("image-3")
    tree.forget("image-4")
    tree.parents["image-5"] = "image-2"


def rebased(tree: Tree) -> None:
    rebase(tree.path("image-4"), tree.path("image-5"))
    tree.parents["image-4"] = "image-5"


def flattened(tree: Tree) -> None:
    rebase(tree.path("image-3"), None)
    tree.parents["image-3"] = None


def removed(tree: Tree) -> None:
    remove(tree.path("image-2"))
    for child in tree.children("image-2"):
        tree.parents[child] = "image-1"
    tree.forget("image-2")


def compacted(tree: Tree) -> None:
    for name in tree.model:
        compact(tree.path(name))


def applied(tree: Tree) -> None:
    delta = tree.folder.parent / f"{tree.folder.name}-delta.vmdk"
    with open_chain(tree.path("image-4")) as chain:
        make_delta(chain, 1, delta)
    commit(tree.path("image-4"), delete=True)
    tree.model["image-3"] = tree.model.pop("image-4")
    tree.parents.pop("image-4")
    apply_delta(delta, tree.path("image-3"), force=True)
    delta.unlink()


def repaired(tree: Tree) -> None:
    with tree.path("image-4").open("r+b") as file:
        file.seek(72)
        file.write(b"\1")
    report = repair(tree.path("image-4"), resolver=confined())
    assert report.undo is not None
    report.undo.unlink()


@pytest.mark.parametrize(
    "operation", [committed, committed_deep, rebased, flattened, removed, compacted, applied, repaired]
)
def test_qemu_agrees(tree: Tree, operation: Callable[[Tree], None]) -> None:
    operation(tree)
    agree(tree)
    for name in [name for name in tree.model if not tree.children(name)]:
        write_with_qemu(tree, name)
    agree(tree)


@pytest.mark.parametrize("size", [3 * MIB + 2048, 33 * MIB, 70 * MIB])
def test_qemu_reads_and_writes_a_grown_disk(tree: Tree, size: int) -> None:
    path = tree.path("image-4")
    resize(path, size)
    raw = tree.folder.parent / f"{tree.folder.name}.raw"
    raw.write_bytes(tree.model["image-4"] + bytes(size - SIZE))
    qemu("qemu-img", "compare", "-q", "-f", "vmdk", "-F", "raw", path, raw)
    qemu("qemu-io", "-f", "vmdk", "-c", f"write -P 9 {size - 70000 // 512 * 512} 65536", path)
    qemu("qemu-io", "-f", "vmdk", "-c", f"read -P 9 {size - 70000 // 512 * 512} 65536", path)
    qemu("qemu-img", "check", "-q", path)
    assert check_image(path, resolver=confined()).corruptions == 0


def test_check_agrees_with_qemu_about_a_grain_beyond_the_end(tree: Tree) -> None:
    path = tree.path("image-1")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert subprocess.run(["qemu-img", "check", path], capture_output=True).returncode != 0
    assert check_image(path, resolver=confined()).corruptions > 0


def test_measure_agrees_with_what_qemu_makes(tree: Tree, tmp_path: Path) -> None:
    copy = tmp_path.parent / f"{tmp_path.name}-copy.vmdk"
    with open_chain(tree.path("image-4")) as chain:
        sizes = measure(chain, 0, options=ImageOptions())
    qemu("qemu-img", "convert", "-O", "vmdk", tree.path("image-4"), copy)
    assert copy.stat().st_size <= sizes.required <= sizes.fully_allocated
