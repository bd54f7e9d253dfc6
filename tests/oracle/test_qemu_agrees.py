"""Does QEMU read what we write, and do we read what QEMU writes?"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from tests.support.qemu import qemu_img, qemu_info, qemu_io, qemu_map

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

ODD_SIZES = [512, 65536 - 512, 65536 + 512, 32 << 20, (32 << 20) + 1536, (100 << 20) + 512]


def scatter(path: Path, seed: int, *, pieces: int = 12) -> None:
    """Write reproducible pieces all over the disk, its first and last bytes among them."""
    chooser = random.Random(seed)
    with open_chain(path, writable=True) as chain:
        size = chain.capacity
        chain.write_at(0, bytes([seed]) * min(700, size))
        chain.write_at(max(0, size - 700), bytes([seed + 1]) * min(700, size))
        for _ in range(pieces):
            length = chooser.randrange(1, min(200_000, size + 1))
            chain.write_at(chooser.randrange(size - length + 1), chooser.randbytes(length))


def assert_agree(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compare content, check, map and info of a chain with qemu-img's."""
    raw = path.with_suffix(".raw")
    qemu_img("convert", "-f", "vmdk", "-O", "raw", path, raw)
    with open_chain(path) as chain:
        assert chain.capacity == raw.stat().st_size
        with raw.open("rb") as file:
            for offset in range(0, chain.capacity, 1 << 24):
                length = min(1 << 24, chain.capacity - offset)
                assert chain.read_at(offset, length) == file.read(length), f"differs from {offset} on"
    raw.unlink()
    assert "No errors" in qemu_img("check", "-f", "vmdk", path)
    for command, told in (["map"], qemu_img("map", "-f", "vmdk", path)), (["map", "--output=json"], qemu_map(path)):
        capsys.readouterr()
        assert main(["image", *command, str(path)]) == 0
        # Ours name the file that stores each stretch, too.
        assert re.sub(r', "filename": "[^"]*"', "", capsys.readouterr().out).strip() == told.strip()
    capsys.readouterr()
    assert main(["image", "info", "--output=json", str(path)]) == 0
    ours, theirs = json.loads(capsys.readouterr().out), qemu_info(path)
    for data in (ours, theirs):
        for extent in data["format-specific"]["data"]["extents"]:
            del extent["format"]
    assert ours == theirs


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("grain", [4096, 65536])
def test_qemu_reads_what_we_write(tmp_path: Path, size: int, grain: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ours.vmdk"
    create_image(path, size, options=ImageOptions(grain_size=grain), durable=False)
    scatter(path, 7)
    assert_agree(path, capsys)


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_qemu_reads_chains_that_we_write(tmp_path: Path, depth: int, capsys: pytest.CaptureFixture[str]) -> None:
    create_image(tmp_path / "1.vmdk", (40 << 20) + 512, durable=False)
    scatter(tmp_path / "1.vmdk", 1)
    for i in range(2, depth + 1):
        create_overlay(tmp_path / f"{i}.vmdk", tmp_path / f"{i - 1}.vmdk", durable=False)
        scatter(tmp_path / f"{i}.vmdk", i, pieces=5)
    assert_agree(tmp_path / f"{depth}.vmdk", capsys)


def test_we_read_what_qemu_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = (40 << 20) + 512
    qemu_img("create", "-f", "vmdk", tmp_path / "a.vmdk", str(size))
    qemu_io(tmp_path / "a.vmdk", "write -P 1 0 3M", "write -P 2 39M 1M")
    qemu_img("create", "-f", "vmdk", "-b", "a.vmdk", "-F", "vmdk", tmp_path / "b.vmdk")
    qemu_io(tmp_path / "b.vmdk", "write -P 3 100k 7k", f"write -P 4 {size - 512} 512")
    assert_agree(tmp_path / "b.vmdk", capsys)


def test_we_read_zeroed_grains_that_qemu_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-f", "vmdk", tmp_path / "a.vmdk", "8M")
    qemu_io(tmp_path / "a.vmdk", "write -P 1 0 8M")
    qemu_img("create", "-f", "vmdk", "-o", "zeroed_grain=on", "-b", "a.vmdk", "-F", "vmdk", tmp_path / "b.vmdk")
    qemu_io(tmp_path / "b.vmdk", "write -z 1M 2M", "write -P 5 2M 64k")
    with open_chain(tmp_path / "b.vmdk", writable=True) as chain:
        chain.write_at((1 << 20) + 1000, b"into a zeroed grain")
    assert_agree(tmp_path / "b.vmdk", capsys)


def test_a_chain_whose_links_were_written_by_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_image(tmp_path / "1.vmdk", 20 << 20, durable=False)
    scatter(tmp_path / "1.vmdk", 1)
    qemu_io(tmp_path / "1.vmdk", "write -P 11 5M 100k")
    qemu_img("create", "-f", "vmdk", "-b", "1.vmdk", "-F", "vmdk", tmp_path / "2.vmdk")
    qemu_io(tmp_path / "2.vmdk", "write -P 12 5M 10k")
    scatter(tmp_path / "2.vmdk", 2, pieces=3)
    qemu_io(tmp_path / "2.vmdk", "write -P 13 15M 64k")
    create_overlay(tmp_path / "3.vmdk", tmp_path / "2.vmdk", durable=False)
    qemu_io(tmp_path / "3.vmdk", "write -P 14 5M 1k")
    scatter(tmp_path / "3.vmdk", 3, pieces=3)
    qemu_img("create", "-f", "vmdk", "-b", "3.vmdk", "-F", "vmdk", tmp_path / "4.vmdk")
    scatter(tmp_path / "4.vmdk", 4, pieces=3)
    assert_agree(tmp_path / "4.vmdk", capsys)


def test_qemu_keeps_what_we_wrote_when_it_writes_on(tmp_path: Path) -> None:
    """QEMU allocates behind our grains, in tables that we laid out, without a loss on either side."""
    create_image(tmp_path / "a.vmdk", 64 << 20, durable=False)
    with open_chain(tmp_path / "a.vmdk", writable=True) as chain:
        chain.write_at(10 << 20, b"ours" * 50_000)
    qemu_io(tmp_path / "a.vmdk", "write -P 9 0 1M", "write -P 8 60M 64k", "read -P 0 30M 1M")
    with open_chain(tmp_path / "a.vmdk") as chain:
        assert chain.read_at(10 << 20, 200_000) == b"ours" * 50_000
        assert chain.read_at(0, 1 << 20) == b"\x09" * (1 << 20)


@pytest.mark.parametrize("words", [[], ["-s"], ["-S", "4k"]])
def test_converted_images_compare_equal(tmp_path: Path, words: list[str]) -> None:
    create_image(tmp_path / "1.vmdk", (33 << 20) + 512, durable=False)
    scatter(tmp_path / "1.vmdk", 1)
    create_overlay(tmp_path / "2.vmdk", tmp_path / "1.vmdk", durable=False)
    scatter(tmp_path / "2.vmdk", 2)
    source = str(tmp_path / "2.vmdk")
    extra = words if words != ["-s"] else []
    assert main(["image", "convert", *extra, source, str(tmp_path / "flat.vmdk")]) == 0
    assert main(["image", "convert", *extra, "-O", "raw", source, str(tmp_path / "flat.raw")]) == 0
    assert main(["image", "convert", "-B", str(tmp_path / "1.vmdk"), source, str(tmp_path / "onto.vmdk")]) == 0
    for name, kind in (("flat.vmdk", "vmdk"), ("flat.raw", "raw"), ("onto.vmdk", "vmdk")):
        assert "identical" in qemu_img("compare", "-f", "vmdk", "-F", kind, source, tmp_path / name)
        assert main(["image", "compare", "-F", kind, source, str(tmp_path / name)]) == 0
    assert "No errors" in qemu_img("check", "-f", "vmdk", tmp_path / "flat.vmdk")


def test_compare_finds_the_sector_that_qemu_img_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        create_image(tmp_path / f"{name}.vmdk", 10 << 20, durable=False)
        scatter(tmp_path / f"{name}.vmdk", 3)
    with open_chain(tmp_path / "b.vmdk", writable=True) as chain:
        at = 5_000_001
        chain.write_at(at, bytes([chain.read_at(at, 1)[0] ^ 1]))
    capsys.readouterr()
    assert main(["image", "compare", str(tmp_path / "a.vmdk"), str(tmp_path / "b.vmdk")]) == 1
    theirs = subprocess.run(
        ["qemu-img", "compare", "-f", "vmdk", "-F", "vmdk", tmp_path / "a.vmdk", tmp_path / "b.vmdk"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert theirs.returncode == 1
    assert capsys.readouterr().out == theirs.stdout


def test_locks_keep_qemu_and_us_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    create_image(path, 1 << 20, durable=False)
    with open_chain(path, writable=True):
        refused = subprocess.run(["qemu-img", "info", path], capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "lock" in refused.stderr
    with open_chain(path):
        qemu_img("info", path)  # readers share
        refused = subprocess.run(
            ["qemu-io", "-f", "vmdk", "-c", "write 0 512", path], capture_output=True, text=True, check=False
        )
        assert "lock" in refused.stderr


def test_what_qemu_holds_open_is_busy_for_us(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.vmdk"
    create_image(path, 1 << 20, durable=False)
    with subprocess.Popen(
        ["qemu-io", "-f", "vmdk", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("read 0 512\n")
        holder.stdin.flush()
        while "ops" not in holder.stdout.readline():
            pass
        capsys.readouterr()
        assert main(["image", "info", str(path)]) == 75
        message = f"{path}: failed to get the 'exclusive write' lock: is another process using the image?"
        way_out = "(-U, --force-share, reads it anyway)"
        assert capsys.readouterr().err == f"qemu-vmdk-snap: {message} {way_out}\n"
        assert main(["image", "info", "-U", str(path)]) == 0
        holder.stdin.close()
        holder.wait()


@pytest.mark.parametrize("tool", [["qemu-img"], [sys.executable, "-m", "qemu_vmdk_snap", "image"]])
def test_a_backing_file_is_named_as_seen_from_the_image(tmp_path: Path, tool: list[str]) -> None:
    """Not from where the command is run: QEMU refuses these operations for VMDK, so it shows on its own format."""
    kind = "qcow2" if tool == ["qemu-img"] else "vmdk"
    folder, formats = tmp_path / "images", ["-f", kind, "-F", kind]
    folder.mkdir()

    def run(*words: str) -> int:
        return subprocess.run([*tool, *words], cwd=tmp_path, capture_output=True, check=False).returncode

    assert run("create", "-f", kind, "images/a", "1M") == 0
    for name, base in ("b", "a"), ("c", "b"):
        assert run("create", *formats, "-b", base, f"images/{name}") == 0
    for words, image in (
        (["commit", "-f", kind, "-b"], ["images/c"]),
        (["rebase", *formats, "-b"], ["images/c"]),
        (["convert", "-f", kind, "-O", kind, "-F", kind, "-B"], ["images/c", "images/d"]),
    ):
        assert run(*words, "images/a", *image) != 0
        assert run(*words, "a", *image) == 0
