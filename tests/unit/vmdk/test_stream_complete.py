"""Is a compressed stream read whole or refused, from a pipe and by path, wherever it was cut, padded or added to?"""

from __future__ import annotations

import os
import random
import struct
import zlib
from pathlib import Path

import pytest

from qemu_vmdk_snap import FormatError, Unsupported, VmdkSnapError, convert, open_chain
from qemu_vmdk_snap.chain.look.notes import listening
from qemu_vmdk_snap.ops.copy.pipes import StreamDisk
from qemu_vmdk_snap.storage.pipes import PipeReader

GRAIN = 65536
GRAINS = 600
SIZE = GRAINS * GRAIN
AT_END = 0xFFFF_FFFF_FFFF_FFFF
FRONT = 128 * 512
STDIN = Path("standard input")


def text(extra: str = "", extents: int = 1) -> bytes:
    line = f'RW {SIZE // 512} SPARSE "a.vmdk"\n' * extents
    head = '# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\ncreateType="streamOptimized"\n'
    return (head + extra + "\n# Extent description\n" + line).encode()


def sectors(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def header(gd: int = AT_END, *, grain: int = 128, capacity: int = SIZE // 512, overhead: int = 128) -> bytes:
    raw = struct.pack(
        "<4sIIQQQQIQQQB4sH", b"KDMV", 3, 0x30001, capacity, grain, 1, 20, 512, 0, gd, overhead, 0, b"\n \r\n", 1
    )
    return raw.ljust(512, b"\0")


def marker(kind: int, value: int = 0) -> bytes:
    return sectors(struct.pack("<QII", value, 0, kind))


def record(grain: int, data: bytes) -> bytes:
    packed = zlib.compress(data)
    return struct.pack("<QI", grain * 128, len(packed)) + packed


def behind(
    grains: dict[int, bytes], *, between: bytes = b"", footer: bytes | None = None, eos: bool = True, named: bool = True
) -> bytes:
    """Return a stream with its tables after the grains; with `footer` empty its header names the directory."""
    raw = bytearray((header() + text()).ljust(FRONT, b"\0"))
    tables: dict[int, list[int]] = {}
    for grain, data in grains.items():
        tables.setdefault(grain // 512, [0] * 512)[grain % 512] = len(raw) // 512
        raw += sectors(record(grain, data)) + between
    if not named:
        tables = {number: [0] * 512 for number in tables}
    directory = [0] * -(-GRAINS // 512)
    for number, entries in tables.items():
        raw += marker(1, 4)
        directory[number] = len(raw) // 512
        raw += struct.pack("<512I", *entries)
    raw += marker(2, 1)
    gd = len(raw) // 512
    raw += sectors(struct.pack(f"<{len(directory)}I", *directory))
    if footer is None:
        raw += marker(3, 1) + header(gd)
    elif footer:
        raw += footer
    else:
        raw[56:64] = struct.pack("<Q", gd)
    return bytes(raw + (marker(0) if eos else b""))


def in_front(grains: dict[int, bytes], *, stride: int = 512, pad_last: bool = False) -> bytes:
    """Return a stream as QEMU makes them: tables in front, records at multiples of `stride`, and nothing else."""
    raw = bytearray((header(21) + text()).ljust(FRONT, b"\0"))
    raw[21 * 512 : 21 * 512 + 8] = struct.pack("<2I", 22, 26)
    for grain, data in grains.items():
        raw += bytes(-len(raw) % stride)
        raw[22 * 512 + 4 * grain : 22 * 512 + 4 * grain + 4] = struct.pack("<I", len(raw) // 512)
        raw += record(grain, data)
    return sectors(bytes(raw)) if pad_last else bytes(raw)


@pytest.fixture
def data() -> dict[int, bytes]:
    chooser = random.Random(5)
    return {grain: chooser.randbytes(700).ljust(GRAIN, b"t") for grain in (0, 1, 7, 511, 512, 599)}


def whole(data: dict[int, bytes]) -> bytes:
    content = bytearray(SIZE)
    for grain, value in data.items():
        content[grain * GRAIN : (grain + 1) * GRAIN] = value
    return bytes(content)


def from_pipe(folder: Path, raw: bytes) -> tuple[bytes, list[str]]:
    """Return what a conversion from a pipe makes of the stream, and what it says."""
    (folder / "in").write_bytes(raw)
    out, said = folder / "out.raw", list[str]()
    fd = os.open(folder / "in", os.O_RDONLY)
    try:
        with listening(said.append), StreamDisk(PipeReader(fd, STDIN)) as disk:
            convert(disk, out, output_format="raw", durable=False)
    finally:
        os.close(fd)
        left = out.exists()
    assert left
    content = out.read_bytes()
    out.unlink()
    return content, said


def by_path(folder: Path, raw: bytes) -> tuple[bytes, list[str]]:
    (folder / "a.vmdk").write_bytes(raw)
    said: list[str] = []
    with listening(said.append), open_chain(folder / "a.vmdk") as chain:
        content = chain.read_at(0, SIZE)
    return content, said


WAYS = pytest.mark.parametrize("way", [from_pipe, by_path])


@WAYS
@pytest.mark.parametrize("stride", [512, 4096, GRAIN])
def test_tables_in_front(tmp_path: Path, data: dict[int, bytes], way: object, stride: int) -> None:
    assert callable(way)
    for pad_last in (False, True):
        assert way(tmp_path, in_front(data, stride=stride, pad_last=pad_last)) == (whole(data), [])


@WAYS
@pytest.mark.parametrize("between", [b"", bytes(512), bytes(512 * 9), marker(4), marker(77, 1) + bytes(512)])
def test_tables_behind(tmp_path: Path, data: dict[int, bytes], way: object, between: bytes) -> None:
    assert callable(way)
    assert way(tmp_path, behind(data, between=between)) == (whole(data), [])
    content, said = way(tmp_path, behind(data, between=between, footer=b""))
    assert (content, said) == (whole(data), [])


@pytest.mark.parametrize("make", [in_front, lambda data: in_front(data, stride=4096), behind])
def test_no_cut_goes_unseen(tmp_path: Path, data: dict[int, bytes], make: object) -> None:
    """Wherever it ends, it is refused, and no image appears; but for what the writer has added at the very end."""
    assert callable(make)
    raw = make(data)
    cuts = {*range(0, len(raw), 512), *range(FRONT + 100, len(raw), 512), len(raw) - 1} - {0}
    for cut in sorted(cuts):
        for way in (from_pipe, by_path):
            try:
                content, said = way(tmp_path, raw[:cut])
            except (FormatError, Unsupported):
                assert not (tmp_path / "out.raw").exists()
                continue
            assert content == whole(data), f"cut at {cut}, {way.__name__}"
            assert cut >= len(raw) - 512
            assert way is by_path
            assert "no end-of-stream marker" in said[0]


@pytest.mark.parametrize("size", [512, 1 << 20])
def test_zeros_in_place_of_the_footer(tmp_path: Path, data: dict[int, bytes], size: int) -> None:
    raw = behind(data)
    for lost in (1024, 1536, 2048, 2560):
        damaged = raw[:-lost] + bytes(lost + size)
        with pytest.raises(FormatError, match=r"must be there: the stream ends early|must be b.KDMV.$"):
            from_pipe(tmp_path, damaged)
        assert not (tmp_path / "out.raw").exists()
        with pytest.raises(FormatError, match=r"needs a footer at the end|must be b.KDMV.$"):
            by_path(tmp_path, damaged)


@WAYS
@pytest.mark.parametrize("size", [1, 512, 65536, 1 << 20])
def test_zeros_after_the_end(tmp_path: Path, data: dict[int, bytes], way: object, size: int) -> None:
    """As a store pads to its blocks, or a volume is larger than what was written to it."""
    assert callable(way)
    for raw in (behind(data), in_front(data), behind(data, footer=b"")):
        assert way(tmp_path, raw + bytes(size)) == (whole(data), [])


@WAYS
@pytest.mark.parametrize("size", [1, 512, 1 << 18])
def test_anything_else_after_the_end_is_said(tmp_path: Path, data: dict[int, bytes], way: object, size: int) -> None:
    assert callable(way)
    raw = behind(data)
    content, said = way(tmp_path, raw + b"x" * size)
    assert content == whole(data)
    assert [line.split(": ", 1)[1] for line in said] == [
        f"byte {len(raw):#x}: {size} bytes that follow the end of the stream are ignored"
    ]


@WAYS
@pytest.mark.parametrize("second", [1, 3, 40])
def test_a_second_stream_is_not_taken_for_the_first(
    tmp_path: Path, data: dict[int, bytes], way: object, second: int
) -> None:
    """Its footer is the last one of the file, and tells of tables that are elsewhere."""
    assert callable(way)
    other = {grain: bytes([grain + 1]) * GRAIN for grain in range(second)}
    raw = behind(data)
    content, said = way(tmp_path, raw + behind(other))
    assert content == whole(data)
    assert "bytes that follow the end of the stream are ignored" in said[0]


def test_a_record_that_was_lost_on_the_way(tmp_path: Path, data: dict[int, bytes]) -> None:
    """The footer is whole; only the tables tell that a grain is missing, or is one too many."""
    raw = behind(data)
    at = FRONT + len(sectors(record(0, data[0])))
    length = len(sectors(record(1, data[1])))
    zeroed = raw[:at] + bytes(length) + raw[at + length :]
    with pytest.raises(FormatError, match=r"grain table entry = \d+: must be 0: no record came \(grain 1\)"):
        from_pipe(tmp_path, zeroed)
    with pytest.raises(FormatError, match="must be the place of the grain directory that came before"):
        from_pipe(tmp_path, raw[:at] + raw[at + length :])
    with pytest.raises(FormatError, match=r"must be sector 128, where its record came \(grain 0\)"):
        from_pipe(tmp_path, behind(data, named=False))


def test_a_directory_of_tables_that_did_not_come(tmp_path: Path, data: dict[int, bytes]) -> None:
    raw = bytearray(behind(data, footer=b""))
    gd = int.from_bytes(raw[56:64], "little") * 512
    raw[gd + 4 : gd + 8] = b"\7\0\0\0"
    with pytest.raises(FormatError, match="grain directory entry 1 = 7: must name a grain table that came"):
        from_pipe(tmp_path, bytes(raw))


def test_a_footer_that_does_not_fit(tmp_path: Path, data: dict[int, bytes]) -> None:
    good = behind(data)
    gd = int.from_bytes(good[-1024 + 56 : -1024 + 64], "little")
    for footer, words in (
        (header(gd - 1), "gd_offset = .*: must be the place of the grain directory"),
        (header(AT_END), "gd_offset = .*: must give the place"),
        (header(gd, grain=64), "grain_size = 64: must be the 128 of the header"),
        (header(gd, capacity=512), f"capacity = 512: must be at least the {SIZE // 512} sectors"),
    ):
        with pytest.raises(FormatError, match=words):
            from_pipe(tmp_path, behind(data, footer=marker(3, 1) + footer))


def test_a_stream_without_end_marker_but_with_all_tables(tmp_path: Path, data: dict[int, bytes]) -> None:
    raw = behind(data, footer=b"", eos=False)
    said = [f"{STDIN}: byte {len(raw):#x}: no end-of-stream marker follows the tables"]
    assert from_pipe(tmp_path, raw) == (whole(data), said)
    assert by_path(tmp_path, raw) == (whole(data), [])


def test_tables_in_front_that_lie(tmp_path: Path, data: dict[int, bytes]) -> None:
    def changed(at: int, *values: int) -> bytes:
        raw = in_front(data)
        return raw[:at] + struct.pack(f"<{len(values)}I", *values) + raw[at + 4 * len(values) :]

    for raw, words in (
        (changed(22 * 512, 130), "grain = 0: must ascend|sector of the grain = .*: must be 0"),
        (changed(22 * 512 + 4, 128), "must ascend|record of grain 1 = 128: must follow"),
        (changed(21 * 512, 2), "grain directory entry 0 = 2: must be from byte 0x"),
        (changed(21 * 512, 22, 22), "grain directory entry 1 = 22: must be from byte 0x"),
        (changed(22 * 512 + 8, 0xFFFF_FFFF), "must ascend|the stream ends early"),
    ):
        with pytest.raises(FormatError, match=words):
            from_pipe(tmp_path, raw)
        assert not (tmp_path / "out.raw").exists()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\x1f\x8b" + bytes(600), "standard input: byte 0x0: magic = .*; it is a gzip file: unpack it"),
        (b"QFI\xfb" + bytes(600), "it is a qcow2 image"),
        (b"", "it is an empty file"),
        (b"x" * 600, "must be b'KDMV': a VMDK from a pipe is a streamOptimized one$"),
    ],
)
def test_what_is_no_stream(tmp_path: Path, raw: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        from_pipe(tmp_path, raw)


def test_descriptors_that_a_pipe_cannot_follow(tmp_path: Path, data: dict[int, bytes]) -> None:
    for other, words in (
        (text(extents=2), "must have one extent|must be at least"),
        (text('encryptionKeys="vmware:key"\n'), "encryptionKeys: the disk is encrypted"),
    ):
        raw = behind(data)
        with pytest.raises(VmdkSnapError, match=words):
            from_pipe(tmp_path, raw[:512] + other.ljust(20 * 512, b"\0") + raw[21 * 512 :])


def test_a_record_that_goes_past_the_end_is_noted_by_map(tmp_path: Path, data: dict[int, bytes]) -> None:
    """Nothing is inflated for a map, so nothing else would tell."""
    path = tmp_path / "a.vmdk"
    path.write_bytes(in_front(data)[:-3])
    with open_chain(path) as chain:
        assert len([run for run in chain.map() if run.compressed]) == len(data)
        (note,) = chain.links[0].notes
        with pytest.raises(FormatError, match="compressed grain"):
            chain.read_at(599 * GRAIN, 1)
    assert "3 bytes of it are past the end of the file" in note
