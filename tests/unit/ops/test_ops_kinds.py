"""Every kind that can be written takes part in the operations; what cannot be done with one is refused at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.compact import compact
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.ops.edit.remove import remove
from qemu_vmdk_snap.ops.edit.resize import resize

MIB = 1 << 20
SIZE = 3 * MIB + 512
BASES = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfs")
OVERLAYS = ("monolithicSparse", "twoGbMaxExtentSparse", "vmfsSparse")


def read(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, chain.capacity)


def scribble(path: Path, chooser: random.Random) -> None:
    with open_chain(path, writable=True) as chain:
        for _ in range(5):
            length = chooser.randint(1, 100_000)
            chain.write_at(chooser.randint(0, chain.capacity - length), chooser.randbytes(length))


class Images:
    """A base and two overlays, and what each reads."""

    def __init__(self, folder: Path, base: str, overlay: str) -> None:
        self.folder, self.overlay = folder, overlay
        chooser = random.Random(5)
        create_image(self / "base", SIZE, options=ImageOptions(subformat=base), durable=False)
        scribble(self / "base", chooser)
        for name, below in (("middle", "base"), ("top", "middle")):
            create_overlay(self / name, self / below, options=ImageOptions(subformat=overlay), durable=False)
            scribble(self / name, chooser)
        self.model = {name: read(self / name) for name in ("base", "middle", "top")}

    def __truediv__(self, name: str) -> Path:
        return self.folder / f"{name}.vmdk"

    def verify(self) -> None:
        for name, content in self.model.items():
            assert read(self / name) == content, f"{name} does not read what it read"
            report = check_image(self / name, resolver=confined())
            assert (report.corruptions, report.leaks) == (0, 0), [str(finding) for finding in report.findings]
        stems = {path.name.split(".")[0].split("-")[0] for path in self.folder.iterdir()}
        assert stems == set(self.model), "what is gone leaves no extent behind"


@pytest.fixture(params=[(base, overlay) for base in BASES for overlay in OVERLAYS], ids=" ".join)
def images(request: pytest.FixtureRequest, tmp_path: Path) -> Images:
    return Images(tmp_path, *request.param)


def test_commit(images: Images) -> None:
    commit(images / "middle")
    images.model["base"] = images.model["middle"]
    images.verify()
    commit(images / "top", base=images / "base", delete=True)
    images.model = {"base": images.model["top"]}
    images.verify()


def test_commit_and_delete(images: Images) -> None:
    commit(images / "middle", delete=True)
    images.model["base"] = images.model.pop("middle")
    images.verify()


def test_flatten(images: Images) -> None:
    rebase(images / "top", None)
    images.verify()


@pytest.mark.parametrize("name", ["base", "middle"])
def test_remove(images: Images, name: str) -> None:
    remove(images / name)
    del images.model[name]
    images.verify()


@pytest.mark.parametrize(
    "operation",
    [lambda images: compact(images / "middle"), lambda images: resize(images / "top", 5 * MIB)],
    ids=["compact", "resize"],
)
def test_compact_and_resize(images: Images, operation: Callable[[Images], object]) -> None:
    operation(images)
    images.model["top"] = images.model["top"].ljust(len(read(images / "top")), b"\0")
    images.verify()
