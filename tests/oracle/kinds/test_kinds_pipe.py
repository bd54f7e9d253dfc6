"""Can streamOptimized and raw images go through a pipe, and do QEMU's own and damaged ones come out right?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vmdk_snap import FormatError, ImageOptions, open_chain
from qemu_vmdk_snap.chain.disk import RawDisk
from qemu_vmdk_snap.ops.copy.convert import convert
from tests.support.qemu import content, qemu_content, qemu_img

pytestmark = pytest.mark.needs("qemu-img")

SIZE = (5 << 20) + 1536


def tool(*words: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "qemu_vmdk_snap", "image", *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    data = bytearray(SIZE)
    data[100:900_000] = bytes(range(256)) * 3515 + bytes(60)
    data[3 << 20 : (3 << 20) + 70_000] = b"some text, again and again" * 2692 + bytes(8)
    data[-1] = 1
    path.write_bytes(data)
    return path


def test_stream_out_and_in(tmp_path: Path, raw: Path) -> None:
    out = tool("convert", "-f", "raw", "-o", "subformat=streamOptimized", raw, "-")
    assert (out.returncode, out.stderr) == (0, b"")
    (tmp_path / "piped.vmdk").write_bytes(out.stdout)
    assert qemu_content(tmp_path / "piped.vmdk") == raw.read_bytes()
    for kind in ("monolithicSparse", "twoGbMaxExtentFlat", "streamOptimized"):
        target = tmp_path / f"{kind}.vmdk"
        done = tool("convert", "-o", f"subformat={kind}", "-", target, stdin=out.stdout)
        assert (done.returncode, done.stderr) == (0, b"")
        assert qemu_content(target) == raw.read_bytes()
    back = tool("convert", "-O", "raw", "-", "-", stdin=out.stdout)
    assert back.stdout == raw.read_bytes()


def test_a_stream_of_qemu_comes_in(tmp_path: Path, raw: Path) -> None:
    """QEMU's has its tables in front, no markers but the grains', and no end-of-stream marker."""
    stream = tmp_path / "qemu.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, stream)
    done = tool("convert", "-", tmp_path / "a.vmdk", stdin=stream.read_bytes())
    assert (done.returncode, done.stderr) == (0, b"")
    assert content(tmp_path / "a.vmdk") == raw.read_bytes()


def test_raw_in_and_out(tmp_path: Path, raw: Path) -> None:
    done = tool("convert", "-f", "raw", "-", tmp_path / "a.vmdk", stdin=raw.read_bytes())
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.vmdk", "source.raw"], "a spool file is left"
    with open_chain(tmp_path / "a.vmdk") as chain:
        assert sum(run.length for run in chain.map() if run.path) < 2 << 20, "zeros are stored"
    assert qemu_content(tmp_path / "a.vmdk") == raw.read_bytes()
    assert tool("convert", "-O", "raw", tmp_path / "a.vmdk", "-").stdout == raw.read_bytes()


@pytest.mark.parametrize("cut", [600, 66_000, 70_000, -512, -1600])
def test_a_stream_that_ends_early_makes_no_image(tmp_path: Path, raw: Path, cut: int) -> None:
    stream = tool("convert", "-f", "raw", "-o", "subformat=streamOptimized", raw, "-").stdout
    done = tool("convert", "-", tmp_path / "a.vmdk", stdin=stream[:cut])
    assert done.returncode == 65
    assert done.stderr.startswith(b"qemu-vmdk-snap: standard input: byte 0x")
    assert done.stderr.count(b"\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source.raw"]


def test_what_cannot_go_through_a_pipe_is_refused(tmp_path: Path, raw: Path) -> None:
    refused = tool("convert", "-f", "raw", raw, "-")
    assert refused.returncode == 63
    assert (
        refused.stderr
        == b"qemu-vmdk-snap: standard output: only raw and streamOptimized images can be written to a pipe\n"
    )
    with RawDisk(raw) as source:
        convert(source, tmp_path / "a.vmdk", durable=False)
    refused = tool("convert", "-", tmp_path / "b.vmdk", stdin=(tmp_path / "a.vmdk").read_bytes())
    assert refused.returncode == 63
    assert b"only streamOptimized images with markers can be read from a pipe" in refused.stderr


def test_a_damaged_grain_is_named_in_a_file_too(tmp_path: Path, raw: Path) -> None:
    """Inflating on all cores must not lose the error of one grain."""
    path = tmp_path / "s.vmdk"
    with RawDisk(raw) as source:
        convert(source, path, options=ImageOptions(subformat="streamOptimized"), durable=False)
    damaged = bytearray(path.read_bytes())
    damaged[128 * 512 + 40] ^= 0xFF
    path.write_bytes(damaged)
    with open_chain(path) as chain, pytest.raises(FormatError, match="byte 0x1000c: compressed grain"):
        convert(chain, tmp_path / "copy.vmdk", durable=False)
    assert not (tmp_path / "copy.vmdk").exists()
