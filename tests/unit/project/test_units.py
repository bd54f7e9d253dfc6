"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from qemu_vmdk_snap.units import byte_sectors, format_size, parse_size, round_up, sector_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("1k", 1024),
        ("64K", 65536),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("7b", 7),
        (" 8M ", 8 << 20),
        ("0x200", 512),
        ("0XfF", 255),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "1KB", "1X", "0.3", "nan", "1e3x", "1 2", ".", "0x", "0x10k", "0x1_0", "-0x1"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (512, "512 B"), (65536, "64 KiB"), (10 << 20, "10 MiB"), (1122304, "1.07 MiB"), (3 << 39, "1.5 TiB")],
)
def test_format_size_is_qemu_imgs(size: int, text: str) -> None:
    assert format_size(size) == text


def test_sectors() -> None:
    assert sector_bytes(3) == 1536
    assert byte_sectors(1) == 1
    assert byte_sectors(1024) == 2
    assert round_up(65537, 65536) == 131072
