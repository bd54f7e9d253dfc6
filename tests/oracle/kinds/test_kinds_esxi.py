"""Are ESXi's own kinds, made by a writer without our code, read as QEMU reads them, and refused where they must be?"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from qemu_vmdk_snap import CidMismatch, FormatError, Unsupported, create_image, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.edit.compact import compact
from qemu_vmdk_snap.ops.edit.resize import resize
from tests.support.esxi import cowd, descriptor, sesparse
from tests.support.qemu import assert_agree, content, qemu_content, qemu_io

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SECTORS = 3 * 4096 * 8 + 11


def some(size: int, count: int, unit: int, seed: int = 4) -> dict[int, bytes]:
    """Return `count` grains at random places, the last grain of the disk among them."""
    chooser = random.Random(seed)
    last = (size - 1) // unit
    return {grain: chooser.randbytes(unit) for grain in [last, *chooser.sample(range(last), count)]}


def expected(size: int, unit: int, grains: dict[int, bytes], below: bytes | None = None) -> bytes:
    data = bytearray(below or bytes(size))
    for grain, value in grains.items():
        data[grain * unit : (grain + 1) * unit] = value
    return bytes(data[:size])


@pytest.mark.parametrize("grain_sectors", [1, 16])
def test_cowd(tmp_path: Path, grain_sectors: int, capsys: pytest.CaptureFixture[str]) -> None:
    size, unit = SECTORS * 512, grain_sectors * 512
    grains = some(size, 40, unit)
    cowd(tmp_path / "a-delta.vmdk", SECTORS, grains, grain_sectors=grain_sectors)
    path = descriptor(tmp_path / "a.vmdk", "vmfsSparse", [f'RW {SECTORS} VMFSSPARSE "a-delta.vmdk"'])
    assert content(path) == expected(size, unit, grains)
    assert_agree(path, capsys)


def test_cowd_on_a_base_and_written_on(tmp_path: Path) -> None:
    """New tables are made on demand, and the count of used sectors is raised before they name what is behind it."""
    size = SECTORS * 512
    create_image(tmp_path / "base.vmdk", size, kind="vmfsThin", durable=False)
    with open_chain(tmp_path / "base.vmdk", writable=True) as chain:
        chain.write_at(0, b"B" * size)
        cid = chain.links[0].cid
    extent = tmp_path / "a-delta.vmdk"
    grains = some(4096 * 512, 9, 512)  # all in the first table
    cowd(extent, SECTORS, grains, free_slack=40)
    line = [f'RW {SECTORS} VMFSSPARSE "a-delta.vmdk"']
    with open_chain(tmp_path / "base.vmdk") as chain:
        cid = chain.links[0].cid
    path = descriptor(tmp_path / "a.vmdk", "vmfsSparse", line, parent_cid=cid, hint="base.vmdk")
    model = bytearray(expected(size, 512, grains, b"B" * size))
    assert content(path) == qemu_content(path) == model
    old_free = struct.unpack_from("<I", extent.read_bytes(), 28)[0]
    with open_chain(path, writable=True) as chain:
        for at, data in ((size - 3, b"end"), (5 << 20, b"new table" * 1000), (700, b"x"), (0, b"y" * 2048)):
            chain.write_at(at, data)
            model[at : at + len(data)] = data
    assert content(path) == qemu_content(path) == model
    free = struct.unpack_from("<I", extent.read_bytes(), 28)[0]
    assert free > old_free
    assert free * 512 == extent.stat().st_size
    directory = struct.unpack_from("<3I", extent.read_bytes(), 2048)
    assert min(directory[1:]) == 0 or min(directory[1:]) >= old_free, "a new table lies in space that was in use"
    with open_chain(tmp_path / "base.vmdk") as chain:
        assert chain.read_at(0, size) == b"B" * size


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [(4, 2, "version"), (16, 0, "grain_size"), (20, 1 << 30, "gd_offset"), (24, 1, "gd_entries"), (12, 5, "capacity")],
)
def test_a_damaged_cowd_is_refused(tmp_path: Path, at: int, value: int, field: str) -> None:
    extent = tmp_path / "a-delta.vmdk"
    cowd(extent, SECTORS, {0: b"x"})
    raw = bytearray(extent.read_bytes())
    raw[at : at + 4] = struct.pack("<I", value)
    extent.write_bytes(raw)
    path = descriptor(tmp_path / "a.vmdk", "vmfsSparse", [f'RW {SECTORS} VMFSSPARSE "a-delta.vmdk"'])
    with pytest.raises(FormatError, match=f"byte {at:#x}: {field} = {value}: ") as error:
        open_chain(path)
    assert error.value.path == extent


def test_a_legacy_disk_without_a_descriptor_and_its_child(tmp_path: Path) -> None:
    size = 64 * 1024
    below, above = some(size, 5, 8192, 1), some(size, 2, 8192, 2)
    base, child = tmp_path / "old.vmdk", tmp_path / "redo.vmdk"
    cowd(base, size // 512, below, grain_sectors=16, generation=77)
    assert content(base) == expected(size, 8192, below)  # QEMU 7.2 opens no COWD file without a descriptor
    cowd(child, size // 512, above, grain_sectors=16, flags=2, parent=b"C:\\vm\\old.vmdk", parent_generation=77)
    assert content(child) == expected(size, 8192, above, expected(size, 8192, below))
    with pytest.raises(Unsupported, match="read-only"):
        open_chain(base, writable=True)
    cowd(child, size // 512, above, grain_sectors=16, flags=2, parent=b"old.vmdk", parent_generation=76)
    with pytest.raises(CidMismatch):
        open_chain(child)


SE_GRAINS: dict[int, bytes | str] = {
    0: b"first" * 800,
    1: "unmapped",
    2: "zero",
    5: b"five" * 1024,
    4095: b"end of a table" * 200,
    4096 * 2 + 1: b"third table" * 300,
    SECTORS // 8: b"last" * 384,
}


def se_model(size: int, below: bytes | None = None) -> bytes:
    data = bytearray(below or bytes(size))
    for grain, value in SE_GRAINS.items():
        data[grain * 4096 : (grain + 1) * 4096] = (b"" if isinstance(value, str) else value).ljust(4096, b"\0")
    return bytes(data[:size])


def se_image(folder: Path, **fields: int) -> Path:
    sesparse(folder / "a-sesparse.vmdk", SECTORS, SE_GRAINS, **fields)
    return descriptor(folder / "a.vmdk", "seSparse", [f'RW {SECTORS} SESPARSE "a-sesparse.vmdk"'])


def test_sesparse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = se_image(tmp_path)
    assert content(path) == se_model(SECTORS * 512)
    assert_agree(path, capsys, checks=False)
    with open_chain(path) as chain:  # one by one, as a guest reads
        for grain in (0, 1, 2, 3, 5, 4095, 4096 * 2 + 1, SECTORS // 8):
            length = min(100, chain.capacity - grain * 4096)
            assert chain.read_at(grain * 4096, length) == se_model(SECTORS * 512)[grain * 4096 :][:length]


def test_sesparse_between_links(tmp_path: Path) -> None:
    """Unmapped and zeroed grains hide the base; what is not stored shows it; an overlay takes the writes."""
    size = SECTORS * 512
    create_image(tmp_path / "base.vmdk", size, durable=False)
    with open_chain(tmp_path / "base.vmdk", writable=True) as chain:
        chain.write_at(0, b"B" * size)
    with open_chain(tmp_path / "base.vmdk") as chain:
        cid = chain.links[0].cid
    sesparse(tmp_path / "a-sesparse.vmdk", SECTORS, SE_GRAINS)
    line = [f'RW {SECTORS} SESPARSE "a-sesparse.vmdk"']
    path = descriptor(tmp_path / "a.vmdk", "seSparse", line, parent_cid=cid, hint="base.vmdk")
    model = se_model(size, b"B" * size)
    assert content(path) == qemu_content(path) == model
    with pytest.raises(Unsupported, match="seSparse extents are read-only"):
        open_chain(path, writable=True)
    create_overlay(tmp_path / "top.vmdk", path, durable=False)
    qemu_io(tmp_path / "top.vmdk", "write -P 9 4k 1k")
    assert content(tmp_path / "top.vmdk") == model[:4096] + b"\x09" * 1024 + model[5120:]


def test_sesparse_far_into_a_file(tmp_path: Path) -> None:
    """A grain's number beyond 12 bits: its low part is in the upper bits of the entry."""
    sesparse(tmp_path / "a-sesparse.vmdk", SECTORS, SE_GRAINS, first_grain=5000)
    path = descriptor(tmp_path / "a.vmdk", "seSparse", [f'RW {SECTORS} SESPARSE "a-sesparse.vmdk"'])
    assert content(path) == qemu_content(path) == se_model(SECTORS * 512)


def test_a_journal_that_waits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = se_image(tmp_path, replay=1)
    assert main(["image", "map", str(path)]) == 63
    extent = tmp_path / "a-sesparse.vmdk"
    message = f"{extent}: byte 0x218: its journal has not been replayed: let ESXi open the disk once"
    assert capsys.readouterr().err == f"qemu-vmdk-snap: {message}\n"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"version": 1}, "version"),
        ({"grain_size": 16}, "grain_size"),
        ({"flags": 1}, "flags"),
        ({"reserved3": 9}, "reserved3"),
        ({"gd_offset": 1 << 40}, "directory_offset"),
        ({"gd_size": 0}, "directory_size"),
        ({"gt_size": 64}, "grain directory entry 0"),
        ({"grains_offset": 1 << 49}, "grain table entry"),
        ({"capacity": 1}, "capacity"),
        ({"capacity": 1 << 62}, "capacity"),
    ],
)
def test_a_damaged_sesparse_is_refused(tmp_path: Path, fields: dict[str, int], field: str) -> None:
    path = se_image(tmp_path, **fields)
    with pytest.raises(FormatError) as error, open_chain(path) as chain:
        chain.read_at(0, 1)
    assert error.value.field == field


@pytest.mark.parametrize("entry", [1, 0x3000000000010000, 0x4000000000000000])
def test_a_sesparse_entry_that_cannot_be(tmp_path: Path, entry: int) -> None:
    path = se_image(tmp_path)
    extent = tmp_path / "a-sesparse.vmdk"
    raw = bytearray(extent.read_bytes())
    at = 512 * (17 + 64 * 3) + 8 * 3
    raw[at : at + 8] = struct.pack("<Q", entry)
    extent.write_bytes(raw)
    for read in ("map", "read"):
        with (
            pytest.raises(FormatError, match=f"byte {at:#x}: grain table entry = '{entry:#x}'"),
            open_chain(path) as chain,
        ):
            list(chain.map()) if read == "map" else chain.read_at(3 * 4096, 1)


def test_cowd_made_larger_and_compacted(tmp_path: Path) -> None:
    """QEMU reads it after each, and what it then writes we read."""
    path, model = tmp_path / "disk.vmdk", bytearray(40 << 20)
    create_image(path, 3 << 20, kind="vmfsSparse", durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(1 << 20, b"a" * 70_000)
        chain.write_at(2 << 20, bytes(70_000))
    model[1 << 20 : (1 << 20) + 70_000] = b"a" * 70_000
    resize(path, len(model))
    assert qemu_content(path) == bytes(model) == content(path)
    report = compact(path)
    assert report.before - report.after >= 70_000
    assert qemu_content(path) == bytes(model) == content(path)
    qemu_io(path, "write -P 0x62 30M 64k", "write -P 0x63 1M 512")
    model[30 << 20 : (30 << 20) + 65536] = b"b" * 65536
    model[1 << 20 : (1 << 20) + 512] = b"c" * 512
    assert content(path) == bytes(model)


@pytest.mark.parametrize("grain_sectors", [1, 16])
def test_another_writers_cowd_made_larger_and_compacted(tmp_path: Path, grain_sectors: int) -> None:
    size, unit = SECTORS * 512, grain_sectors * 512
    grains = some(size, 40, unit)
    cowd(tmp_path / "a-delta.vmdk", SECTORS, grains, grain_sectors=grain_sectors)
    path = descriptor(tmp_path / "a.vmdk", "vmfsSparse", [f'RW {SECTORS} VMFSSPARSE "a-delta.vmdk"'])
    model = expected(size, unit, grains) + bytes(2 * size)
    resize(path, 3 * size)
    assert qemu_content(path) == content(path) == model
    compact(path)
    assert qemu_content(path) == content(path) == model
