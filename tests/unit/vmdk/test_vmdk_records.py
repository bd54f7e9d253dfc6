"""Does every header come back byte for byte, reserved bytes included?"""

from __future__ import annotations

import struct
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_vmdk_snap.vmdk.cowd.header import CowdHeader
from qemu_vmdk_snap.vmdk.ondisk import OnDisk
from qemu_vmdk_snap.vmdk.sesparse import ConstHeader, VolatileHeader
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader

PATH = Path("x.vmdk")


def assert_round_trip(record: type[OnDisk], raw: bytes) -> None:
    parsed = record.parse(raw, path=PATH)
    assert parsed.serialise() == raw
    assert record.parse(parsed.serialise(), path=PATH) == parsed


def rest(length: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=length, max_size=length)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.integers(0, 21), st.integers(1, 512), rest(12), rest(16), rest(464))
def test_sparse(version: int, shift: int, gtes: int, start: bytes, middle: bytes, tail: bytes) -> None:
    raw = b"KDMV" + struct.pack("<I", version) + start + struct.pack("<Q", 1 << shift) + middle
    raw += struct.pack("<I", gtes) + tail
    assert_round_trip(SparseExtentHeader, raw)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 0x200000), rest(8), rest(2028))
def test_cowd(grain: int, middle: bytes, tail: bytes) -> None:
    assert_round_trip(CowdHeader, b"COWD" + struct.pack("<I", 1) + middle + struct.pack("<I", grain) + tail)


@settings(max_examples=80, deadline=None)
@given(rest(8), rest(16 * 8 + 304), rest(24 + 480))
def test_sesparse(capacity: bytes, tail: bytes, volatile: bytes) -> None:
    raw = struct.pack("<2Q", 0xCAFEBABE, 0x200000001) + capacity + struct.pack("<7Q", 8, 64, 0, 0, 0, 0, 0) + tail
    assert_round_trip(ConstHeader, raw)
    assert_round_trip(VolatileHeader, struct.pack("<Q", 0xCAFECAFE) + volatile)
