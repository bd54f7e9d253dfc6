"""Does every command that reads say on standard error, once, what was cut short or taken from a second copy?"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main

MIB = 1 << 20
SIZE = 64 * MIB  # two grain tables


def filled(path: Path, size: int = SIZE) -> Path:
    create_image(path, size, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(5 * MIB, b"a" * (300 << 10))
        chain.write_at(size - MIB, b"b" * MIB)
    return path


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flat_cut(folder: Path) -> tuple[Path, str]:
    path = folder / "a.vmdk"
    create_image(path, SIZE, kind="vmfs", durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, b"a" * MIB)
    os.truncate(folder / "a-flat.vmdk", 5 * MIB)
    return path, f"a-flat.vmdk: is {SIZE - 5 * MIB} bytes shorter than its extent: what is missing reads as zeros"


def split_flat_cut(folder: Path) -> tuple[Path, str]:
    path = folder / "a.vmdk"
    create_image(path, SIZE, kind="twoGbMaxExtentFlat", durable=False)
    os.truncate(folder / "a-f001.vmdk", 1)
    return path, f"a-f001.vmdk: is {SIZE - 1} bytes shorter than its extent"


def grain_cut(folder: Path) -> tuple[Path, str]:
    path = filled(folder / "a.vmdk")
    os.truncate(path, size := path.stat().st_size - 5 * 512)
    return path, f": grain 1023: 2560 bytes of it are past the end of the file of {size} bytes and read as zeros"


def cowd_grain_cut(folder: Path) -> tuple[Path, str]:
    path = folder / "a.vmdk"
    create_image(path, SIZE, kind="vmfsSparse", durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(5 * MIB, b"a" * 512)
    extent = folder / "a-delta.vmdk"
    os.truncate(extent, size := extent.stat().st_size - 12)
    return path, f": grain 10240: 12 bytes of it are past the end of the file of {size} bytes and read as zeros"


def second_directory(folder: Path) -> tuple[Path, str]:
    path = filled(folder / "a.vmdk")
    poke(path, 56, struct.pack("<Q", 1 << 40))
    return path, f"byte 0x38: gd_offset = {1 << 40}: "


def second_table(folder: Path) -> tuple[Path, str]:
    path = filled(folder / "a.vmdk")
    gd = struct.unpack("<Q", path.read_bytes()[56:64])[0]
    poke(path, gd * 512 + 4, struct.pack("<I", 1 << 30))
    return path, f"grain directory entry 1 = {1 << 30}: lies outside the file"


def second_entry(folder: Path) -> tuple[Path, str]:
    path = filled(folder / "a.vmdk")
    raw = path.read_bytes()
    gd = struct.unpack("<Q", raw[56:64])[0]
    table = struct.unpack("<I", raw[gd * 512 : gd * 512 + 4])[0]
    poke(path, table * 512 + 80 * 4, struct.pack("<I", 1 << 30))
    return path, f"grain table entry {1 << 30} of grain 80: lies outside the file"


KINDS = [flat_cut, split_flat_cut, grain_cut, cowd_grain_cut, second_directory, second_table, second_entry]
ANY_KIND = pytest.mark.parametrize("kind", KINDS)
Kind = Callable[[Path], tuple[Path, str]]


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, list[str]]:
    """Return the status of a command, what it answered, and what it warned about."""
    capsys.readouterr()
    status = main(["image", *map(str, words)])
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert all(line.startswith("qemu-vmdk-snap: warning: ") for line in lines if status == 0)
    assert len(set(lines)) == len(lines), "the same line twice"
    return status, shown.out, lines


READERS: dict[str, Callable[[Path, Path], list[str | Path]]] = {
    "info": lambda image, _: ["info", image],
    "info of the chain": lambda image, _: ["info", "--backing-chain", image],
    "map": lambda image, _: ["map", image],
    "map as JSON": lambda image, _: ["map", "--output=json", image],
    "convert": lambda image, new: ["convert", "-O", "raw", image, new],
    "compare": lambda image, _: ["compare", image, image],
    "measure": lambda image, _: ["measure", image],
    "create": lambda image, new: ["create", "-b", image, new],
}


@ANY_KIND
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_who_reads_says_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: Kind,
    reader: Callable[[Path, Path], list[str | Path]],
) -> None:
    path, words = kind(tmp_path)
    status, _, lines = said(capsys, *reader(path, tmp_path / "new"))
    assert status == 0
    assert any(re.search(words, line) for line in lines), lines


@ANY_KIND
def test_who_reads_a_parent_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Kind) -> None:
    path, words = kind(tmp_path)
    top = tmp_path / "top.vmdk"
    create_overlay(top, path, durable=False)
    with open_chain(top, writable=True) as chain:
        chain.write_at(0, b"top")
    commands: list[list[str | Path]] = [
        ["convert", "-O", "raw", top, tmp_path / "o.raw"],
        ["rebase", "-b", "", top],
    ]
    for command in commands:
        status, _, lines = said(capsys, *command)
        assert status == 0, lines
        assert any(re.search(words, line) for line in lines), (command, lines)


@pytest.mark.parametrize("kind", [flat_cut, second_directory, second_table])
def test_a_comparison_of_links_says_what_is_known_when_they_are_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Kind
) -> None:
    """Nothing of the base is read; of the top everything."""
    path, words = kind(tmp_path)
    top = tmp_path / "top.vmdk"
    create_overlay(top, path, durable=False)
    with open_chain(top, writable=True) as chain:
        chain.write_at(MIB, b"t" * MIB)
    os.truncate(top, top.stat().st_size - 512)
    status, _, lines = said(capsys, "diff", path, top)
    assert status == 0
    assert any(re.search(words, line) for line in lines), lines
    assert any("grain 31: 512 bytes of it are past the end" in line for line in lines), lines


@pytest.mark.parametrize("kind", [flat_cut, grain_cut])
def test_commit_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Kind) -> None:
    path, words = kind(tmp_path)
    top = tmp_path / "top.vmdk"
    create_overlay(top, path, durable=False)
    with open_chain(top, writable=True) as chain:
        chain.write_at(SIZE - 512, b"top")
    _, _, lines = said(capsys, "commit", top)
    assert any(re.search(words, line) for line in lines), lines


@ANY_KIND
def test_an_answer_in_json_has_a_list_of_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Kind
) -> None:
    path, words = kind(tmp_path)
    commands: list[list[str | Path]] = [
        ["measure", "--output=json", path],
        ["compare", "--output=json", path, path],
        ["convert", "--output=json", path, tmp_path / "copy.vmdk"],
        ["info", "--output=json", path],
    ]
    warnings: list[str] = []
    for command in commands:
        _, out, lines = said(capsys, *command)
        warnings = json.loads(out)["warnings"]
        assert lines == [f"qemu-vmdk-snap: warning: {warning}" for warning in warnings]
        assert any(re.search(words, warning) for warning in warnings)
    _, out, _ = said(capsys, "info", "--backing-chain", "--output=json", path)
    assert json.loads(out)[0]["warnings"] == warnings


def test_a_sound_image_has_nothing_to_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(tmp_path / "a.vmdk", SIZE + 512)  # the last grain is stored whole, or in its part
    for number, reader in enumerate(READERS.values()):
        assert said(capsys, *reader(path, tmp_path / f"new{number}"))[::2] == (0, [])
    _, out, _ = said(capsys, "info", "--output=json", path)
    assert "warnings" not in json.loads(out)


def test_the_last_grain_of_a_disk_may_end_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(tmp_path / "a.vmdk", SIZE + 512)
    with open_chain(path, writable=True) as chain:
        chain.write_at(SIZE, b"z" * 512)
    unit = 64 << 10
    os.truncate(path, path.stat().st_size - unit + 512)
    assert said(capsys, "map", path)[::2] == (0, [])
    os.truncate(path, path.stat().st_size - 1)
    assert any("grain 1024: 1 bytes of it are past the end" in line for line in said(capsys, "map", path)[2])


def test_a_read_of_a_few_bytes_notes_it_too(tmp_path: Path) -> None:
    """Who serves a disk, or fills up a grain that is written in part, asks for single places."""
    for kind, offset in ((grain_cut, SIZE - 1), (cowd_grain_cut, 5 * MIB)):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        path, words = kind(folder)
        with open_chain(path) as chain:
            for _ in range(2):
                chain.read_at(offset, 1)
            (note,) = chain.links[0].notes
        assert re.search(words, note)


@pytest.mark.parametrize("length", [5 * MIB, 20 * MIB])
def test_100_gib_cut_to_a_few_mib(tmp_path: Path, capsys: pytest.CaptureFixture[str], length: int) -> None:
    """Cut inside the tables, or after them: neither info nor an overlay reads a grain."""
    path = filled(tmp_path / "a.vmdk", 100 << 30)
    with open_chain(path, writable=True) as chain:
        chain.write_at(70 << 30, b"c" * (10 * MIB))
    os.truncate(path, length)
    commands: list[list[str | Path]] = [["info", path], ["create", "-b", path, tmp_path / "top.vmdk"]]
    for command in commands:
        status, _, lines = said(capsys, *command)
        assert status == 0
        assert any(re.search(r"a\.vmdk: byte 0x[0-9a-f]+: .*file of \d+ bytes", line) for line in lines), lines
    assert said(capsys, "convert", "-O", "raw", path, tmp_path / "o.raw")[0] == 65
    assert not (tmp_path / "o.raw").exists()


@pytest.mark.parametrize("kind", ["vmfsSparse", "streamOptimized", "twoGbMaxExtentSparse"])
def test_an_overlay_on_any_kind_that_was_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    filled(tmp_path / "s.vmdk")
    path = tmp_path / "a.vmdk"
    assert main(["image", "convert", "-o", f"subformat={kind}", str(tmp_path / "s.vmdk"), str(path)]) == 0
    (extent,) = [file for file in tmp_path.glob("a*.vmdk") if file.stat().st_size > 1 << 12]
    os.truncate(extent, extent.stat().st_size - (200 << 10 if kind != "streamOptimized" else 1024))
    status, _, lines = said(capsys, "create", "-b", path, tmp_path / "top.vmdk")
    assert status == 0
    assert any(extent.name in line for line in lines), lines


def test_a_fault_of_many_extents_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.vmdk"
    create_image(path, 20 << 30, kind="twoGbMaxExtentSparse", durable=False)
    with open_chain(path, writable=True) as chain:
        for gib in range(0, 20, 2):
            chain.write_at(gib << 30, b"x" * 512)
    cut = [extent for extent in tmp_path.glob("a-s*.vmdk") if extent.stat().st_size > 64 << 10]
    for extent in cut:
        os.truncate(extent, extent.stat().st_size - 1000)
    commands: list[list[str | Path]] = [["info", path], ["create", "-b", path, tmp_path / "top.vmdk"]]
    for command in commands:
        status, _, lines = said(capsys, *command)
        assert (status, len(lines)) == (0, 2)
        assert all(line.endswith(f" (and {len(cut) - 1} more like it)") for line in lines), lines


def test_an_overlay_on_a_base_without_its_extent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_image(tmp_path / "a.vmdk", SIZE, kind="vmfs", durable=False)
    (tmp_path / "a-flat.vmdk").unlink()
    status, _, lines = said(capsys, "create", "-b", tmp_path / "a.vmdk", tmp_path / "top.vmdk")
    assert status == 0
    assert lines == [f"qemu-vmdk-snap: warning: {tmp_path / 'a.vmdk'}: its extent 'a-flat.vmdk' does not exist"]


def test_info_names_a_parent_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, top = filled(tmp_path / "base.vmdk"), tmp_path / "top.vmdk"
    create_overlay(top, base, durable=False)
    assert said(capsys, "info", top)[2] == []
    with open_chain(base, writable=True) as chain:
        chain.write_at(0, b"x")
    for words in (["info"], ["info", "--backing-chain"]):
        status, _, (line,) = said(capsys, *words, top)
        assert status == 0
        assert f"{top}: parentCID = " in line
        assert f"but the CID of its parent {base} is " in line
    _, out, _ = said(capsys, "info", "--output=json", top)
    assert len(json.loads(out)["warnings"]) == 1
    base.write_bytes(b"")
    assert said(capsys, "info", top)[::2] == (0, [])


def test_a_descriptor_edited_in_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(tmp_path / "a.vmdk", 8 * MIB)
    path.write_bytes(path.read_bytes().replace(b'"ide"', b'"lsilogic"'))
    assert main(["image", "convert", "-O", "raw", str(path), str(tmp_path / "a.raw")]) == 65
    assert "it was edited in place (sed -i, for one)" in capsys.readouterr().err
    assert not (tmp_path / "a.raw").exists()
