"""Do run tables merge, cut and join as the bytes that they stand for?"""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from qemu_vmdk_snap.vmdk.runs import COMPRESSED, DATA, HOLE, ZERO, Row, RunTable, from_entries

UNIT = 10
Place = tuple[int, int, int]


def table_of(kinds: list[int], offsets: list[int], source: int) -> RunTable:
    array = np.array(kinds, np.uint8)
    places = np.array(offsets, np.int64) * UNIT
    return from_entries(array, places, UNIT, 0, len(kinds) * UNIT).with_source(source)


def places(table: RunTable, start: int, end: int) -> list[Place]:
    """What each byte is, one by one: the slow truth."""
    found: list[Place] = []
    for row in table.rows():
        for i in range(row.length):
            byte = row.file_offset + i if row.kind == DATA else row.file_offset if row.kind == COMPRESSED else 0
            source = row.source if row.kind != HOLE else -1
            found.append((row.kind, source, byte))
    assert table.end == end
    assert len(found) == end - start
    return found


def tables(source: int) -> st.SearchStrategy[RunTable]:
    grains = st.lists(
        st.tuples(st.sampled_from([HOLE, HOLE, ZERO, DATA, DATA, COMPRESSED]), st.integers(1, 20)),
        min_size=8,
        max_size=8,
    )
    return grains.map(lambda g: table_of([kind for kind, _ in g], [at for _, at in g], source))


@given(tables(0), tables(1))
def test_over_shows_what_lies_below_through_the_holes(top: RunTable, below: RunTable) -> None:
    upper, lower = places(top, 0, 80), places(below, 0, 80)
    expected = [low if up[0] == HOLE else up for up, low in zip(upper, lower, strict=True)]
    merged = top.over(below)
    assert places(merged, 0, 80) == expected
    assert places(merged.coalesced(), 0, 80) == expected


@given(tables(0), st.integers(0, 79), st.integers(1, 80))
def test_clipped_is_the_same_bytes(table: RunTable, start: int, length: int) -> None:
    end = min(80, start + length)
    assert places(table.clipped(start, end), start, end) == places(table, 0, 80)[start:end]


@given(tables(0))
def test_coalesced_leaves_no_neighbours_that_go_on(table: RunTable) -> None:
    rows = table.coalesced().rows()
    assert places(table.coalesced(), 0, 80) == places(table, 0, 80)
    for one, two in itertools.pairwise(rows):
        goes_on = one.file_offset if one.kind == COMPRESSED else one.file_offset + one.length
        assert one.kind != two.kind or (one.kind >= DATA and two.file_offset != goes_on)


def test_runs_of_grains() -> None:
    table = table_of([DATA, DATA, HOLE, HOLE, DATA, ZERO, COMPRESSED, COMPRESSED], [5, 6, 0, 0, 9, 1, 3, 4], 2)
    assert table.rows() == [
        Row(0, 20, DATA, 2, 50),
        Row(20, 20, HOLE, -1, 0),
        Row(40, 10, DATA, 2, 90),
        Row(50, 10, ZERO, 2, 0),
        Row(60, 10, COMPRESSED, 2, 30),
        Row(70, 10, COMPRESSED, 2, 40),
    ]
