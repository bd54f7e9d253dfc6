"""Do damaged undo files give our own errors and nothing else, in one line, and change nothing?"""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from qemu_vmdk_snap import CorruptChain, create_image
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.repair import repair, take_back

MUTANTS = 400
TELLING = [0, 1, 31, 0x7F, 0x80, 0xFF, 0x7FFF_FFFF, 0xFFFF_FFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
WRONG: list[object] = [
    None,
    True,
    -1,
    0,
    1,
    1 << 62,
    1 << 63,
    1 << 200,
    1.5,
    "",
    "x" * 100_000,
    "\0",
    "\udc80",
    "..",
    ".",
    [],
    {},
    [[]],
]


@pytest.fixture
def repaired(tmp_path: Path) -> tuple[Path, Path]:
    path = tmp_path / "disk.vmdk"
    create_image(path, 4 << 20, durable=False)
    with path.open("r+b") as file:
        file.seek(72)
        file.write(b"\1")
        file.seek(0, 2)
        file.write(b"leaked" * 30_000)
    undo = repair(path, resolver=confined()).undo
    assert undo is not None
    return path, undo


def refused(path: Path, undo: Path, raw: bytes) -> None:
    undo.write_bytes(raw)
    before = path.read_bytes()
    tracemalloc.start()
    try:
        with pytest.raises((CorruptChain, OSError)) as caught:
            take_back(undo)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert path.read_bytes() == before


def test_any_damage_is_noticed(repaired: tuple[Path, Path]) -> None:
    path, undo = repaired
    raw = undo.read_bytes()
    chooser = random.Random(1)
    head = raw.index(b"\n")
    for _ in range(MUTANTS):
        data = bytearray(raw)
        kind = chooser.randrange(4)
        at = chooser.randrange(chooser.choice([head + 40, len(data)]))
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data[at:at] = chooser.randbytes(chooser.randint(1, 40))
        elif kind == 2:
            del data[at : at + chooser.randint(1, 40)]
        else:
            data[at] ^= chooser.randint(1, 255)
        refused(path, undo, bytes(data))


def test_values_that_none_can_be_under_a_checksum_that_fits(repaired: tuple[Path, Path]) -> None:
    path, undo = repaired
    line, _, rest = undo.read_bytes()[:-32].partition(b"\n")
    for key in ("version", "files"):
        for value in WRONG:
            head = json.loads(line)
            head[key] = value
            refused(path, undo, sealed(json.dumps(head).encode() + b"\n" + rest))
    for key in ("name", "inode", "same_device", "size", "size_after", "cid", "ranges"):
        for value in [*WRONG, *TELLING]:
            head = json.loads(line)
            if type(head["files"][0][key]) is type(value) and head["files"][0][key] == value:
                continue
            head["files"][0][key] = value
            if key == "size" and value in TELLING[4:8]:
                continue  # a length before the repair that nothing contradicts
            refused(path, undo, sealed(json.dumps(head).encode() + b"\n" + rest))
    for odd in (b"", b"null", b"5", b"[]", b"[" * 3_000_000, b'{"version": 2}', b"\xff\xfe", b'"' + b"x" * 5_000_000):
        refused(path, undo, sealed(odd + b"\n" + rest))


def test_ranges_outside_the_image_under_a_checksum_that_fits(repaired: tuple[Path, Path]) -> None:
    path, undo = repaired
    line, _, rest = undo.read_bytes()[:-32].partition(b"\n")
    for at in (0, 8):
        for value in TELLING[-5:]:
            data = bytearray(rest)
            data[at : at + 8] = value.to_bytes(8, "little")
            refused(path, undo, sealed(line + b"\n" + bytes(data)))


def sealed(raw: bytes) -> bytes:
    return raw + hashlib.sha256(raw).digest()
