"""A repair mends COWD extents as it does hosted sparse ones: as others write them, and as we do."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.check.findings import Severity
from qemu_vmdk_snap.ops.check.repair import repair, take_back
from tests.support import esxi

SECTORS = 3 * 4096 + 100  # four tables, the last one covered in part
GRAINS = {grain: bytes([grain % 251 + 1]) * 512 for grain in (0, 1, 2, 500, 4096, 4097, 9000, SECTORS - 1)}
GD = 4 * 512


class Delta:
    """An extent with its descriptor, and what a guest must read."""

    def __init__(self, folder: Path, slack: int) -> None:
        self.path, self.extent = folder / "disk.vmdk", folder / "disk-delta.vmdk"
        esxi.cowd(self.extent, SECTORS, GRAINS)
        with self.extent.open("ab") as file:
            file.write(bytes(slack))  # ESXi makes the file longer than it needs
        esxi.descriptor(self.path, "vmfsSparse", [f'RW {SECTORS} VMFSSPARSE "{self.extent.name}"'])
        self.model = bytearray(SECTORS * 512)
        for grain, data in GRAINS.items():
            self.model[grain * 512 : grain * 512 + 512] = data

    def u32(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.extent.read_bytes(), at)[0])

    def put(self, at: int, value: int) -> None:
        with self.extent.open("r+b") as file:
            file.seek(at)
            file.write(struct.pack("<I", value))

    def entry(self, grain: int) -> int:
        """Return the byte of a grain's table entry."""
        return self.u32(GD + 4 * (grain // 4096)) * 512 + 4 * (grain % 4096)

    def forget(self, *grains: int) -> None:
        for grain in grains:
            self.model[grain * 512 : grain * 512 + 512] = bytes(512)

    def verify(self, *, leaks: bool = False) -> None:
        with open_chain(self.path) as chain:
            assert chain.read_at(0, chain.capacity) == self.model
        found = check_image(self.path, resolver=confined()).findings
        assert all(leaks and finding.severity is Severity.LEAK for finding in found), found


def shared(delta: Delta) -> None:
    delta.put(delta.entry(7), delta.u32(delta.entry(1)))
    delta.model[7 * 512 : 8 * 512] = GRAINS[1]


def beyond(delta: Delta) -> None:
    delta.put(delta.entry(4096), 1 << 24)
    delta.forget(4096)


def in_the_metadata(delta: Delta) -> None:
    delta.put(delta.entry(4096), 4)
    delta.forget(4096)


def table_beyond(delta: Delta) -> None:
    delta.put(GD + 4, 0xFFFF_FF00)
    delta.forget(4096, 4097)


def table_over_the_header(delta: Delta) -> None:
    delta.put(GD + 4, 1)
    delta.forget(4096, 4097)


def one_table_for_two(delta: Delta) -> None:
    delta.put(GD + 4, delta.u32(GD))
    delta.forget(4096, 4097)


def free_sector_too_low(delta: Delta) -> None:
    delta.put(28, delta.u32(28) - 3)


def leaked(delta: Delta) -> None:
    delta.put(delta.entry(1), 0)
    delta.forget(1)


FAULTS = [
    shared,
    beyond,
    in_the_metadata,
    table_beyond,
    table_over_the_header,
    one_table_for_two,
    free_sector_too_low,
    leaked,
]


LOSE_A_TABLE = (table_beyond, table_over_the_header, one_table_for_two)
"""What the table and its grains took may stay lost: tables behind it are not moved, and only grains behind them are."""


@pytest.mark.parametrize("slack", [0, 1 << 20])
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_mended_and_taken_back(tmp_path: Path, fault: Callable[[Delta], None], slack: int) -> None:
    delta = Delta(tmp_path, slack)
    delta.verify()
    fault(delta)
    broken = delta.extent.read_bytes()
    report = repair(delta.path, resolver=confined())
    assert report.before.corruptions + report.before.leaks + report.before.repairable > 0
    assert report.undo is not None
    delta.verify(leaks=fault in LOSE_A_TABLE)
    assert repair(delta.path, resolver=confined()).undo is None
    mended = delta.extent.read_bytes()
    take_back(report.undo)
    assert len(delta.extent.read_bytes()) == len(broken)
    assert delta.extent.read_bytes() == broken or not report.before.corruptions + report.before.repairable
    report.undo.unlink()
    repair(delta.path, resolver=confined())
    assert delta.extent.read_bytes() == mended


def test_what_is_written_afterwards_is_behind_everything(tmp_path: Path) -> None:
    delta = Delta(tmp_path, 0)
    shared(delta)
    free_sector_too_low(delta)
    repair(delta.path, resolver=confined())
    with open_chain(delta.path, writable=True) as chain:
        chain.write_at(20 * 512, b"new" * 512)
    delta.model[20 * 512 : 23 * 512] = b"new" * 512
    delta.verify()


def test_nothing_is_wrong_where_nothing_is_stored(tmp_path: Path) -> None:
    """Tables are made on demand: the file of an empty delta is shorter than one of them."""
    esxi.cowd(tmp_path / "empty.vmdk", SECTORS, {})
    assert check_image(tmp_path / "empty.vmdk", resolver=confined()).findings == ()


def test_a_disk_from_before_descriptors(tmp_path: Path) -> None:
    delta = Delta(tmp_path, 0)
    shared(delta)
    delta.path.unlink()  # a descriptor that names it would be the image to open
    delta.path = delta.extent
    assert repair(delta.path, resolver=confined()).undo == tmp_path / "disk-delta.vmdk.undo"
    delta.verify()
