"""Does a repair keep every byte of the guest's, whatever is wrong with one of the two copies of the tables?"""

from __future__ import annotations

import random
import struct
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import given, settings

from qemu_vmdk_snap import ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.check.repair import repair, take_back
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.vmdk.sparse.copies import settle_copies
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader

SIZES = [512 * 2048, 4 * (1 << 20) + 1536, 40 * (1 << 20)]


class Overlay:
    """An overlay with some grains stored and some marked as zeros."""

    def __init__(self, folder: Path, size: int, grain: int, zeroed: bool, seed: int) -> None:
        self.path, self.random = folder / "top.vmdk", random.Random(seed)
        create_image(folder / "base.vmdk", size, durable=False)
        with open_chain(folder / "base.vmdk", writable=True) as chain:
            chain.write_at(0, b"below" * 100_000)
        options = ImageOptions(grain_size=grain, zeroed_grain=zeroed)
        create_overlay(self.path, folder / "base.vmdk", options=options, durable=False)
        with open_chain(self.path, writable=True) as chain:
            for _ in range(self.random.randint(1, 8)):
                offset = self.random.randrange(size - 512)
                chain.write_at(offset, self.random.randbytes(min(size - offset, self.random.randint(1, 60_000))))
        self.raw = bytearray(self.path.read_bytes())
        header = SparseExtentHeader.parse(bytes(self.raw[:512]), path=self.path)
        self.tables, self.grains = header.gd_entries, -(-size // grain)
        self.directories = (header.gd_offset, header.rgd_offset)
        if zeroed:
            for grain_number in self.random.choices(range(self.grains), k=5):
                for copy in (0, 1):
                    self.put(self.entry(copy, grain_number), 1)

    def u32(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.raw, at)[0])

    def put(self, at: int, value: int) -> None:
        struct.pack_into("<I", self.raw, at, value)

    def table(self, copy: int, table: int) -> int:
        """Return the byte of a directory entry."""
        return self.directories[copy] * 512 + 4 * table

    def entry(self, copy: int, grain: int) -> int:
        """Return the byte of a table entry."""
        return self.u32(self.table(copy, grain // 512)) * 512 + 4 * (grain % 512)

    def damage(self, copy: int, where: str) -> None:
        """Spoil one place of one copy with what cannot be right there."""
        size = len(self.raw) // 512
        wrong = [2, *self.directories, size, 1 << 31, 0xFFFF_FFFF, self.u32(self.table(1 - copy, self.tables - 1))]
        if where == "header":
            values = [1, 1 << 20, 1 << 50, self.directories[1 - copy]]
            struct.pack_into("<Q", self.raw, (56, 48)[copy], self.random.choice(values))
        elif where == "directory":
            values = [0, *wrong, self.u32(self.table(copy, 0))]
            self.put(self.table(copy, self.random.randrange(self.tables)), self.random.choice(values))
        elif where == "forgotten":  # as by a power cut between the copies, or as tables that were zeroed
            for table in range(self.tables) if self.random.random() < 0.3 else []:
                at = self.entry(copy, table * 512)
                self.raw[at : at + 2048] = bytes(2048)
            for grain in self.random.choices(range(self.grains), k=60):
                self.put(self.entry(copy, grain), 0)
        else:
            self.put(self.entry(copy, self.random.randrange(self.grains)), self.random.choice(wrong))


@settings(max_examples=60)
@given(
    size=st.sampled_from(SIZES),
    grain=st.sampled_from([4096, 65536]),
    zeroed=st.booleans(),
    copy=st.sampled_from([0, 1]),
    seed=st.integers(0, 1 << 30),
)
def test_settling_brings_back_what_a_repair_does(size: int, grain: int, zeroed: bool, copy: int, seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vmdk-settle-") as folder:
        overlay = Overlay(Path(folder), size, grain, zeroed, seed)
        whole = bytes(overlay.raw)
        overlay.path.write_bytes(whole)
        with open_chain(overlay.path) as chain:
            content = chain.read_at(0, chain.capacity)
        overlay.damage(copy, "forgotten")
        overlay.path.write_bytes(overlay.raw)
        header = SparseExtentHeader.parse(whole[:512], path=overlay.path)
        file = PosixFile.open(overlay.path, writable=True)
        try:
            settle_copies(file, header)
        finally:
            file.close()
        assert overlay.path.read_bytes() == whole
        overlay.path.write_bytes(overlay.raw)
        assert check_image(overlay.path, resolver=confined()).corruptions == 0
        assert repair(overlay.path, resolver=confined()).after.findings == ()
        with open_chain(overlay.path) as chain:
            assert chain.read_at(0, chain.capacity) == content


@settings(max_examples=100)
@given(
    size=st.sampled_from(SIZES),
    grain=st.sampled_from([4096, 65536]),
    zeroed=st.booleans(),
    copy=st.sampled_from([0, 1]),
    where=st.sampled_from(["header", "directory", "table", "forgotten"]),
    seed=st.integers(0, 1 << 30),
)
def test_one_copy_is_enough(size: int, grain: int, zeroed: bool, copy: int, where: str, seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vmdk-repair-") as folder:
        overlay = Overlay(Path(folder), size, grain, zeroed, seed)
        overlay.path.write_bytes(overlay.raw)
        with open_chain(overlay.path) as chain:
            content = chain.read_at(0, chain.capacity)
        overlay.damage(copy, where)
        overlay.path.write_bytes(overlay.raw)
        report = repair(overlay.path, resolver=confined())
        assert report.after.corruptions == 0
        with open_chain(overlay.path) as chain:
            assert chain.read_at(0, chain.capacity) == content
        if (
            report.undo is not None and report.before.corruptions + report.before.repairable
        ):  # what leaks alone held is not kept
            take_back(report.undo)
            assert overlay.path.read_bytes() == overlay.raw
