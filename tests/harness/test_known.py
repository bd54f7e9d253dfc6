"""Does a model of a disk read as a bytearray does, and a chain of known content as its model?"""

from __future__ import annotations

import itertools
import pickle
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_vmdk_snap import InvalidRequest, PluginError, open_chain
from qemu_vmdk_snap.harness import ChainMaker, Content, KnownChain, WrongContent, WrongSize
from qemu_vmdk_snap.harness.known.content import in_bytes
from qemu_vmdk_snap.harness.known.reads import Stored
from qemu_vmdk_snap.ops.make.layout import KINDS

KIB, MIB = 1 << 10, 1 << 20
SIZE = 300 * KIB + 512
WRITES = st.lists(st.tuples(st.integers(0, SIZE), st.binary(max_size=70 * KIB)), max_size=6)


@given(WRITES, st.integers(0, SIZE), st.integers(0, SIZE))
def test_a_content_is_a_bytearray(writes: list[tuple[int, bytes]], start: int, length: int) -> None:
    content, model = Content(SIZE), bytearray(SIZE)
    written = set()
    for offset, data in writes:
        piece = data[: SIZE - offset]
        content.write(offset, piece)
        model[offset : offset + len(piece)] = piece
        written |= set(range(offset // (64 * KIB), -(-(offset + len(piece)) // (64 * KIB)))) if piece else set()
    assert content.read(start, min(length, SIZE - start)) == model[start : start + min(length, SIZE - start)]
    stretches = list(content.stretches())
    assert {at // (64 * KIB) for s, n in stretches for at in range(s, s + n, 64 * KIB)} == written
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(stretches))
    assert all(offset + size <= SIZE for offset, size in stretches)


def test_a_copy_goes_its_own_way() -> None:
    one = Content("1M")
    one.write(5, b"one")
    two = one.copy()
    assert one == two
    two.write(5, b"two")
    assert (one.read(5, 3), two.read(5, 3)) == (b"one", b"two")
    assert one != two
    one.write(5, bytes(3))
    assert one == Content(MIB)
    assert one != Content(MIB + 512)


def test_the_content_of_a_raw_image(tmp_path: Path) -> None:
    with (tmp_path / "a.raw").open("wb") as file:
        file.truncate(3 * MIB)
        file.seek(MIB + 7)
        file.write(b"here")
    content = Content.of_raw(tmp_path / "a.raw")
    assert content.capacity == 3 * MIB
    assert content.read(0, "3M") == (tmp_path / "a.raw").read_bytes()
    assert sum(length for _, length in content.stretches()) <= 128 * KIB


@pytest.mark.parametrize(("size", "value"), [(7, 7), ("64K", 65536), ("1.5M", 3 << 19)])
def test_sizes(size: int | str, value: int) -> None:
    assert in_bytes(size) == value


@pytest.mark.parametrize("size", ["x", "-1", -1])
def test_sizes_that_are_none(size: int | str) -> None:
    with pytest.raises(InvalidRequest, match=r"^size: "):
        in_bytes(size)


def test_nothing_is_written_or_read_outside_the_disk() -> None:
    content = Content(1000)  # two sectors
    content.write(1020, b"abcd")
    with pytest.raises(InvalidRequest, match="bytes 1021 to 1025 are not inside the disk of 1024 bytes"):
        content.write(1021, b"abcd")
    with pytest.raises(InvalidRequest, match="are not inside the disk"):
        content.read(1024, 1)


# ---- chains ----------------------------------------------------------------------------------------------------------


def engine_agrees(chain: KnownChain) -> None:
    for number, link in enumerate(chain.links):
        with open_chain(chain.at(number).path) as opened:
            assert opened.read_at(0, opened.capacity) == link.model.read(0, link.model.capacity)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_every_kind(tmp_path: Path, kind: str) -> None:
    chain = ChainMaker(tmp_path).base("2M", kind=kind).write("64K", b"base").pattern(1, "1M", 5120)
    chain.snapshot().write(64 * KIB + 2, b"over").snapshot("third").write(0, b"top")
    assert [link.path.name for link in chain.links] == ["base.vmdk", "1.vmdk", "third.vmdk"]
    assert chain.depth == 3
    assert chain.at(0).model.read("64K", 8) == b"base" + bytes(4)
    assert chain.model.read("64K", 8) == b"baover" + bytes(2)
    engine_agrees(chain)


def test_a_chain_of_a_depth(tmp_path: Path) -> None:
    chain = ChainMaker(tmp_path).of_depth(5, "4M")
    engine_agrees(chain)
    assert len({bytes(link.model.read(0, 4 * MIB)) for link in chain.links}) == 5
    assert ChainMaker(tmp_path / "one").of_depth(1).depth == 1
    with pytest.raises(InvalidRequest, match="depth: 0 is not a number of links"):
        ChainMaker(tmp_path).of_depth(0)
    with pytest.raises(InvalidRequest, match="size: 16384 bytes are too few for 9 links"):
        ChainMaker(tmp_path).of_depth(9, "16K")


def test_a_write_that_is_refused_changes_no_model(tmp_path: Path) -> None:
    chain = KnownChain(tmp_path, "1M")
    with pytest.raises(InvalidRequest):
        chain.write("1M", b"x")
    with pytest.raises(InvalidRequest, match="qemu-io: bytes 1 to 2 are not whole sectors"):
        chain.write(1, b"x", by="qemu")
    assert chain.model == Content("1M")


@pytest.mark.needs("qemu-io")
def test_what_qemu_writes_is_known_too(tmp_path: Path) -> None:
    chain = KnownChain(tmp_path / "a folder", "1M").pattern(3, 512, 4096, by="qemu")
    engine_agrees(chain)
    chain.top.write_bytes(b"no image any more")
    with pytest.raises(PluginError, match=r"qemu-io: .*base"):
        chain.write(0, bytes(512), by="qemu")


def test_without_qemu_io_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = KnownChain(tmp_path / "c", "1M")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PluginError, match=r"qemu-io: is not installed \(Debian: qemu-utils"):
        chain.write(0, bytes(512), by="qemu")


@pytest.mark.needs("qemu-img")
def test_a_chain_is_a_path(tmp_path: Path) -> None:
    chain = KnownChain(tmp_path, "1M", kind="streamOptimized").write(0, b"x")
    told = subprocess.run(["qemu-img", "info", chain], capture_output=True, text=True, check=True).stdout
    assert "streamOptimized" in told


# ---- what is told of wrong content -----------------------------------------------------------------------------------


def test_the_words_for_wrong_content(tmp_path: Path) -> None:
    written, read = bytes(512), bytes(100) + b"\x01\x02" + bytes(410)
    stored = Stored(1, "data", tmp_path / "1.vmdk", 0x20200)
    error = WrongContent("2.vmdk", 0x400, written, read, stored, False)
    assert str(error) == (
        "guest 2.vmdk: sector 2 (byte 0x400) reads something else than was written, from byte 0x464 on: "
        "01 02 00 00 00 00 00 00 instead of 00 00 00 00 00 00 00 00 "
        f"(link 1, data, byte 0x20200 of {tmp_path}/1.vmdk); the engine reads it wrong too"
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    nowhere = WrongContent("g", 0, written, "bios 0c", Stored(2, "hole", None, None), True)
    assert str(nowhere) == (
        "guest g: sector 0 (byte 0x0) cannot be read: bios 0c (link 2, hole, stored nowhere); "
        "the engine reads what was written"
    )
    assert str(pickle.loads(pickle.dumps(WrongSize("g", 1024, 512)))) == "guest g: the disk has 512 bytes, not 1024"
