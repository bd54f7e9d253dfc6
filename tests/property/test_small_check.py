"""Is the check of a small extent without NumPy silent wherever the one with tables has something to report?"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, create_image, open_chain
from qemu_vmdk_snap.ops.check.findings import Findings
from qemu_vmdk_snap.ops.check.small import audit_small
from qemu_vmdk_snap.ops.check.tables import audit_tables
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.units import SECTOR_SIZE
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader


def a_sound_image(path: Path, draw: random.Random) -> None:
    options = ImageOptions(grain_size=draw.choice([4096, 16384, 65536]), zeroed_grain=draw.random() < 0.5)
    create_image(path, (5 << 20) + SECTOR_SIZE * draw.randint(0, 300), options=options, durable=False)
    with open_chain(path, writable=True) as chain:
        for _ in range(draw.randint(0, 12)):
            at = draw.randrange(0, chain.capacity - 1)
            chain.write_at(at, b"x" * min(draw.randint(1, 300_000), chain.capacity - at))


def damage(path: Path, draw: random.Random) -> None:
    """Change a table entry, a directory entry, or the length of the file."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        if draw.random() < 0.2:
            file.truncate(size + draw.choice([-SECTOR_SIZE, SECTOR_SIZE, 65536, -65536, 1]))
            return
        header = SparseExtentHeader.parse(path.read_bytes()[:SECTOR_SIZE], path=path)
        place = draw.choice([header.gd_offset, header.rgd_offset]) * SECTOR_SIZE
        file.seek(place)
        if draw.random() < 0.7:
            place = int.from_bytes(file.read(4), "little") * SECTOR_SIZE + 4 * draw.randrange(header.gtes_per_gt)
        file.seek(place)
        there = int.from_bytes(file.read(4), "little")
        changed = draw.choice([0, 1, 2, there + 1, there + header.grain_size, size // SECTOR_SIZE, 1 << 31])
        file.seek(place)
        file.write(changed.to_bytes(4, "little"))


@pytest.mark.parametrize("seed", range(80))
def test_what_it_says_is_what_the_tables_say(tmp_path: Path, seed: int) -> None:
    draw, path = random.Random(seed), tmp_path / "d.vmdk"
    a_sound_image(path, draw)
    for _ in range(draw.choice([0, 1, 1, 2])):
        damage(path, draw)
    file = PosixFile.open(path)
    try:
        header = SparseExtentHeader.parse(file.read_at(0, SECTOR_SIZE), path=path)
        small, findings = audit_small(file, header), Findings()
        whole = audit_tables(file, header, findings, lambda _: None)
    finally:
        file.close()
    if findings.listed:
        assert small is None, findings.listed
    else:
        assert small is not None
        assert (small.counts, small.end) == (whole.counts, whole.end)
