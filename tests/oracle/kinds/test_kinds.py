"""Do QEMU and we agree on every kind that can be written, whoever wrote it, alone and as links of a chain?"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, InvalidRequest, Unsupported, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.disk import RawDisk
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.copy.convert import convert
from qemu_vmdk_snap.ops.copy.measure import measure
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.make.layout import KINDS
from tests.support.qemu import assert_agree, content, qemu_content, qemu_img, qemu_io

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

WRITABLE = [name for name in KINDS if name != "streamOptimized"]
WITH_PARENT = [name for name, kind in KINDS.items() if kind.may_have_parent]
OF_QEMU = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"]
ODD_SIZES = [512, 65536 - 512, (3 << 20) + 1536]
GIB = 1 << 30


def pattern(size: int, seed: int = 1) -> bytes:
    """Return data with stretches of zeros, and something at both ends."""
    chooser = random.Random(seed)
    data = bytearray(size)
    for _ in range(6):
        length = chooser.randrange(1, min(size, 300_000) + 1)
        start = chooser.randrange(size - length + 1)
        data[start : start + length] = chooser.randbytes(length)
    data[0] = data[-1] = 0xEE
    return bytes(data)


def raw_file(folder: Path, size: int) -> Path:
    path = folder / "source.raw"
    path.write_bytes(pattern(size))
    return path


def make(folder: Path, kind: str, size: int = 2 << 20, name: str = "base.vmdk") -> Path:
    """Make an image of any kind that holds `pattern(size)`."""
    with RawDisk(raw_file(folder, size)) as source:
        convert(source, folder / name, options=ImageOptions(subformat=kind), sparse_size=4096, durable=False)
    return folder / name


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_qemu_reads_what_we_convert(tmp_path: Path, kind: str, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, kind, size)
    assert content(path) == pattern(size)
    assert_agree(path, capsys)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("kind", OF_QEMU)
def test_we_read_what_qemu_converts(tmp_path: Path, kind: str, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_file(tmp_path, size)
    path = tmp_path / "qemu.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}", raw, path)
    assert content(path) == pattern(size)
    assert_agree(path, capsys)


@pytest.mark.parametrize("kind", WRITABLE)
def test_both_write_one_image_by_turns(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.vmdk"
    size = (5 << 20) + 512
    create_image(path, size, kind=kind, durable=False)
    model = bytearray(size)
    for turn in range(3):
        qemu_io(path, f"write -P {turn + 1} {turn * 1000 + 512} 700k", f"write -P 9 {size - 512} 512")
        model[turn * 1000 + 512 : turn * 1000 + 512 + 700 * 1024] = bytes([turn + 1]) * (700 * 1024)
        model[size - 512 :] = b"\x09" * 512
        with open_chain(path, writable=True) as chain:
            for at, data in ((turn << 20, b"ours" * 70_000), (size - 100, b"end"), (777 + turn, b"x")):
                chain.write_at(at, data)
                model[at : at + len(data)] = data
        assert content(path) == bytes(model)
    assert_agree(path, capsys)


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("kind", WITH_PARENT)
def test_an_overlay_of_each_kind_on_each_kind(tmp_path: Path, kind: str, base: str) -> None:
    below = make(tmp_path, base)
    top = tmp_path / "top.vmdk"
    create_overlay(top, below, kind=kind, durable=False)
    model = bytearray(pattern(2 << 20))
    assert content(top) == qemu_content(top) == model
    with open_chain(top, writable=True) as chain:
        chain.write_at(100_001, b"mine" * 5000)
    model[100_001:120_001] = b"mine" * 5000
    qemu_io(top, "write -P 5 1M 9k")
    model[1 << 20 : (1 << 20) + 9216] = b"\x05" * 9216
    assert content(top) == qemu_content(top) == model
    assert content(below) == pattern(2 << 20)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.may_have_parent])
def test_a_kind_without_parents_is_refused_as_an_overlay(tmp_path: Path, kind: str) -> None:
    below = make(tmp_path, "monolithicSparse")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InvalidRequest, match="cannot have a parent"):
        create_overlay(tmp_path / "top.vmdk", below, kind=kind)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
@pytest.mark.parametrize("writer", ["ours", "qemu"])
def test_more_than_one_extent(tmp_path: Path, kind: str, writer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Data lies across the border of the extents; QEMU splits elsewhere than we do."""
    path, size = tmp_path / "a.vmdk", 4 * GIB + 512
    if writer == "ours":
        create_image(path, size, kind=kind, durable=False)
    else:
        qemu_img("create", "-f", "vmdk", "-o", f"subformat={kind}", path, str(size))
    with open_chain(path) as chain:
        assert len(chain.links[0].extents) == 3
        border = chain.links[0].extents[1].start
    qemu_io(path, f"write -P 1 {border - 70_000 // 512 * 512} 200k", f"write -P 2 {size - 512} 512")
    with open_chain(path, writable=True) as chain:
        chain.write_at(border - 10, b"across the border")
        chain.write_at(3 * GIB, b"far")
    with open_chain(path) as chain:
        assert chain.read_at(border - 12, 21) == b"\x01\x01across the border\x01\x01"
        assert chain.read_at(size - 513, 3) == b"\x00\x02\x02"
        assert chain.read_at(3 * GIB - 1, 5) == b"\0far\0"
        assert sum(run.length for run in chain.map()) == size
    qemu_io(path, f"read -P 1 {border - 1024} 512", f"read -P 0 {GIB} 1M")
    copy = tmp_path / "copy.vmdk"
    with open_chain(path) as chain:
        convert(chain, copy, options=ImageOptions(subformat=kind), sparse_size=65536, durable=False)
    assert "identical" in qemu_img("compare", "-f", "vmdk", "-F", "vmdk", path, copy)


@pytest.mark.parametrize("kind", ["monolithicSparse", "monolithicFlat", "vmfsThin", "streamOptimized"])
def test_four_tebibytes(tmp_path: Path, kind: str) -> None:
    size, path = 4 << 40, tmp_path / "a.vmdk"
    if kind == "streamOptimized":
        create_image(tmp_path / "source.vmdk", size, durable=False)
        with open_chain(tmp_path / "source.vmdk", writable=True) as chain:
            chain.write_at(size - 7, b"the end")
        with open_chain(tmp_path / "source.vmdk") as chain:
            convert(chain, path, options=ImageOptions(subformat=kind), durable=False)
    else:
        create_image(path, size, kind=kind, durable=False)
        with open_chain(path, writable=True) as chain:
            chain.write_at(size - 7, b"the end")
    with open_chain(path) as chain:
        assert chain.read_at(size - 7, 7) == b"the end"
    qemu_io(path, f"read -P 0 {size - 1024} 512", f"read -P 0 {size >> 1} 1M")
    if kind != "streamOptimized":
        qemu_io(path, f"write -P 3 {size - 4096} 512")
        with open_chain(path) as chain:
            assert chain.read_at(size - 4096, 513) == b"\x03" * 512 + b"\0"


def test_an_overlay_inherits(tmp_path: Path) -> None:
    base = tmp_path / "base.vmdk"
    options = ImageOptions(
        grain_size=16384, adapter_type="lsilogic", hwversion="11", zeroed_grain=True, subformat="twoGbMaxExtentSparse"
    )
    create_image(base, 9 << 20, options=options, durable=False)
    create_overlay(tmp_path / "top.vmdk", base, durable=False)
    with open_chain(tmp_path / "top.vmdk") as chain:
        top, below = (link.descriptor for link in chain.links)
        for key in ("adapterType", "virtualHWVersion", "geometry.cylinders", "geometry.heads", "geometry.sectors"):
            assert top.get(f"ddb.{key}") == below.get(f"ddb.{key}") is not None
        assert chain.capacity == 9 << 20
        assert chain.links[0].grain_bytes == 16384


def test_a_name_that_is_taken_leaves_nothing_behind(tmp_path: Path) -> None:
    taken = tmp_path / "a-s002.vmdk"
    taken.write_text("mine")
    with pytest.raises(FileExistsError, match=r"a-s002\.vmdk"):
        create_image(tmp_path / "a.vmdk", 4 * GIB, kind="twoGbMaxExtentSparse", durable=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a-s002.vmdk"]
    assert taken.read_text() == "mine"


@pytest.mark.parametrize("base", WRITABLE)
@pytest.mark.parametrize("kind", WITH_PARENT)
def test_an_overlay_of_each_kind_is_merged_into_each_kind(tmp_path: Path, kind: str, base: str) -> None:
    below, top = make(tmp_path, base), tmp_path / "top.vmdk"
    create_overlay(top, below, kind=kind, durable=False)
    qemu_io(top, "write -P 3 100k 77k", "write -P 0 1M 128k")
    model = content(top)
    commit(top)
    for path in (below, top):
        assert content(path) == qemu_content(path) == model
        report = check_image(path, resolver=confined())
        assert report.corruptions == 0, report.findings
    qemu_io(top, "write -P 8 1900k 100k")  # the emptied overlay has its tables still: QEMU can write on it
    model = model[: 1900 << 10] + b"\x08" * (100 << 10) + model[2000 << 10 :]
    assert content(top) == qemu_content(top) == model


@pytest.mark.parametrize("kind", WITH_PARENT)
def test_a_copy_that_stores_the_differences(tmp_path: Path, kind: str) -> None:
    below, top = make(tmp_path, "monolithicSparse"), tmp_path / "top.vmdk"
    create_overlay(top, below, durable=False)
    with open_chain(top, writable=True) as chain:
        chain.write_at(70_000, b"different" * 1000)
    copy = tmp_path / "copy.vmdk"
    with open_chain(top) as chain:
        report = convert(chain, copy, backing=below, options=ImageOptions(subformat=kind), durable=False)
    assert report.data <= 2 * 65536
    assert content(copy) == qemu_content(copy) == content(top)


@pytest.mark.parametrize("kind", WITH_PARENT)
def test_a_cancelled_copy_leaves_nothing(tmp_path: Path, kind: str) -> None:
    below = make(tmp_path, "monolithicSparse")
    before = sorted(tmp_path.iterdir())

    def cancel(_: object) -> None:
        raise KeyboardInterrupt

    for backing in (below, None):
        options = ImageOptions(subformat=kind)
        with open_chain(below) as chain, pytest.raises(KeyboardInterrupt):
            convert(chain, tmp_path / "copy.vmdk", backing=backing, options=options, on_progress=cancel)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_measured_size_is_that_of_the_copy(tmp_path: Path, kind: str) -> None:
    size = (3 << 20) + 512
    create_image(tmp_path / "source.vmdk", size, durable=False)
    with open_chain(tmp_path / "source.vmdk", writable=True) as chain:
        chain.write_at(65536 * 3, b"whole grains" * 16384)
    options = ImageOptions(subformat=kind)
    with open_chain(tmp_path / "source.vmdk") as chain:
        if kind == "streamOptimized":
            with pytest.raises(Unsupported, match="depends on how its data deflates"):
                measure(chain, 0, options=options)
            return
        sizes = measure(chain, 0, options=options)
        convert(chain, tmp_path / "copy.vmdk", options=options, durable=False)
    taken = sum(path.stat().st_size for path in tmp_path.glob("copy*"))
    assert abs(sizes.required - taken) < 2048, "more than the text of a descriptor apart"
    assert sizes.fully_allocated >= max(size, sizes.required)


def test_a_split_disk_with_more_files_than_may_be_open(tmp_path: Path) -> None:
    """The soft limit is raised as far as it takes: 300 extents under a limit of 128 files."""
    path, size = tmp_path / "a.vmdk", 300 * 2047 << 20
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from qemu_vmdk_snap import create_image, open_chain
create_image({str(path)!r}, {size}, kind="twoGbMaxExtentSparse", durable=False)
with open_chain({str(path)!r}, writable=True) as chain:
    chain.write_at({size} - 3, b"end")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with open_chain(path) as chain:
        assert len(chain.links[0].extents) == 300
        assert chain.read_at(size - 4, 4) == b"\0end"
