"""Are header records byte-exact both ways, and are their rules told by name and place?"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader, check_header
from qemu_vmdk_snap.vmdk.sparse.layout import plan_sparse

HERE = Path("h.vmdk")
U64 = st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    SparseExtentHeader,
    magic=st.just(b"KDMV"),
    version=st.sampled_from([1, 2, 3]),
    flags=st.integers(0, 2**32 - 1),
    capacity=U64,
    grain_size=st.integers(0, 21).map(lambda n: 1 << n),
    descriptor_offset=U64,
    descriptor_size=U64,
    gtes_per_gt=st.integers(1, 512),
    rgd_offset=U64,
    gd_offset=U64,
    overhead=U64,
    unclean_shutdown=st.integers(0, 255),
    newline_probe=st.binary(min_size=4, max_size=4),
    compression=st.integers(0, 65535),
    reserved=st.binary(min_size=433, max_size=433),
)


@given(HEADERS)
def test_serialise_then_parse_is_the_same(header: SparseExtentHeader) -> None:
    raw = header.serialise()
    assert len(raw) == 512
    assert SparseExtentHeader.parse(raw, path=HERE) == header
    assert SparseExtentHeader.parse(raw, path=HERE).serialise() == raw


def test_fields_are_where_the_format_has_them() -> None:
    places = {column.name: column.offset for column in SparseExtentHeader.columns()}
    assert places == {
        "magic": 0,
        "version": 4,
        "flags": 8,
        "capacity": 12,
        "grain_size": 20,
        "descriptor_offset": 28,
        "descriptor_size": 36,
        "gtes_per_gt": 44,
        "rgd_offset": 48,
        "gd_offset": 56,
        "overhead": 64,
        "unclean_shutdown": 72,
        "newline_probe": 73,
        "compression": 77,
        "reserved": 79,
    }
    assert set(places) == {field.name for field in fields(SparseExtentHeader)}


def test_a_short_header() -> None:
    with pytest.raises(FormatError) as caught:
        SparseExtentHeader.parse(b"KDMV", path=HERE)
    assert str(caught.value) == "h.vmdk: byte 0x0: SparseExtentHeader = 4: must be 512 bytes long"


@given(st.integers(1, 1 << 27), st.sampled_from([8, 128, 2048]), st.booleans())
def test_a_planned_layout_holds_together(sectors: int, grain: int, zeroed: bool) -> None:
    layout = plan_sparse(sectors, grain_sectors=grain, zeroed_grains=zeroed, descriptor=b"x" * 700)
    header = layout.header
    check_header(header, HERE, header.overhead * 512)
    ends = [header.descriptor_offset + header.descriptor_size, header.rgd_offset, layout.rgt_sector]
    ends += [header.gd_offset, layout.gt_sector, header.overhead]
    assert ends == sorted(ends)
    assert layout.gt_sector + header.gd_entries * 4 <= header.overhead
    assert header.overhead % grain == 0
    assert header.gd_entries * header.gt_coverage >= sectors


def test_a_descriptor_larger_than_the_usual_room_gets_its_own() -> None:
    layout = plan_sparse(100, grain_sectors=128, zeroed_grains=False, descriptor=b"x" * 30_000)
    assert layout.header.descriptor_size * 512 >= 30_000
    assert layout.header.rgd_offset == 1 + layout.header.descriptor_size


def test_an_unknown_version_is_named() -> None:
    header = plan_sparse(100, grain_sectors=128, zeroed_grains=False, descriptor=None).header
    with pytest.raises(FormatError, match=r"byte 0x4: version = 4: must be 1, 2 or 3"):
        SparseExtentHeader.parse(replace(header, version=4).serialise(), path=HERE)
