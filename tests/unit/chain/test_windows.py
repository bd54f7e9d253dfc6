"""Is the memory of whole-disk operations bounded by windows that fit the grains, with nothing left out between two?"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from qemu_vmdk_snap import ImageOptions, RunKind, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.chain import open_links
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.chain.windows import ROW_GRAINS, extent_windows, windows
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.copy.transfer import LinkWriter, View, upper_tables
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.vmdk.extent import Extent, PlacedExtent
from qemu_vmdk_snap.vmdk.grain import extent as grains
from qemu_vmdk_snap.vmdk.grain.tables import GrainTables, read_directory
from qemu_vmdk_snap.vmdk.runs import RunTable
from qemu_vmdk_snap.vmdk.sparse.extent import SparseExtent

GRAIN = 4096
MIB = 1 << 20


class Shape:
    """As much of an extent as decides upon windows."""

    def __init__(self, capacity: int, grain_bytes: int, varied_bytes: int) -> None:
        self.capacity, self.grain_bytes, self.varied_bytes = capacity, grain_bytes, varied_bytes

    def runs(self, start: int, end: int) -> int:
        """Return how many runs there may be at most in the part of it that lies in [start, end)."""
        start, end = max(0, start), min(end, self.capacity)
        varied = -(-min(end, self.varied_bytes) // self.grain_bytes) - start // self.grain_bytes
        return max(0, varied) + (end > max(start, self.varied_bytes))


@st.composite
def shapes(draw: st.DrawFn) -> list[PlacedExtent]:
    placed, start = [], 0
    for _ in range(draw(st.integers(1, 4))):
        capacity, grain = draw(st.integers(1, 300)), draw(st.sampled_from([1, 2, 4, 8]))
        varied = draw(st.sampled_from([0, capacity // 2, capacity]))
        placed.append(PlacedExtent(start, cast("Extent", Shape(capacity, grain, varied)), 0))
        start += capacity
    return placed


@given(st.lists(shapes(), min_size=1, max_size=3), st.integers(0, 400), st.integers(0, 800), st.integers(1, 40))
def test_windows_cover_the_range_and_are_no_larger_than_they_may(
    links: list[list[PlacedExtent]], start: int, length: int, limit: int
) -> None:
    at = start
    for first, last in windows(links, start, start + length, limit):
        assert first == at < last
        at = last
        for extents in links:
            runs = sum(cast("Shape", one.extent).runs(first - one.start, last - one.start) for one in extents)
            assert runs <= 2 * limit + 1
    assert at == max(start, start + length)


def fragment(path: Path) -> None:
    """Let each grain of an image be stored, and none of them behind the one before: by its tables alone."""
    with open_chain(path) as chain:
        extent = chain.links[0].extents[0].extent
        assert isinstance(extent, SparseExtent)
        header = extent.header
        places = [header.gd_offset, header.rgd_offset]
        copies = [read_directory(extent.file, place * 512, header.gd_entries).tolist() for place in places]
        count = extent.capacity // GRAIN
        first = -(-path.stat().st_size // GRAIN)
    entries = ((first + np.arange(count)[::-1]) * (GRAIN // 512)).astype("<u4").reshape(-1, 512)
    with path.open("r+b") as file:
        for directory in copies:
            for table, sector in zip(entries, directory, strict=True):
                file.seek(sector * 512)
                file.write(table.tobytes())
        file.truncate((first + count) * GRAIN)


@pytest.fixture
def fragmented(tmp_path: Path) -> Path:
    """An overlay of 2 GiB that stores half a million grains, each somewhere else."""
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    create_image(base, 2048 * MIB, options=ImageOptions(grain_size=GRAIN), durable=False)
    create_overlay(top, base, durable=False)
    fragment(top)
    return top


def test_no_operation_takes_up_more_runs_at_once_than_a_window_has(
    fragmented: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_chain(fragmented) as chain:
        stored = chain.capacity // GRAIN
        for tables in (
            list(upper_tables(chain, 1, 0, chain.capacity)),
            list(View(chain, 0).tables(0, chain.capacity)),
            list(chain.links[0].tables()),
        ):
            assert [len(table.starts) for table in tables] == [ROW_GRAINS] * (stored // ROW_GRAINS)
    spans: list[int] = []
    resolve = SparseExtent.resolve

    def counted(extent: SparseExtent, start: int, end: int) -> RunTable:
        spans.append((end - start) // GRAIN)
        return resolve(extent, start, end)

    monkeypatch.setattr(SparseExtent, "resolve", counted)
    rebase(fragmented, None)  # its parent is seen nowhere: nothing is copied
    with open_links(fragmented, writable_depths=[0], resolver=confined()) as chain:
        writer = LinkWriter(chain.links[0], View(chain, 1), ignore_step)
        for placed, first, last in writer._pieces(GRAIN, chain.capacity - GRAIN):
            spans.append((last - first) // placed.extent.grain_bytes)
    assert stored // ROW_GRAINS < len(spans)
    assert max(spans) == ROW_GRAINS


def ignore_step(length: int) -> None:
    """Hear of bytes that were copied."""


def test_tables_that_wait_to_be_stored_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grains that are far from each other have a table each, and a table takes more memory than a grain's entry."""
    monkeypatch.setattr(grains, "MAX_DIRTY_TABLES", 3)
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    create_image(base, 64 * MIB, options=ImageOptions(grain_size=GRAIN, zeroed_grain=True), durable=False)
    create_overlay(top, base, durable=False)
    with open_chain(top, writable=True) as chain:
        for table in range(32):
            chain.write_at(table * 2 * MIB, bytes([table + 1]) * GRAIN)
        expected = chain.read_at(0, chain.capacity)
    waiting: list[int] = []
    set_entry = GrainTables.set_entry

    def counted(tables: GrainTables, grain: int, value: int) -> None:
        set_entry(tables, grain, value)
        waiting.append(len(tables.dirty))

    monkeypatch.setattr(GrainTables, "set_entry", counted)
    commit(top, delete=True)
    assert len(waiting) >= 32
    assert max(waiting) <= 4
    with open_chain(base) as merged:
        assert merged.read_at(0, merged.capacity) == expected


def test_disk_without_grains_is_one_window(tmp_path: Path) -> None:
    image = tmp_path / "endless.vmdk"
    image.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="custom"\nRW {(1 << 54) - 1} ZERO\n'
    )
    with open_chain(image) as chain:
        assert list(chain.windows(0, chain.capacity)) == [(0, chain.capacity)]
        assert [(run.kind, run.length) for run in chain.map()] == [(RunKind.ZERO, chain.capacity)]
        assert list(extent_windows(chain.links[0].extents[0].extent)) == [(0, chain.capacity)]
    assert check_image(image, resolver=confined()).corruptions == 0
