"""Is a guest held to what was written, and is what is wrong found, named, and its place told?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qemu_vmdk_snap import CidMismatch, InvalidRequest, create_image, create_overlay, open_chain
from qemu_vmdk_snap.harness import (
    ChainMaker,
    Content,
    Disk,
    KnownChain,
    Machine,
    WrongContent,
    WrongSize,
    boot,
    verify_image,
)
from qemu_vmdk_snap.harness.probe import ProbeError

pytestmark = pytest.mark.needs("qemu-system-x86_64")

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> KnownChain:
    """Three links: 0 at 0 and at 3 MiB, 1 at 1 MiB and 3 MiB, 2 at 2 MiB and 3 MiB."""
    return ChainMaker(tmp_path).of_depth(3, "4M")


def flip(image: Path, offset: int) -> tuple[Path, int]:
    """Turn a bit of what the guest reads at `offset`, and return the file and the byte in it."""
    with open_chain(image) as opened:
        run = next(opened.map(offset // 512 * 512, 512))
    assert run.path is not None
    assert run.file_offset is not None
    with run.path.open("r+b") as file:
        file.seek(run.file_offset + offset % 512)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    return run.path, run.file_offset + offset % 512


def test_a_guest_reads_what_was_written(chain: KnownChain) -> None:
    with boot(chain) as guest:
        assert guest.assert_reads() > 4 * 64 * 1024
        guest.power_off()
    for number in range(3):
        with boot(chain.at(number).path) as guest:
            guest.assert_reads(chain.at(number).model)
            guest.power_off()


@pytest.mark.parametrize("by", ["guest", "qemu"])
@pytest.mark.needs("qemu-io")
def test_whoever_wrote_it(chain: KnownChain, by: str) -> None:
    chain.snapshot().write(MIB + 512, b"given bytes".ljust(512 * 9, b"."), by=by)  # type: ignore[arg-type]
    with boot(chain) as guest:
        guest.assert_reads()
        assert guest.probe.read(MIB + 512, 512).startswith(b"given bytes.")
        guest.power_off()
    with open_chain(chain.top) as opened:
        assert opened.read_at(0, 4 * MIB) == chain.model.read(0, 4 * MIB)


def test_a_grain_that_both_sides_read_alike_is_wrong_all_the_same(chain: KnownChain) -> None:
    path, file_offset = flip(chain.top, MIB + 5 * 512 + 100)
    assert verify_image(chain.top).identical, "engine and guest agree, which proves nothing of the content"
    with boot(chain) as guest:
        with pytest.raises(WrongContent) as caught:
            guest.assert_reads()
        guest.power_off()
    error = caught.value
    assert path == chain.at(1).path
    assert error.offset == MIB + 5 * 512
    assert error.stored == (1, "data", path, file_offset, False)
    assert f"from byte {MIB + 5 * 512 + 100:#x} on: " in str(error)
    assert f"sector {error.offset // 512} (byte {error.offset:#x}) reads something else than was written" in str(error)
    assert f"link 1, data, byte {file_offset:#x} of {path}); the engine reads it wrong too" in str(error)


def test_of_a_compressed_grain_its_record_is_named(tmp_path: Path) -> None:
    chain = ChainMaker(tmp_path).base("1M", kind="streamOptimized").pattern(1, 0, "128K")
    content = chain.model.copy()
    content.write(65536 + 700, bytes([content.read(65536 + 700, 1)[0] ^ 4]))
    with open_chain(chain.top) as opened:
        run = next(opened.map(65536, 512))
    with boot(chain) as guest, pytest.raises(WrongContent) as caught:
        guest.assert_reads(content)
    assert f"from byte {65536 + 700:#x} on: " in str(caught.value)
    place = f"(link 0, data, compressed in the grain at byte {run.file_offset:#x} of {chain.top})"
    assert place in str(caught.value)


def test_a_swapped_parent_is_found(chain: KnownChain, tmp_path: Path) -> None:
    """Another disk of the same size takes the base's place, with the CID that the overlay expects."""
    other = ChainMaker(tmp_path / "other").base("4M").pattern(9, 0, "64K")
    cids = []
    for image in (chain.at(0).path, other.top):
        with open_chain(image) as opened:
            cids.append(b"CID=%08x" % opened.links[0].cid)
    raw = other.top.read_bytes().replace(cids[1], cids[0], 1)
    chain.at(0).path.write_bytes(raw)
    assert verify_image(chain.top).identical
    with boot(chain) as guest, pytest.raises(WrongContent, match=r"sector 0 .* \(link 2, data, .*/base\.vmdk\)"):
        guest.assert_reads()


def test_a_stale_cid_is_refused_before_the_boot(chain: KnownChain) -> None:
    with open_chain(chain.at(1).path, writable=True) as opened:
        opened.write_at(0, b"x")
    with pytest.raises(CidMismatch, match="the parent was modified after the overlay was made"):
        boot(chain).__enter__()
    with boot(chain.top, check_cids=False) as guest, pytest.raises(WrongContent) as caught:
        guest.assert_reads(chain.model)
    assert caught.value.engine is None
    told = r"sector 0 .* cannot be read: bios .* \(link 1, data, .*\); the CIDs of the chain do not fit: "
    assert re.search(told + rf"{chain.top}: parentCID = \w+, but the CID of its parent ", str(caught.value))


@pytest.mark.parametrize("apart", [False, True], ids=["one folder", "two folders"])
def test_a_stale_cid_of_a_path_is_refused(chain: KnownChain, tmp_path: Path, apart: bool) -> None:
    top = chain.top
    if apart:
        top = tmp_path / "elsewhere/top.vmdk"
        top.parent.mkdir()
        create_overlay(top, chain.top, durable=False)
    with open_chain(chain.at(1).path, writable=True) as opened:
        opened.write_at(0, b"x")
    other = ChainMaker(tmp_path / "other").base("1M")
    said = "the parent was modified after the overlay was made"
    with pytest.raises(CidMismatch, match=said):
        boot(top).__enter__()
    with pytest.raises(CidMismatch, match=said):
        boot(str(top), expect="login:").__enter__()
    with pytest.raises(CidMismatch, match=said):
        boot(other, disks=[Disk(top)]).__enter__()
    with boot(other, disks=[Disk(top)], check_cids=False) as guest:
        guest.power_off()


def test_of_other_formats_no_cids_are_asked_for(chain: KnownChain) -> None:
    with open_chain(chain.at(1).path, writable=True) as opened:
        opened.write_at(0, b"x")
    with boot(chain.top, image_format="raw") as guest:
        assert guest.probe.size() == chain.top.stat().st_size
        guest.power_off()


def test_a_grain_that_nobody_wrote_is_found(chain: KnownChain) -> None:
    with open_chain(chain.top, writable=True) as opened:
        opened.write_at(MIB // 2 + 7 * 512, b"stray")
    with boot(chain) as guest, pytest.raises(WrongContent) as caught:
        guest.assert_reads()
    assert caught.value.offset == MIB // 2 + 7 * 512
    assert caught.value.written == bytes(512)


def test_a_disk_of_another_size(chain: KnownChain) -> None:
    with boot(chain) as guest:
        with pytest.raises(WrongSize, match=f"the disk has {4 * MIB} bytes, not {5 * MIB}"):
            guest.assert_reads(Content("5M"))
        guest.power_off()


def test_nothing_known(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vmdk", MIB, durable=False)
    with boot(tmp_path / "a.vmdk") as guest, pytest.raises(InvalidRequest, match="assert_reads: needs the content"):
        guest.assert_reads()


# ---- the probe's own commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_several_disks(chain: KnownChain, tmp_path: Path, machine: str) -> None:
    other = ChainMaker(tmp_path / "other").base("2M", kind="monolithicFlat").write("1M", b"second disk")
    (tmp_path / "third.raw").write_bytes(bytes(MIB))
    disks = [Disk(other.top), Disk(tmp_path / "third.raw", "raw", writable=True)]
    with boot(chain, disks=disks, machine=machine, log_dir=tmp_path / "logs") as guest:
        guest.assert_reads()
        guest.assert_reads(other, disk=1)
        guest.probe.select(2)
        assert guest.probe.size() == MIB
        guest.probe.write(512, b"third".ljust(512))
        guest.probe.select(0)
        assert guest.probe.size() == 4 * MIB
        guest.power_off()
    assert (tmp_path / "third.raw").read_bytes()[512:517] == b"third"


def test_given_bytes_many_sectors_a_call(tmp_path: Path) -> None:
    chain = KnownChain(tmp_path, "1M")
    data = bytes(range(256)) * 2 * 150  # more than the probe moves at once
    with boot(chain, writable=True) as guest:
        guest.probe.write(512 * 3, data)
        guest.probe.write(MIB - 512, b"\xff" * 512)
        assert guest.probe.read(512 * 2, len(data) + 1024) == bytes(512) + data + bytes(512)
        guest.probe.memory = None  # as over a line without a monitor beside it
        assert guest.probe.read(512 * 3, 1024) == data[:1024]
        for words, answer in {
            "load 7f 00": "usage",
            "load 0 0": "usage",
            "load 0 0g": "usage",
            "load": "usage",
            "write 0 0": "usage",
            "write 0 80": "usage",
            "fetch 0 100000001": "usage",
            "fetch ffffffff 1": "bios 01",
            "disk 80": "usage",
        }.items():
            with pytest.raises(ProbeError) as caught:
                guest.probe.command(words)
            assert caught.value.answer == answer, words
        guest.probe.select(5)
        with pytest.raises(ProbeError, match="bios 01"):
            guest.probe.size()
        guest.probe.select(0)
        guest.power_off()
    with open_chain(chain.top) as opened:
        assert opened.read_at(0, MIB) == bytes(1536) + data + bytes(MIB - 1536 - len(data) - 512) + b"\xff" * 512


def flushes(guest: Machine) -> tuple[int, int]:
    """Return how many flushes and discards QEMU has had of the first disk."""
    stats = guest.qmp("query-blockstats")[0]["stats"]
    return stats["flush_operations"], stats["unmap_operations"]


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_the_guest_flushes_and_discards(tmp_path: Path, machine: str) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(b"x" * (4 * MIB))
    allocated = raw.stat().st_blocks
    with boot(raw, image_format="raw", drive=f"file={raw},discard=unmap", writable=True, machine=machine) as guest:
        before = flushes(guest)
        guest.probe.flush()
        assert flushes(guest)[0] == before[0] + 1
        guest.probe.discard(MIB, 2 * MIB)
        assert flushes(guest)[1] > before[1]
        guest.probe.write(0, b"y" * 512)  # the BIOS finds its port as it was
        assert guest.probe.read(0, 1024) == b"y" * 512 + b"x" * 512
        guest.probe.flush()
        for words in ("discard 0", "flush 1", f"discard 0 {64 * 0xFFFF + 1:x}"):
            with pytest.raises(ProbeError, match="usage"):
                guest.probe.command(words)
        guest.power_off()
    assert raw.stat().st_blocks * 512 <= (allocated * 512) - 2 * MIB + 65536
    assert raw.read_bytes()[512:MIB] == b"x" * (MIB - 512)
    assert raw.read_bytes()[3 * MIB :] == b"x" * MIB


def test_a_flush_that_the_disk_has_no_port_for(tmp_path: Path) -> None:
    chain = KnownChain(tmp_path, "1M")
    with boot(chain, controller="virtio-blk") as guest:
        with pytest.raises(ProbeError, match="'flush': ata ff: the disk is not on ahci"):
            guest.probe.flush()
        assert guest.probe.size() == MIB
        guest.power_off()
