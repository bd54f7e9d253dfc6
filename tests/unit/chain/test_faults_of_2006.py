"""Each fault of the 2006 qemu-devel patch, and the test that would have caught it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qemu_vmdk_snap import (
    CidMismatch,
    CorruptChain,
    ImageOptions,
    Unsupported,
    create_image,
    create_overlay,
    open_chain,
)
from qemu_vmdk_snap.chain.parent import MAX_DEPTH
from qemu_vmdk_snap.units import SECTOR_SIZE
from qemu_vmdk_snap.vmdk.descriptor import Descriptor
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader

GRAIN = 4096
OPTIONS = ImageOptions(grain_size=GRAIN)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image with grain 1 written and the rest not, its other grains' places in the file being the header's."""
    path = tmp_path / "base.vmdk"
    create_image(path, 64 * GRAIN, options=OPTIONS, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(GRAIN, b"B" * GRAIN)
    return path


@pytest.fixture
def top(base: Path) -> Path:
    path = base.with_name("top.vmdk")
    create_overlay(path, base, durable=False)
    return path


def cid_of(path: Path) -> int:
    with open_chain(path, check_cids=False) as chain:
        return chain.links[0].cid


def edit_descriptor(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    text = raw[512 : 512 * 21].rstrip(b"\0")
    assert text.count(old) >= 1
    path.write_bytes(raw[:512] + text.replace(old, new).ljust(512 * 20, b"\0") + raw[512 * 21 :])


def test_every_open_image_renews_its_cid_not_only_the_first_of_the_process(tmp_path: Path) -> None:
    for name in ("one.vmdk", "two.vmdk"):
        create_image(tmp_path / name, 1 << 20, durable=False)
    before = [cid_of(tmp_path / name) for name in ("one.vmdk", "two.vmdk")]
    with (
        open_chain(tmp_path / "one.vmdk", writable=True) as one,
        open_chain(tmp_path / "two.vmdk", writable=True) as two,
    ):
        one.write_at(0, b"x")
        two.write_at(0, b"x")
    after = [cid_of(tmp_path / name) for name in ("one.vmdk", "two.vmdk")]
    assert after[0] != before[0]
    assert after[1] != before[1]


def test_each_open_that_writes_renews_the_cid_once(base: Path) -> None:
    cids = [cid_of(base)]
    for _ in range(3):
        with open_chain(base, writable=True) as chain:
            chain.write_at(0, b"x")
            once = chain.links[0].cid
            chain.write_at(GRAIN, b"x")
            assert chain.links[0].cid == once
        cids.append(cid_of(base))
    assert len(set(cids)) == 4


def test_an_open_that_does_not_write_keeps_the_cid(base: Path) -> None:
    before = base.read_bytes()
    with open_chain(base, writable=True) as chain:
        chain.read_at(0, GRAIN)
        chain.flush()
    assert base.read_bytes() == before


def test_a_grain_that_the_parent_lacks_is_zeros_not_the_parents_header(top: Path) -> None:
    with open_chain(top) as chain:
        assert chain.read_at(0, GRAIN) == bytes(GRAIN)


def test_copy_on_write_changes_no_byte_of_the_parent(base: Path, top: Path) -> None:
    before = base.read_bytes()
    with open_chain(top, writable=True) as chain:
        chain.write_at(GRAIN + 100, b"new")  # a grain that the parent has
        chain.write_at(10 * GRAIN + 100, b"new")  # and one that it has not
    assert base.read_bytes() == before


def test_a_read_over_grains_of_both_links_takes_each_from_its_own(top: Path) -> None:
    with open_chain(top, writable=True) as chain:
        chain.write_at(0, b"0" * GRAIN)
        chain.write_at(2 * GRAIN, b"2" * GRAIN)
        assert chain.read_at(0, 4 * GRAIN) == b"0" * GRAIN + b"B" * GRAIN + b"2" * GRAIN + bytes(GRAIN)


def test_without_a_cid_an_image_is_read_and_parent_cid_does_not_stand_in(base: Path) -> None:
    edit_descriptor(base, b"\nCID=", b"\nXID=")
    with open_chain(base) as chain:
        assert chain.links[0].cid == 0xFFFFFFFF
    before = base.read_bytes()
    with open_chain(base, writable=True) as chain, pytest.raises(Unsupported, match="byte 0x200: CID = None: such a"):
        chain.write_at(0, b"x")
    with pytest.raises(Unsupported, match="is read, but not written"):
        create_overlay(base.with_name("over.vmdk"), base)
    assert base.read_bytes() == before
    assert Descriptor.parse(before[512:].replace(b"parentCID=f", b"parentCID=1"), path=base).cid == 0xFFFFFFFF


def test_the_cid_is_found_behind_the_parent_cid(base: Path) -> None:
    cid = cid_of(base)
    edit_descriptor(base, f"CID={cid:08x}\nparentCID=ffffffff".encode(), f"parentCID=ffffffff\nCID={cid:08x}".encode())
    assert cid_of(base) == cid


@pytest.mark.parametrize("size", [512, GRAIN * 512 - 512, GRAIN * 512, GRAIN * 512 + 512, GRAIN * 1024 + 1024])
def test_the_directory_covers_the_last_grain(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.vmdk"
    create_image(path, size, options=OPTIONS, durable=False)
    with open_chain(path, writable=True) as chain:
        assert chain.capacity == size
        chain.write_at(size - 512, b"E" * 512)
    with open_chain(path) as chain:
        assert chain.read_at(size - 512, 512) == b"E" * 512


def test_a_name_longer_than_any_fixed_buffer_survives(base: Path) -> None:
    folder = base.parent
    for part in ("d" * 200, "e" * 200, "f" * 200):
        folder /= part
    folder.mkdir(parents=True)
    far = folder / ("b" * 200 + ".vmdk")
    base.rename(far)
    overlay = base.with_name("overlay.vmdk")
    create_overlay(overlay, far, durable=False)
    with open_chain(overlay, trusted_dirs=[folder]) as chain:
        assert chain.links[0].hint == str(far.relative_to(base.parent))
        assert chain.read_at(GRAIN, 4) == b"BBBB"


def test_a_descriptor_of_any_length_at_any_sector_is_read(base: Path) -> None:
    raw = base.read_bytes()
    header = SparseExtentHeader.parse(raw[:512], path=base)
    text = raw[512 : 512 * 21].rstrip(b"\0") + b"# padding\n" * 2000
    at = len(raw) // SECTOR_SIZE
    size = -(-len(text) // SECTOR_SIZE)
    header = replace(header, descriptor_offset=at, descriptor_size=size)
    base.write_bytes(header.serialise() + bytes(20 * 512) + raw[21 * 512 :] + text.ljust(size * 512, b"\0"))
    with open_chain(base) as chain:
        assert chain.read_at(GRAIN, 4) == b"BBBB"


def test_a_hint_without_its_closing_quote_ends_with_its_line(top: Path) -> None:
    edit_descriptor(top, b'parentFileNameHint="base.vmdk"\n', b'parentFileNameHint="base.vmdk\n')
    with pytest.raises(CorruptChain) as caught:
        open_chain(top)
    assert str(caught.value) == f"{top}: its parent '\"base.vmdk' does not exist"


def test_a_modified_parent_is_refused_naming_both_values(base: Path, top: Path) -> None:
    old = cid_of(base)
    with open_chain(base, writable=True) as chain:
        chain.write_at(0, b"changed")
    with pytest.raises(CidMismatch) as caught:
        open_chain(top)
    assert (caught.value.parent_cid, caught.value.cid) == (old, cid_of(base))
    assert f"{old:08x}" in str(caught.value)
    assert f"{cid_of(base):08x}" in str(caught.value)


def test_a_loop_is_refused(base: Path, top: Path) -> None:
    with open_chain(top) as chain:
        cid = chain.links[0].cid
    edit_descriptor(base, b"parentCID=ffffffff\n", f'parentCID={cid:08x}\nparentFileNameHint="top.vmdk"\n'.encode())
    with pytest.raises(CorruptChain) as caught:
        open_chain(top)
    assert str(caught.value) == f"{base}: its parent {top} is already in the chain: the chain is a loop"


def test_a_chain_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    create_image(tmp_path / "0.vmdk", GRAIN, options=OPTIONS, durable=False)
    for i in range(1, MAX_DEPTH + 1):
        create_overlay(tmp_path / f"{i}.vmdk", tmp_path / f"{i - 1}.vmdk", durable=False)
    with open_chain(tmp_path / f"{MAX_DEPTH - 1}.vmdk") as chain:
        assert chain.depth == MAX_DEPTH
    with pytest.raises(CorruptChain, match="deeper than 256 links"):
        open_chain(tmp_path / f"{MAX_DEPTH}.vmdk")
