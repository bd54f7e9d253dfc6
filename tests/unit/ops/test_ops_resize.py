"""A larger disk reads what it read and zeros behind; a smaller file of the same disk reads the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, InvalidRequest, LockBusy, StillNeeded, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.copy.convert import convert
from qemu_vmdk_snap.ops.copy.measure import measure
from qemu_vmdk_snap.ops.edit.compact import compact
from qemu_vmdk_snap.ops.edit.resize import resize
from qemu_vmdk_snap.ops.progress import Progress
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader
from tests.support.tree import Tree, line

MIB = 1 << 20
GRAIN = 65536


def content(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, chain.capacity)


def clean(path: Path) -> None:
    report = check_image(path, resolver=confined())
    assert (report.corruptions, report.leaks) == (0, 0), [str(finding) for finding in report.findings]


@pytest.mark.parametrize("before", [1536, 3 * MIB + 512, 32 * MIB, 40 * MIB])
@pytest.mark.parametrize("after", [40 * MIB + 512, 100 * MIB])
def test_grow(tmp_path: Path, before: int, after: int) -> None:
    path = tmp_path / "disk.vmdk"
    create_image(path, before, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(max(0, before - 1000), b"x" * min(before, 1000))
        chain.write_at(0, b"y" * 100)
        cid = chain.links[0].cid
    old = content(path)
    report = resize(path, after)
    assert (report.path, report.before, report.after) == (path, before, after)
    assert content(path) == old + bytes(after - before)
    clean(path)
    with open_chain(path, writable=True) as chain:
        assert chain.links[0].cid != cid
        chain.write_at(after - 700, b"z" * 700)
    assert content(path)[-700:] == b"z" * 700
    clean(path)
    raw = path.read_bytes()
    header = SparseExtentHeader.parse(raw[:512], path=path)
    assert header.capacity == after // 512
    cylinders = int(raw.split(b'ddb.geometry.cylinders = "')[1].split(b'"')[0])
    assert cylinders == after // 512 // (16 * 63)


def test_grow_clears_what_a_writer_left_behind_the_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    create_image(path, 1536, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, b"x" * 1536)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - GRAIN + 1536)
        file.write(b"rubbish")
    resize(path, 2 * MIB)
    assert content(path) == b"x" * 1536 + bytes(2 * MIB - 1536)


def test_grow_an_overlay_beyond_its_parent(tmp_path: Path) -> None:
    tree = Tree(tmp_path, MIB + 512)
    line(tree, 2)
    resize(tree.path("image-2"), 2 * MIB)
    assert content(tree.path("image-2")) == tree.model["image-2"] + bytes(2 * MIB - tree.size)


@pytest.mark.parametrize("before", [1536, 2 * MIB, 3 * MIB + 512])
@pytest.mark.parametrize("after", [3 * MIB + 1024, 100 * MIB])
def test_grow_and_compact_a_vmfs_delta(tmp_path: Path, before: int, after: int) -> None:
    create_image(tmp_path / "base.vmdk", before, durable=False)
    with open_chain(tmp_path / "base.vmdk", writable=True) as chain:
        chain.write_at(0, b"b" * before)
    path = tmp_path / "top.vmdk"
    create_overlay(path, tmp_path / "base.vmdk", kind="vmfsSparse", durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(before - 700, b"x" * 700)
        chain.write_at(0, bytes(512) + b"y" * 10)
    old = content(path)
    resize(path, after)
    assert content(path) == old + bytes(after - before)
    clean(path)
    with open_chain(path, writable=True) as chain:
        chain.write_at(after - 1100, b"z" * 1100)
        chain.write_at(after - 512, bytes(512))  # zeros where the parent has none: for nothing
    old = content(path)
    data = tmp_path / "top-delta.vmdk"
    with data.open("ab") as file:
        file.write(bytes(4096))  # what a killed writer leaves
    report = compact(path)
    assert report.after < report.before
    assert content(path) == old
    clean(path)
    with open_chain(path, writable=True) as chain:
        chain.write_at(after - 2000, b"w" * 1000)
    assert content(path)[-2000:-1000] == b"w" * 1000
    assert content(path)[:-2000] == old[:-2000]
    assert content(path)[-1000:] == old[-1000:]


def test_refusals(tmp_path: Path) -> None:
    tree = Tree(tmp_path, MIB)
    line(tree, 2)
    with pytest.raises(InvalidRequest, match="would shrink from 1048576 to 1024 bytes"):
        resize(tree.path("image-2"), 1024)
    with pytest.raises(StillNeeded, match=r"image-2\.vmdk names it as its parent"):
        resize(tree.path("image-1"), 2 * MIB)
    with open_chain(tree.path("image-2")), pytest.raises(LockBusy):
        resize(tree.path("image-2"), 2 * MIB)
    tree.verify()


def test_resize_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.vmdk"
    create_image(path, MIB, durable=False)
    assert main(["image", "resize", str(path), "+1M"]) == 0
    assert capsys.readouterr().out == "Image resized.\n"
    assert len(content(path)) == 2 * MIB
    assert main(["image", "resize", "--output=json", str(path), "3M"]) == 0
    assert json.loads(capsys.readouterr().out)["virtual-size"] == 3 * MIB


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("grain", [4096, 65536])
def test_compact_drops_zeros_and_leaks(tmp_path: Path, grain: int, zeroed: bool) -> None:
    tree = Tree(tmp_path, 2 * MIB + 512)
    base = tree.base(grain=grain, zeroed=zeroed)
    tree.write(base, 0, b"a" * MIB)
    top = tree.overlay(base)
    tree.write(top, 0, bytes(MIB // 2))  # zeros over data: must stay zeros
    tree.write(top, MIB + 4 * grain, bytes(8 * grain))  # zeros over zeros: for nothing
    tree.write(top, 2 * MIB, b"tail" * 128)
    path = tree.path(top)
    with path.open("ab") as file:
        file.write(b"leak" * grain)
    before = path.stat().st_size
    path.chmod(0o640)
    report = compact(path)
    assert (report.before, report.after) == (before, path.stat().st_size)
    assert before - report.after >= 4 * grain + 8 * grain + (MIB // 2 if zeroed else 0)
    assert path.stat().st_mode & 0o777 == 0o640
    tree.verify()
    assert compact(path).after == report.after


def test_compact_in_the_middle_keeps_the_children(tmp_path: Path) -> None:
    tree = Tree(tmp_path, 2 * MIB)
    line(tree, 3)
    for name in ("image-1", "image-2"):
        compact(tree.path(name))
    tree.verify()


def test_compact_cancelled_changes_nothing(tmp_path: Path) -> None:
    tree = Tree(tmp_path, 2 * MIB)
    line(tree, 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    class Cancelled(Exception):
        pass

    def cancel(_: Progress) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        compact(tree.path("image-2"), on_progress=cancel)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("grain", [4096, 65536, MIB])
def test_measure_is_what_convert_makes(tmp_path: Path, grain: int) -> None:
    tree = Tree(tmp_path, 5 * MIB + 512)
    line(tree, 3, grain=16384)
    options = ImageOptions(grain_size=grain)
    with open_chain(tree.path("image-3")) as chain:
        sizes = measure(chain, 0, options=options)
        convert(chain, tmp_path / "copy.vmdk", options=options, durable=False)
        assert measure(chain, 0, output_format="raw").fully_allocated == tree.size
    assert sizes.required >= (tmp_path / "copy.vmdk").stat().st_size
    assert sizes.required - (tmp_path / "copy.vmdk").stat().st_size <= 4096
    empty = measure(None, tree.size, options=options)
    create_image(tmp_path / "empty.vmdk", tree.size, options=options, durable=False)
    assert empty.required == (tmp_path / "empty.vmdk").stat().st_size
    assert empty.fully_allocated == sizes.fully_allocated


@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse", "vmfsSparse"])
def test_measure_counts_the_whole_descriptor(tmp_path: Path, kind: str) -> None:
    options = ImageOptions(subformat=kind)
    create_image(tmp_path / "disk.vmdk", MIB, options=options, durable=False)  # extents are named after it
    made = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert measure(None, MIB, options=options).required == made


def test_measure_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.vmdk"
    create_image(path, MIB, durable=False)
    create_overlay(tmp_path / "top.vmdk", path, durable=False)
    assert main(["image", "measure", "--output=json", "-O", "raw", str(tmp_path / "top.vmdk")]) == 0
    assert json.loads(capsys.readouterr().out) == {"required": MIB, "fully-allocated": MIB}
    assert main(["image", "measure", "--size", "1M"]) == 0
    assert capsys.readouterr().out.startswith("required size: ")
    assert main(["image", "measure"]) == 64
