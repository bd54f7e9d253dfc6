"""The images that are measured: disks with real data, and huge ones that have nothing but tables."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

import numpy as np

from qemu_vmdk_snap import create_image, create_overlay, open_chain
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader

MIB: Final = 1 << 20
GIB: Final = 1 << 30
GRAIN: Final = 64 << 10


def fill(path: Path, runs: list[tuple[int, int]], seed: int) -> None:
    """Write so many bytes of noise at each offset: no two blocks alike, nothing that compresses."""
    noise = np.random.default_rng(seed)
    with open_chain(path, writable=True) as chain:
        for offset, length in runs:
            for start in range(offset, offset + length, 4 * MIB):
                chain.write_at(start, noise.bytes(min(4 * MIB, offset + length - start)))


def half_full_chain(folder: Path, size: int, links: int, seed: int = 1) -> Path:
    """Make a chain whose links together store every second MiB of the disk; return its top."""
    places = list(range(0, size, 2 * MIB))
    random.Random(seed).shuffle(places)
    top = folder / "link-1.vmdk"
    create_image(top, size, durable=False)
    for number in range(1, links + 1):
        if number > 1:
            below, top = top, folder / f"link-{number}.vmdk"
            create_overlay(top, below, durable=False)
        share = places[(number - 1) * len(places) // links : number * len(places) // links]
        fill(top, [(place, MIB) for place in sorted(share)], seed + number)
    return top


def overlay_with_data(folder: Path, size: int, data: int) -> Path:
    """Make an empty base and an overlay that stores `data` bytes; return the overlay."""
    base, top = folder / "base.vmdk", folder / "top.vmdk"
    create_image(base, size, durable=False)
    create_overlay(top, base, durable=False)
    fill(top, [(0, data)], 1)
    return top


def table_only_chain(folder: Path, size: int, links: int, share: float, clusters: int, seed: int = 1) -> Path:
    """Make a chain with full tables and no data: the base stores everything it can, each overlay `share` in runs.

    The runs of an overlay lie in `clusters` stretches of the disk. Data is a hole of the files, which end behind it.
    """
    chooser = np.random.default_rng(seed)
    top = folder / "link-1.vmdk"
    create_image(top, size, durable=False)
    total = size // GRAIN
    capacity = (1 << 32) * 512 // GRAIN - 4096 * 64
    _name_grains(top, np.arange(min(total, capacity // 2)))
    for number in range(2, links + 1):
        below, top = top, folder / f"link-{number}.vmdk"
        create_overlay(top, below, durable=False)
        runs = max(1, int(total * share) // 16)
        homes = chooser.integers(0, total // 8192, clusters) * 8192
        starts = chooser.choice(homes, runs) + chooser.integers(0, 8192 // 16, runs) * 16
        _name_grains(top, np.unique((np.unique(starts)[:, None] + np.arange(16)).reshape(-1)))
    return top


def _name_grains(path: Path, grains: np.ndarray) -> None:
    """Let the tables of `path` name the grains, one behind the other from the overhead on."""
    with path.open("r+b") as file:
        header = SparseExtentHeader.parse(file.read(512), path=path)
        sectors = header.overhead + header.grain_size * np.arange(len(grains), dtype=np.int64)
        tables = grains // header.gtes_per_gt
        edges = np.flatnonzero(np.diff(tables)) + 1
        groups = zip(np.split(grains, edges), np.split(sectors, edges), strict=True)
        gds = [
            np.fromfile(path, "<u4", header.gd_entries, offset=gd * 512) for gd in (header.gd_offset, header.rgd_offset)
        ]
        for some, places in groups:
            entries = np.zeros(header.gtes_per_gt, "<u4")
            entries[some % header.gtes_per_gt] = places
            for directory in gds:
                file.seek(int(directory[some[0] // header.gtes_per_gt]) * 512)
                file.write(entries.tobytes())
        file.truncate(int(sectors[-1] + header.grain_size) * 512)
