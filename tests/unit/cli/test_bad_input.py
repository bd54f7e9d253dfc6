"""Is bad input refused in one line with file, place and value, with its own status, and nothing changed?"""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main

GRAIN = 4096
CAPACITY = 600 * GRAIN


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.vmdk"
    create_image(path, CAPACITY, options=ImageOptions(grain_size=GRAIN), durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, b"B" * CAPACITY)
    return path


@pytest.fixture
def top(base: Path) -> Path:
    path = base.with_name("top.vmdk")
    create_overlay(path, base, durable=False)
    return path


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


HEADER_DAMAGE = [
    (0, b"XXXX", 65, "byte 0x0: magic = b'XXXX': must be b'KDMV', or the text '# Disk DescriptorFile'"),
    (4, u32(9), 65, "byte 0x4: version = 9: must be 1, 2 or 3"),
    (8, u32(0x80000003), 63, "byte 0x8: flags = 0x80000003: unknown incompatible bits 0x80000000"),
    (
        12,
        u64(1 << 60),
        65,
        "byte 0xc: capacity = 1152921504606846976: must need at most 33554432 grain directory entries, "
        "not 281474976710656",
    ),
    (12, u64(1 << 32), 65, "byte 0x38: gd_offset = 30: must leave 8192 sectors inside the file of {size} bytes"),
    (20, u64(100), 65, "byte 0x14: grain_size = 100: must be a power of two from 1 to 0x200000"),
    (20, u64(0), 65, "byte 0x14: grain_size = 0: must be a power of two from 1 to 0x200000"),
    (
        28,
        u64(1 << 62),
        65,
        "byte 0x1c: descriptor_offset = 4611686018427387904: must leave 20 sectors inside the file of {size} bytes",
    ),
    (28, u64(0), 63, "has no descriptor: it is an extent; open the descriptor file that names it"),
    (36, u64(1 << 50), 65, "byte 0x1c: descriptor_offset = 1: must leave 1125899906842624 sectors inside the file of"),
    (44, u32(0), 65, "byte 0x2c: gtes_per_gt = 0: must be from 1 to 512"),
    (44, u32(1 << 31), 65, "byte 0x2c: gtes_per_gt = 2147483648: must be from 1 to 512"),
    (48, u64(0) * 2, 65, "byte 0x38: gd_offset = 0: must leave 1 sectors inside the file of {size} bytes"),
    (73, b"\n\r\n\n", 65, r"byte 0x49: newline_probe = b'\n\r\n\n': must be b'\n \r\n'"),
    (512, b"junk", 65, "byte 0x200: descriptor = b'junksk DescriptorFile"),
]


@pytest.mark.parametrize(("offset", "data", "status", "line"), HEADER_DAMAGE)
def test_damaged_header(
    base: Path, offset: int, data: bytes, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    poke(base, offset, data)
    before = base.read_bytes()
    for command in (["info"], ["map"], ["convert", "-O", "raw"]):
        words = ["image", *command, str(base)] + ([str(base) + ".raw"] if command[0] == "convert" else [])
        assert main(words) == status
        err = capsys.readouterr().err
        shown = line.replace("{size}", str(len(before)))
        assert err.startswith(f"qemu-vmdk-snap: {base}: {shown}")
        assert err.count("\n") == 1
    assert base.read_bytes() == before
    assert sorted(p.name for p in base.parent.iterdir()) == ["base.vmdk"]


def directories(path: Path) -> list[int]:
    """Return the byte of the primary directory and of the redundant one."""
    raw = path.read_bytes()
    return [int.from_bytes(raw[at : at + 8], "little") * 512 for at in (56, 48)]


def first_tables(path: Path) -> list[int]:
    raw = path.read_bytes()
    return [int.from_bytes(raw[gd : gd + 4], "little") * 512 for gd in directories(path)]


def test_a_grain_beyond_the_file_is_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = first_tables(base)[0] + 7 * 4
    for table in first_tables(base):
        poke(base, table + 7 * 4, u32(0xFFFF_FF00))
    size = base.stat().st_size
    line = f"byte {at:#x}: grain table entry = 4294967040: must place grain 7 inside the file of {size} bytes"
    for command in (["map"], ["compare", str(base)]):
        status = main(["image", *command, str(base)])
        assert status == (2 if command[0] == "compare" else 65)
        assert capsys.readouterr().err == f"qemu-vmdk-snap: {base}: {line}\n"
    with open_chain(base) as chain:
        assert chain.read_at(6 * GRAIN, GRAIN) == b"B" * GRAIN
        with pytest.raises(Exception, match="grain 7"):
            chain.read_at(7 * GRAIN, 1)


def test_a_table_beyond_the_file_is_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for gd in directories(base):
        poke(base, gd + 4, u32(0x7FFF_FFFF))
    assert main(["image", "map", str(base)]) == 65
    err = capsys.readouterr().err
    assert f"grain directory entry 1 = {0x7FFF_FFFF}: must place the grain table inside the file of" in err


@pytest.mark.parametrize("length", [0, 3, 511, 512, 600, 512 * 21, 512 * 30])
def test_a_truncated_image(base: Path, length: int, capsys: pytest.CaptureFixture[str]) -> None:
    base.write_bytes(base.read_bytes()[:length])
    assert main(["image", "map", str(base)]) == 65
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"qemu-vmdk-snap: {base}: byte 0x")
    assert all(line.startswith(f"qemu-vmdk-snap: warning: {base}: ") for line in warnings)


def descriptor(path: Path, text: str) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:512] + text.encode().ljust(20 * 512, b"\0") + raw[21 * 512 :])


GOOD = '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicSparse"\n'
DESCRIPTOR_DAMAGE = [
    (GOOD.replace("12345678", "xyz"), "CID = 'xyz': must be 1 to 8 hexadecimal digits"),
    (GOOD.replace("CID=12345678", "CID=123456789"), "CID = '123456789': must be 1 to 8 hexadecimal digits"),
    (GOOD, "extents = 0: must give the disk at least one sector"),
    (GOOD + 'RW many SPARSE "a"\n', "extent = 'RW many SPARSE \"a\"': must give sectors and offset as decimal numbers"),
    (GOOD + 'RW 0 SPARSE "a"\n', "extents = 1: must give the disk at least one sector"),
    (GOOD + 'RW 99999999999999999 SPARSE "a"\n', "sectors = 99999999999999999: must be below 2^54 in all"),
    (GOOD + 'RW 8 ODD "a"\n', "extent = 'RW 8 ODD \"a\"': must have a type of SPARSE, FLAT"),
    (GOOD + "RW 8 SPARSE\n", "extent = 'RW 8 SPARSE': must name a file: its type is SPARSE"),
    (GOOD + 'RW 8000 SPARSE "a"\n', "capacity = 4800: must be at least the 8000 sectors that the descriptor gives"),
    (GOOD.replace("createType", "kind") + 'RW 8 SPARSE "a"\n', "createType = None: must be in the descriptor"),
]


@pytest.mark.parametrize(("text", "line"), DESCRIPTOR_DAMAGE)
def test_damaged_descriptor(base: Path, text: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    descriptor(base, text)
    assert main(["image", "map", str(base)]) == 65
    err = capsys.readouterr().err
    assert err.startswith(f"qemu-vmdk-snap: {base}: byte 0x")
    assert line in err
    assert err.count("\n") == 1


def remove_parent(base: Path, top: Path) -> None:
    base.unlink()


def fifo_as_parent(base: Path, top: Path) -> None:
    import os

    base.unlink()
    os.mkfifo(base)


def folder_as_parent(base: Path, top: Path) -> None:
    base.unlink()
    base.mkdir()


def parent_outside(base: Path, top: Path) -> None:
    (base.parent / "elsewhere").mkdir()
    moved = base.parent / "elsewhere" / "base.vmdk"
    base.rename(moved)
    base.symlink_to(moved)


def rewrite_parent(base: Path, top: Path) -> None:
    with open_chain(base, writable=True) as chain:
        chain.write_at(0, b"changed")


CHAIN_DAMAGE = [
    (remove_parent, 66, "{top}: its parent 'base.vmdk' does not exist"),
    (fifo_as_parent, 74, "{base}: not a regular file"),
    (folder_as_parent, 74, "{base}: not a regular file"),
    (
        parent_outside,
        66,
        "{top}: its parent {dir}/elsewhere/base.vmdk is outside its folder: "
        "allow {dir}/elsewhere (--allow-dir) to follow it",
    ),
    (rewrite_parent, 67, "{top}: parentCID = "),
]


@pytest.mark.parametrize(("damage", "status", "line"), CHAIN_DAMAGE)
def test_damaged_chain(
    base: Path,
    top: Path,
    damage: Callable[[Path, Path], None],
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(base, top)
    before = top.read_bytes()
    for words in (["map"], ["convert", "-O", "raw"]):
        target = [str(top) + ".raw"] if words[0] == "convert" else []
        assert main(["image", *words, str(top), *target]) == status
        err = capsys.readouterr().err
        assert err.startswith("qemu-vmdk-snap: " + line.format(top=top, base=base, dir=base.parent))
        assert err.count("\n") == 1
    assert top.read_bytes() == before
    assert not list(base.parent.glob("*raw*"))


def test_a_parent_outside_is_followed_where_it_is_allowed(base: Path, top: Path) -> None:
    parent_outside(base, top)
    assert main(["image", "map", "--allow-dir", str(base.parent / "elsewhere"), str(top)]) == 0


def test_absurd_sizes_do_not_allocate(base: Path) -> None:
    """2 TiB of disk with tables that the file does not have: refused in a few MiB."""
    poke(base, 12, u64(1 << 40))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["image", "map", str(base)]) == 65
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 16 << 10


@pytest.mark.parametrize("name", ["exists.vmdk", "dangling"])
def test_nothing_is_overwritten(tmp_path: Path, base: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / name
    if name == "dangling":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.write_bytes(b"precious")
    for words in (
        ["create", str(target), "1M"],
        ["create", "-b", "base.vmdk", str(target)],
        ["convert", str(base), str(target)],
    ):
        assert main(["image", *words]) == 74
        hint = " (nothing is overwritten; -n writes into an image that is there)" if words[0] == "convert" else ""
        assert capsys.readouterr().err == f"qemu-vmdk-snap: {target}: File exists{hint}\n"
    assert name == "dangling" or target.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["base.vmdk", name])


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["create", "x.vmdk"], 64, "x.vmdk: an image needs a size (or a base: -b)"),
        (["create", "x.vmdk", "0"], 64, "x.vmdk: size 0 must be from 1 to 70368744177664 bytes"),
        (["create", "x.vmdk", "1M", "-o", "grain_size=100"], 64, "x.vmdk: grain_size 100 must be a power of two from"),
        (["create", "x.vmdk", "1M", "-o", "colour=red"], 64, "-o colour: no such option (known: adapter_type"),
        (["create", "x.vmdk", "1M", "-o", "adapter_type=x"], 64, "adapter_type: 'x' is not one of ide, buslogic"),
        (["create", "-f", "qcow2", "x", "1M"], 63, "x: format 'qcow2' is not supported here: only vmdk is"),
        (["create", "-F", "raw", "-b", "x.raw", "x.vmdk"], 63, "x.raw: format 'raw' is not supported here"),
        (["info", "-f", "qcow2", "x"], 63, "x: format 'qcow2' is not supported here"),
        (["convert", "-O", "qcow2", "x", "y"], 63, "y: format 'qcow2' is not supported: vmdk and raw are"),
        (["info", "missing.vmdk"], 74, "missing.vmdk: No such file or directory"),
    ],
)
def test_bad_requests(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["image", *words]) == status
    err = capsys.readouterr().err
    assert err.startswith(f"qemu-vmdk-snap: {line}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["nothing"], ["image", "nothing"], ["image", "create"], ["image", "map", "--wrong", "x"]]
)
def test_usage_errors_are_one_line_and_status_64(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 64
    assert capsys.readouterr().err.count("\n") == 1
