"""Boot tests of disk images: `pytest` in this folder runs them, with the wheel of qemu-vmdk-snap and QEMU installed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, open_chain
from qemu_vmdk_snap.harness import ChainMaker, Content, Machine

Boot = Callable[..., Machine]


def test_a_guest_reads_what_was_written(vmdk_chain: ChainMaker, vmdk_guest: Boot) -> None:
    chain = vmdk_chain.base("64M").write("1M", b"in the base").snapshot().write("1M", b"overlay")
    with vmdk_guest(chain) as guest:
        guest.assert_reads()


@pytest.mark.vmdk_kinds("monolithicSparse", "streamOptimized")
@pytest.mark.vmdk_controllers("ahci", "virtio-blk")
def test_kinds_and_controllers(vmdk_chain: ChainMaker, vmdk_guest: Boot) -> None:
    with vmdk_guest(vmdk_chain.of_depth(2, "8M")) as guest:
        guest.assert_reads()


def test_what_a_guest_wrote_is_there_after_a_power_cut(vmdk_chain: ChainMaker, vmdk_guest: Boot) -> None:
    chain = vmdk_chain.base("64M")
    with vmdk_guest(chain, writable=True) as guest:
        guest.probe.write(4096, b"by the guest".ljust(512))
        guest.kill()
    with open_chain(chain.top) as disk:
        assert disk.read_at(4096, 12) == b"by the guest"


def test_an_image_of_ones_own(tmp_path: Path, vmdk_guest: Boot) -> None:
    """Your build would make the image; this one has a boot sector that says `login:` and waits."""
    code = b"\xbe\x10\x7c\xba\xf8\x03\xac\x84\xc0\x74\x03\xee\xeb\xf8\xf4\xf4" + b"\r\nexample login: \0"
    boot_sector = struct.pack("510sH", code, 0xAA55)
    create_image(tmp_path / "disk.vmdk", 16 << 20)
    with open_chain(tmp_path / "disk.vmdk", writable=True) as disk:
        disk.write_at(0, boot_sector)

    vmdk_guest(tmp_path / "disk.vmdk", expect="login:")  # its own system, up to its prompt

    model = Content(16 << 20)
    model.write(0, boot_sector)
    vmdk_guest(tmp_path / "disk.vmdk").assert_reads(model)  # the probe in its place: is all of it as it was built?
