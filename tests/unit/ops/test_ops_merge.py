"""An image made of several links beside them reads as they do, and can take the place of the uppermost."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap import (
    CorruptChain,
    ImageOptions,
    InvalidRequest,
    check_image,
    create_image,
    create_overlay,
    merge_links,
    open_chain,
    read_facts,
)
from qemu_vmdk_snap.ops.copy import merge as module
from qemu_vmdk_snap.ops.copy.compare import CompareReport
from qemu_vmdk_snap.ops.copy.transfer import LinkWriter
from qemu_vmdk_snap.ops.progress import Progress
from tests.domain.lab import contents
from tests.support.tree import Tree, line

MIB = 1 << 20
SIZE = 3 * MIB + 1536
LINKS = 5


@pytest.fixture(params=[(65536, False), (4096, False), (65536, True)], ids=["64k", "4k", "zeroed"])
def tree(tmp_path: Path, request: pytest.FixtureRequest) -> Tree:
    tree = Tree(tmp_path, SIZE)
    grain, zeroed = request.param
    line(tree, LINKS, grain=grain, zeroed=zeroed)
    return tree


@pytest.mark.parametrize(("upper", "lowest"), [(4, 3), (4, 2), (3, 1), (2, 1), (5, 1), (3, 3)])
def test_it_reads_as_the_uppermost_and_takes_its_place(tree: Tree, upper: int, lowest: int) -> None:
    top, image = tree.path(f"image-{upper}"), tree.folder / "made.vmdk"
    before, facts = contents(tree.folder), read_facts(top)
    report = merge_links(top, tree.path(f"image-{lowest}"), image)
    assert contents(tree.folder) == before | {str(image): contents(tree.folder)[str(image)]}
    below = None if lowest == 1 else tree.path(f"image-{lowest - 1}")
    assert (report.path, report.cid, report.parent) == (image, facts.cid, below)
    made = read_facts(image)
    assert (made.cid, made.is_base) == (facts.cid, below is None)
    for key in ("ddb.longContentID", "ddb.adapterType", "ddb.geometry.cylinders", "ddb.virtualHWVersion"):
        assert made.descriptor.get(key) == facts.descriptor.get(key)
    image.replace(top)
    for number in range(lowest, upper):
        tree.path(f"image-{number}").unlink()
        tree.forget(f"image-{number}")
    tree.verify()  # those above it too
    with open_chain(tree.path(f"image-{LINKS}")) as chain:
        assert chain.depth == LINKS - (upper - lowest)


def test_a_base_stays_the_disk_that_it_was(tree: Tree) -> None:
    merge_links(tree.path("image-2"), tree.path("image-1"), tree.folder / "made.vmdk")
    uuid = read_facts(tree.path("image-1")).descriptor.get("ddb.uuid")
    assert uuid
    assert read_facts(tree.folder / "made.vmdk").descriptor.get("ddb.uuid") == uuid


def test_of_any_kind(tmp_path: Path) -> None:
    """Flat below, split above, a smaller link between: one sparse file, and what is past the end of one is zeros."""
    base, middle, top, image = (tmp_path / f"{name}.vmdk" for name in ("a", "b", "c", "m"))
    create_image(base, 2 * MIB, kind="monolithicFlat")
    with open_chain(base, writable=True) as chain:
        chain.write_at(MIB, b"B" * MIB)
    create_overlay(middle, base)
    create_overlay(top, middle, size=4 * MIB, options=ImageOptions(subformat="twoGbMaxExtentSparse"))
    with open_chain(top, writable=True) as chain:
        chain.write_at(MIB, bytes(4096))
        chain.write_at(3 * MIB, b"T" * 512)
        expected = chain.read_at(0, 4 * MIB)
    merge_links(top, middle, image)
    merge_links(top, base, tmp_path / "whole.vmdk")
    for path, files in ((image, 2), (tmp_path / "whole.vmdk", 1)):
        with open_chain(path) as chain:
            assert chain.read_at(0, chain.capacity) == expected
            assert chain.depth == files
        assert check_image(path).corruptions == 0


def test_links_without_data_cost_nothing(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vmdk", 64 * MIB)
    create_overlay(tmp_path / "b.vmdk", tmp_path / "a.vmdk")
    assert merge_links(tmp_path / "b.vmdk", tmp_path / "a.vmdk", tmp_path / "m.vmdk").stored == 0
    assert (tmp_path / "m.vmdk").stat().st_size < MIB


def test_refused_and_nothing_is_left(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    top, image = tree.path("image-4"), tree.folder / "made.vmdk"
    before = contents(tree.folder)
    with pytest.raises(InvalidRequest, match=r"image-4\.vmdk: .*image-5\.vmdk is not in its backing chain$"):
        merge_links(top, tree.path("image-5"), image)
    with pytest.raises(FileExistsError):
        merge_links(top, tree.path("image-3"), tree.path("image-5"))

    def cancel(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_links(top, tree.path("image-3"), image, on_progress=cancel)
    with monkeypatch.context() as patch:
        patch.setattr(module, "compare", lambda *_, **__: CompareReport(False, "content", 4096))
        with pytest.raises(CorruptChain, match=r"made\.vmdk: would not read as .*image-4\.vmdk does at byte 4096: it"):
            merge_links(top, tree.path("image-3"), image)
    assert contents(tree.folder) == before


def test_what_is_written_wrong_is_noticed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is a real one: a row that is left out is found."""
    real = LinkWriter.put_rows

    def forgetful(self: LinkWriter, rows: object, source: object) -> None:
        assert isinstance(rows, list)
        real(self, rows[:-2], source)  # type: ignore[arg-type]

    monkeypatch.setattr(LinkWriter, "put_rows", forgetful)
    with pytest.raises(CorruptChain, match="would not read as"):
        merge_links(tree.path("image-4"), tree.path("image-1"), tree.folder / "made.vmdk")
    assert not (tree.folder / "made.vmdk").exists()
