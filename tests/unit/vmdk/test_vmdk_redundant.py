"""Is an extent whose primary tables are damaged read by way of the redundant ones, and told of?"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qemu_vmdk_snap import FormatError, ImageOptions, create_image, open_chain

GRAIN = 4096
SIZE = 1200 * GRAIN


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, bytes]:
    path = tmp_path / "a.vmdk"
    create_image(path, SIZE, options=ImageOptions(grain_size=GRAIN), durable=False)
    data = random.Random(1).randbytes(SIZE)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, data)
    return path, data


def poke(path: Path, offset: int, value: int, width: int = 4) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(width, "little"))


def directory(path: Path, field: int = 56) -> int:
    return int.from_bytes(path.read_bytes()[field : field + 8], "little") * 512


def first_table(path: Path) -> int:
    at = directory(path)
    return int.from_bytes(path.read_bytes()[at : at + 4], "little") * 512


def read(path: Path) -> tuple[bytes, list[str]]:
    with open_chain(path) as chain:
        assert sum(run.length for run in chain.map()) == SIZE
        return chain.read_at(0, SIZE), chain.links[0].notes


@pytest.mark.parametrize(("field", "name"), [(56, "gd_offset"), (48, "rgd_offset")])
def test_one_directory_outside_the_file(image: tuple[Path, bytes], field: int, name: str) -> None:
    path, data = image
    poke(path, field, 1 << 40, 8)
    content, notes = read(path)
    assert content == data
    assert notes == [
        f"{path}: byte {field:#x}: {name} = {1 << 40}: must leave 12 bytes inside the file of {path.stat().st_size} "
        "bytes; the other copy of the directory is used"
    ]
    with pytest.raises(FormatError, match=name):
        open_chain(path, writable=True)


@pytest.mark.parametrize("value", [0x7FFF_FFFF, 0])
def test_a_directory_entry_that_leads_nowhere(image: tuple[Path, bytes], value: int) -> None:
    path, data = image
    poke(path, directory(path) + 4, value)
    content, notes = read(path)
    assert content == data
    assert len(notes) == 1
    assert f"grain directory entry 1 = {value}: " in notes[0]


def test_a_table_entry_that_leads_nowhere(image: tuple[Path, bytes]) -> None:
    path, data = image
    poke(path, first_table(path) + 7 * 4, 0x7FFF_FFFF)
    content, notes = read(path)
    assert content == data
    assert f"{path}: grain table entry {0x7FFF_FFFF} of grain 7: lies outside the file" in notes[0]


def test_a_sound_image_has_no_notes(image: tuple[Path, bytes]) -> None:
    assert read(image[0]) == (image[1], [])
