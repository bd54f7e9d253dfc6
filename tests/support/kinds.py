"""One disk in every kind of image that docs/formats.md has a row for, made by our engine, by QEMU or by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from unittest.mock import patch

from qemu_vmdk_snap import ImageOptions, RawDisk, convert
from qemu_vmdk_snap.vmdk.descriptor import Descriptor
from tests.support.esxi import cowd, descriptor, sesparse
from tests.support.qemu import qemu_img, qemu_io

SECTOR: Final = 512
SIZE: Final = 1 << 20
SECTORS: Final = SIZE // SECTOR
GRAIN: Final = 65536
HOLE: Final = 5 * GRAIN
"""Where a hole of two grains begins."""


def content() -> bytes:
    """Return the disk: every sector tells its number, but for the hole."""
    data = bytearray(b"".join(b"%08d" % sector * 64 for sector in range(SECTORS)))
    data[HOLE : HOLE + 2 * GRAIN] = bytes(2 * GRAIN)
    return bytes(data)


@dataclass(frozen=True)
class Sample:
    """An image, what a reader of everything reads in it, and what others may make of it."""

    row: str
    """The first cell of its row in docs/formats.md."""
    path: Path
    expected: bytes = field(default_factory=content)
    variants: dict[str, bytes] = field(default_factory=dict)
    """What reads differently, by the word that the table has for it."""
    write_at: int = 0
    """A byte of the guest's disk in the stretch that the row is about."""


def samples(folder: Path) -> list[Sample]:
    """Return every sample, each in a folder of its own below `folder`."""
    raw = folder / "source.raw"
    raw.write_bytes(content())
    made: list[Sample] = []
    for number, maker in enumerate((_hosted, _streams, _esxi, _flats, _mixes)):
        for inner, make in enumerate(maker(raw)):
            place = folder / f"{number}-{inner}"
            place.mkdir()
            made.append(make(place))
    return made


_Make = Callable[[Path], Sample]


def _converted(raw: Path, row: str, kind: str, create_type: str | None = None, **options: bool) -> _Make:
    """Return what makes an image of `kind` by our engine, of another createType if one is given."""

    def make(folder: Path) -> Sample:
        path = folder / "a.vmdk"
        with RawDisk(raw) as disk, patch("qemu_vmdk_snap.ops.make.layout.SPLIT_SECTORS", 1024):
            convert(disk, path, options=ImageOptions(subformat=kind, **options), sparse_size=4096, durable=False)  # type: ignore[arg-type]
        if create_type is not None:
            head = path.read_bytes()
            old = b'createType="' + Descriptor.parse(head, path=path).create_type.encode() + b'"'
            assert head.count(old) == 1
            path.write_bytes(head.replace(old, f'createType="{create_type}"'.encode()))
        return Sample(row, path)

    return make


def _hosted(raw: Path) -> Iterator[_Make]:
    yield _converted(raw, "monolithicSparse, version 1", "monolithicSparse")
    zeroed = _converted(raw, "... version 2 (zeroed grains)", "monolithicSparse", zeroed_grain=True)

    def with_zeroed_grain(folder: Path) -> Sample:
        sample = zeroed(folder)
        qemu_io(sample.path, f"write -z {HOLE} {GRAIN}")
        return sample

    yield with_zeroed_grain

    def third_version(folder: Path) -> Sample:
        sample = _converted(raw, "... version 3, not compressed", "monolithicSparse")(folder)
        patch_file(sample.path, 4, struct.pack("<I", 3))
        return sample

    yield third_version
    for kind in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        yield _converted(raw, kind, kind)
        older = kind.replace("twoGb", "2Gb")
        yield _converted(raw, f"{older} (older spelling)", kind, older)


def _streams(raw: Path) -> Iterator[_Make]:
    yield _converted(raw, "streamOptimized, with a footer", "streamOptimized")

    def by_qemu(folder: Path) -> Sample:
        path = folder / "a.vmdk"
        qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
        assert struct.unpack_from("<Q", path.read_bytes(), 56) != (0xFFFF_FFFF_FFFF_FFFF,)
        return Sample("streamOptimized, without one", path)

    yield by_qemu


def _flats(raw: Path) -> Iterator[_Make]:
    yield _converted(raw, "monolithicFlat", "monolithicFlat")
    yield _converted(raw, "vmfs (flat on ESXi)", "vmfs")
    yield _converted(raw, "vmfs (flat on ESXi)", "vmfsThin")
    for kind in ("vmfsPreallocated", "vmfsEagerZeroedThick"):
        yield _converted(raw, "vmfsPreallocated, vmfsEagerZeroedThick", "vmfs", kind)
    yield _converted(raw, "vmfsThin as a createType", "vmfsThin", "vmfsThin")
    for kind in ("fullDevice", "partitionedDevice"):
        yield _converted(raw, "fullDevice, partitionedDevice in files", "monolithicFlat", kind)

    def enveloped(folder: Path) -> Sample:
        path = folder / "a.vmdk"
        sample = _converted(raw, "a header of capacity 0 before the descriptor", "monolithicFlat")(folder)
        head = struct.pack("<4sIIQQQQIQQQB4sH", b"KDMV", 1, 1, 0, 128, 1, 20, 512, 0, 0, 128, 0, b"\n \r\n", 0)
        path.write_bytes(head.ljust(SECTOR, b"\0") + path.read_bytes().ljust(20 * SECTOR, b"\0"))
        return sample

    yield enveloped


def _esxi(raw: Path) -> Iterator[_Make]:
    grains = _nonzero(SECTOR)

    def delta(folder: Path) -> Sample:
        cowd(folder / "a-delta.vmdk", SECTORS, grains, free_slack=0)
        return Sample(
            "vmfsSparse (COWD)",
            descriptor(folder / "a.vmdk", "vmfsSparse", [f'RW {SECTORS} VMFSSPARSE "a-delta.vmdk"']),
        )

    def legacy(folder: Path) -> Sample:
        cowd(folder / "a.vmdk", SECTORS, _nonzero(16 * SECTOR), grain_sectors=16, generation=7)
        return Sample("COWD without a descriptor (before 2004)", folder / "a.vmdk")

    yield delta
    yield _converted(raw, "vmfsSparse (COWD)", "vmfsSparse")
    yield legacy
    stored: dict[int, bytes | str] = {**_nonzero(4096), HOLE // 4096: "zero", HOLE // 4096 + 1: "unmapped"}
    for kind in ("seSparse", "vmfsSeSparse"):

        def se(folder: Path, kind: str = kind) -> Sample:
            sesparse(folder / "a-sesparse.vmdk", SECTORS, stored)
            return Sample(kind, descriptor(folder / "a.vmdk", kind, [f'RW {SECTORS} SESPARSE "a-sesparse.vmdk"']))

        yield se


def _nonzero(unit: int) -> dict[int, bytes]:
    data = content()
    grains = {at // unit: data[at : at + unit] for at in range(0, SIZE, unit)}
    return {number: grain for number, grain in grains.items() if any(grain)}


def _mixes(raw: Path) -> Iterator[_Make]:
    third = SECTORS // 4
    end = HOLE // SECTOR + 2 * GRAIN // SECTOR
    first, second, rest = (
        content()[: third * SECTOR],
        content()[third * SECTOR : end * SECTOR],
        content()[end * SECTOR :],
    )
    middle, last = end - third, SECTORS - end

    def parts(folder: Path) -> None:
        for name, data in (("one", first), ("two", second), ("three", rest)):
            (folder / name).write_bytes(data)

    def custom(folder: Path) -> Sample:
        parts(folder)
        qemu_img("convert", "-f", "raw", "-O", "vmdk", folder / "two", folder / "two.vmdk")
        lines = [f'RW {third} FLAT "one" 0', f'RW {middle} SPARSE "two.vmdk"', f'RW {last} VMFS "three"']
        return Sample("custom, and any mix of extents", descriptor(folder / "a.vmdk", "custom", lines))

    def special(row: str, line: str, inside: bytes, shown: bytes | None = None) -> _Make:
        def make(folder: Path) -> Sample:
            parts(folder)
            lines = [f'RW {third} FLAT "one" 0', line, f'RW {last} FLAT "three" 0']
            path = descriptor(folder / "a.vmdk", "twoGbMaxExtentFlat", lines)
            variants = {"left out": first + rest}
            if shown is not None:
                variants["zeros"] = first + shown + rest
            return Sample(row, path, first + inside + rest, variants, write_at=len(first) + SECTOR)

        return make

    zeros = bytes(middle * SECTOR)
    yield custom
    yield special("extents ZERO", f"RW {middle} ZERO", zeros)
    yield special("extents RDONLY", f'RDONLY {middle} FLAT "two" 0', second)
    yield special("extents NOACCESS", f'NOACCESS {middle} FLAT "two" 0', second, zeros)


def patch_file(path: Path, offset: int, data: bytes) -> None:
    """Write `data` over the bytes of `path` at `offset`."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
