"""Makes the golden files: one small image of each kind that the engine writes, the same bytes in every run.

`python -m tests.golden.make` writes them and the table of their SHA-256 anew, for when the format on disk is changed on
purpose; the test makes them in a scratch folder and compares. Whatever is drawn at random (CIDs, UUIDs) comes from a
counter here. Streams hold their grains as stored blocks of deflate: the bytes that a release of libdeflate chooses
are not ours to pin.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from unittest.mock import patch

from qemu_vmdk_snap import ImageOptions, RawDisk, convert, create_image, create_overlay, open_chain
from qemu_vmdk_snap.ops.make.layout import KINDS

HERE: Final = Path(__file__).parent
DATA: Final = HERE / "data"
SUMS: Final = HERE / "SHA256SUMS"
"""In the form of sha256sum, which can check it: `cd tests/golden/data && sha256sum -c ../SHA256SUMS`."""

GRAIN: Final = 4096
SIZE: Final = 6 * GRAIN + 512
OVERLAYS: Final = tuple(name for name, kind in KINDS.items() if kind.may_have_parent)
_SPLIT_SECTORS: Final = 24


def base_content() -> bytes:
    """Return what every base holds: text in the first grains, zeros in two, half a grain, and the odd last sector."""
    text = b"".join(b"%07d golden\n" % line for line in range(2 * GRAIN // 15 + 1))
    data = text[: 2 * GRAIN] + bytes(2 * GRAIN) + b"half".ljust(GRAIN // 2, b".") + bytes(GRAIN // 2)
    return data.ljust(SIZE - 512, b"\0") + b"the last sector ".ljust(512, b"!")


def overlay_content() -> bytes:
    """Return what every overlay shows: the base with a piece inside a grain and one across two grains written over."""
    data = bytearray(base_content())
    for offset, piece in _PIECES:
        data[offset : offset + len(piece)] = piece
    return bytes(data)


_PIECES: Final = ((100, b"written over"), (3 * GRAIN - 8, b"across the border"), (SIZE - 3, b"end"))


def make(folder: Path) -> None:
    """Write every golden file into `folder`, which must be empty."""
    source = folder / "source.raw"
    source.write_bytes(base_content())
    for kind in KINDS:
        _from_raw(folder / f"{kind}.vmdk", source, ImageOptions(subformat=kind, grain_size=GRAIN))
    _from_raw(folder / "zeroed.vmdk", source, ImageOptions(grain_size=GRAIN, zeroed_grain=True, hwversion="10"))
    source.unlink()
    for kind in OVERLAYS:
        with _repeatable(f"overlay-{kind}"):
            _overlay(folder, kind)
    with _repeatable("empty"):
        create_image(folder / "empty.vmdk", SIZE, durable=False)


def _from_raw(path: Path, source: Path, options: ImageOptions) -> None:
    with _repeatable(path.name), RawDisk(source) as disk:
        convert(disk, path, options=options, sparse_size=GRAIN, durable=False)


def _overlay(folder: Path, kind: str) -> None:
    top = folder / f"overlay-{kind}.vmdk"
    create_overlay(top, folder / "monolithicSparse.vmdk", kind=kind, durable=False)
    with open_chain(top, writable=True) as chain:
        for offset, piece in _PIECES:
            chain.write_at(offset, piece)


@contextlib.contextmanager
def _repeatable(name: str) -> Iterator[None]:
    """Let what is random depend on `name` alone, and what libdeflate decides on nobody."""
    calls: Counter[int] = Counter()

    def urandom(size: int) -> bytes:
        calls[size] += 1  # by size: how many temporary names were drawn in between changes no CID
        return hashlib.sha256(f"{name} {size} {calls[size]}".encode()).digest()[:size]

    with (
        patch("os.urandom", urandom),
        patch("qemu_vmdk_snap.ops.make.layout.SPLIT_SECTORS", _SPLIT_SECTORS),
        patch("qemu_vmdk_snap.vmdk.stream.writer.deflated", _stored),
    ):
        yield


def _stored(data: bytes) -> bytearray:
    """Return `data`, at most 64 KiB, as a zlib stream of one stored block."""
    head = struct.pack("<BBBHH", 0x78, 0x01, 1, len(data), len(data) ^ 0xFFFF)
    return bytearray(head + data + struct.pack(">I", zlib.adler32(data)))


def sums(folder: Path) -> str:
    """Return the table of the files in `folder`."""
    files = sorted(folder.iterdir())
    return "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    for old in DATA.iterdir():
        old.unlink()
    make(DATA)
    SUMS.write_text(sums(DATA))
