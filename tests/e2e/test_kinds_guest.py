"""Does a guest see on every kind what the engine reads, and write to those that can be written?"""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.disk import RawDisk
from qemu_vmdk_snap.harness import boot, pattern, verify_image
from qemu_vmdk_snap.ops.copy.convert import convert
from qemu_vmdk_snap.ops.make.layout import KINDS
from tests.support.esxi import descriptor, sesparse

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

MIB = 1 << 20
SIZE = 6 * MIB + 512
WRITABLE = [name for name in KINDS if name != "streamOptimized"]


def filled(folder: Path, kind: str) -> Path:
    raw = folder / "source.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE)
        for sector, count in ((0, 3), (2047, 130), (SIZE // 512 - 1, 1)):
            file.seek(sector * 512)
            file.write(pattern(5, sector * 512, count * 512))
    with RawDisk(raw) as source:
        convert(source, folder / "a.vmdk", options=ImageOptions(subformat=kind), sparse_size=4096, durable=False)
    raw.unlink()
    return folder / "a.vmdk"


@pytest.mark.parametrize("kind", KINDS)
def test_a_guest_reads_what_we_wrote(tmp_path: Path, kind: str) -> None:
    """Its verification reads every stored byte in the guest, on the image itself and through an overlay."""
    path = filled(tmp_path, kind)
    create_overlay(tmp_path / "top.vmdk", path, durable=False)
    with open_chain(tmp_path / "top.vmdk", writable=True) as chain:
        chain.write_at(2047 * 512 + 100, b"over the base")
    report = verify_image(tmp_path / "top.vmdk", samples=2)
    assert report.identical, report.mismatches
    assert report.stored >= 64 * 512


@pytest.mark.parametrize("kind", WRITABLE)
def test_what_a_guest_writes_is_what_we_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.vmdk"
    create_image(path, SIZE, kind=kind, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(MIB, b"ours" * 1000)
    model = bytearray(SIZE)
    model[MIB : MIB + 4000] = b"ours" * 1000
    with boot(path, writable=True) as machine:
        for seed, lba, count in ((1, 0, 2), (2, MIB // 512 + 4, 300), (3, SIZE // 512 - 1, 1)):
            machine.probe.pattern(seed, lba * 512, count * 512)
            model[lba * 512 : (lba + count) * 512] = pattern(seed, lba * 512, count * 512)
        machine.power_off()
    with open_chain(path) as chain:
        assert chain.read_at(0, SIZE) == model


def test_a_guest_reads_sesparse(tmp_path: Path) -> None:
    sesparse(
        tmp_path / "a-sesparse.vmdk",
        SIZE // 512,
        {0: pattern(1, 0, 4096), 1: "zero", 900: pattern(2, 7200 * 512, 4096)},
    )
    line = [f'RW {SIZE // 512} SESPARSE "a-sesparse.vmdk"']
    report = verify_image(descriptor(tmp_path / "a.vmdk", "seSparse", line), samples=2)
    assert report.identical, report.mismatches
    assert report.stored == 2 * 4096
