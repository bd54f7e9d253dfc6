"""Does a booted guest see what the model says on every image that an operation leaves?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.harness import verify_image
from qemu_vmdk_snap.ops.copy.diff import make_delta
from qemu_vmdk_snap.ops.edit.apply import apply_delta
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.compact import compact
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.ops.edit.remove import remove
from qemu_vmdk_snap.ops.edit.resize import resize
from tests.support.tree import Tree, line

pytestmark = pytest.mark.needs("qemu-system-x86_64")

SIZE = (2 << 20) + 1536


def committed(tree: Tree) -> None:
    commit(tree.path("image-2"), delete=True)
    tree.model["image-1"] = tree.model["image-2"]
    tree.forget("image-2")


def rebased(tree: Tree) -> None:
    rebase(tree.path("image-3"), tree.path("image-1"))


def flattened(tree: Tree) -> None:
    rebase(tree.path("image-2"), None)


def removed(tree: Tree) -> None:
    remove(tree.path("image-1"))
    tree.forget("image-1")


def compacted(tree: Tree) -> None:
    compact(tree.path("image-3"))


def resized(tree: Tree) -> None:
    resize(tree.path("image-3"), 40 << 20)
    tree.model["image-3"] = tree.model["image-3"].ljust(40 << 20, b"\0")


def applied(tree: Tree) -> None:
    delta = tree.folder.parent / f"{tree.folder.name}-delta.vmdk"
    with open_chain(tree.path("image-3")) as chain:
        make_delta(chain, 1, delta)
    remove(tree.path("image-3"))
    apply_delta(delta, tree.path("image-2"))
    tree.model["image-2"] = tree.model.pop("image-3")
    tree.parents.pop("image-3")


@pytest.mark.parametrize("operation", [committed, rebased, flattened, removed, compacted, resized, applied])
def test_a_guest_agrees(tmp_path: Path, operation: Callable[[Tree], None]) -> None:
    tree = Tree(tmp_path, SIZE)
    line(tree, 3)
    operation(tree)
    for name, content in tree.model.items():
        assert tree.read(name) == content
        report = verify_image(tree.path(name))
        assert report.identical, f"{name}: {report}"
