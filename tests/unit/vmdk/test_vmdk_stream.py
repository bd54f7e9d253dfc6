"""Are compressed streams read whatever their markers and headers look like, and is what we write what ESXi asks for?"""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest

from qemu_vmdk_snap import FormatError, InvalidRequest, Unsupported, create_image, open_chain
from qemu_vmdk_snap.vmdk.stream.writer import StreamWriter

GRAIN = 65536
SIZE = 700 * GRAIN + 512
AT_END = 0xFFFF_FFFF_FFFF_FFFF
TEXT = (
    b'# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\ncreateType="streamOptimized"\n\n'
    b'# Extent description\nRW %d SPARSE "a.vmdk"\n' % (SIZE // 512)
)


def sectors(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def header(
    *, gd: int = AT_END, flags: int = 0x30001, version: int = 3, grain: int = 128, capacity: int = SIZE
) -> bytes:
    raw = struct.pack(
        "<4sIIQQQQIQQQB4sH", b"KDMV", version, flags, capacity // 512, grain, 1, 20, 512, 0, gd, 128, 0, b"\n \r\n", 1
    )
    return raw.ljust(512, b"\0")


def record(grain: int, data: bytes) -> bytes:
    return sectors(struct.pack("<QI", grain * 128, len(data)) + data)


def marker(kind: int, value: int = 0) -> bytes:
    return sectors(struct.pack("<QII", value, 0, kind))


def build(
    grains: dict[int, bytes],
    *,
    first: bytes | None = None,
    footer: bytes | None = None,
    between: bytes = b"",
    tail: bytes = b"",
) -> bytes:
    """Return a stream made by hand; `first` and `footer` take the place of header and footer but for gdOffset."""
    raw = (first or header()) + TEXT
    raw = raw.ljust(128 * 512, b"\0")
    tables: dict[int, list[int]] = {}
    for grain, data in grains.items():
        tables.setdefault(grain // 512, [0] * 512)[grain % 512] = len(raw) // 512
        raw += record(grain, data) + between
    directory = [0] * -(-SIZE // GRAIN // 512)
    for number, entries in tables.items():
        raw += marker(1, 4)
        directory[number] = len(raw) // 512
        raw += struct.pack("<512I", *entries)
    raw += marker(2, 1)
    gd = len(raw) // 512
    raw += sectors(struct.pack(f"<{len(directory)}I", *directory))
    if footer is None:
        footer = header()
    if footer:
        raw += marker(3, 1) + footer[:56] + struct.pack("<Q", gd) + footer[64:]
    elif first is not None:
        raw = raw[:56] + struct.pack("<Q", gd) + raw[64:]
    return raw + marker(0) + tail


@pytest.fixture
def data() -> dict[int, bytes]:
    chooser = random.Random(3)
    return {grain: chooser.randbytes(5000).ljust(GRAIN, b"t") for grain in (0, 1, 7, 511, 512, 699)}


def packed(data: dict[int, bytes]) -> dict[int, bytes]:
    return {grain: zlib.compress(value) for grain, value in data.items()}


def assert_reads(path: Path, data: dict[int, bytes]) -> list[str]:
    with open_chain(path) as chain:
        assert chain.capacity == SIZE
        whole = chain.read_at(0, SIZE)
        for grain in range(-(-SIZE // GRAIN)):
            wanted = data.get(grain, bytes(GRAIN))
            assert whole[grain * GRAIN : (grain + 1) * GRAIN] == wanted[: SIZE - grain * GRAIN], f"grain {grain}"
        stored = {run.offset // GRAIN for run in chain.map() if run.compressed}
        assert stored == set(data)
        return chain.links[0].notes


@pytest.mark.parametrize("between", [b"", marker(4), marker(0x1234, 0), marker(5) * 3])
def test_a_stream_with_a_footer_and_markers_of_unknown_kind(
    tmp_path: Path, data: dict[int, bytes], between: bytes
) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(build(packed(data), between=between))
    assert assert_reads(path, data) == []


@pytest.mark.parametrize("tail", [bytes(512), bytes(1 << 15), bytes(1 << 20), b"x" * 100, b"x" * (1 << 18)])
def test_what_a_transfer_has_added_behind_the_end(tmp_path: Path, data: dict[int, bytes], tail: bytes) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(build(packed(data), tail=tail))
    at = path.stat().st_size - len(tail)
    said = [f"{path}: byte {at:#x}: {len(tail)} bytes that follow the end of the stream are ignored"]
    assert assert_reads(path, data) == (said if any(tail) else [])


def test_a_stream_without_a_footer(tmp_path: Path, data: dict[int, bytes]) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(build(packed(data), first=header(gd=1), footer=b""))
    assert assert_reads(path, data) == []


def test_the_footer_wins(tmp_path: Path, data: dict[int, bytes]) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(build(packed(data), first=header(grain=64, version=1)))
    assert assert_reads(path, data) == [
        f"{path}: byte 0x4: version = 1: the footer's 3 is used",
        f"{path}: byte 0x14: grain_size = 64: the footer's 128 is used",
    ]


def test_a_grain_that_is_longer_when_deflated(tmp_path: Path) -> None:
    noise = {3: random.Random(9).randbytes(GRAIN)}
    raw = {grain: zlib.compress(value, 0) for grain, value in noise.items()}
    assert len(raw[3]) > GRAIN
    path = tmp_path / "a.vmdk"
    path.write_bytes(build(raw))
    assert_reads(path, noise)


def test_a_last_grain_that_ends_with_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(build({700: zlib.compress(b"z" * 512)}))
    assert_reads(path, {700: b"z" * 512})


def test_a_stream_cut_short_is_refused(tmp_path: Path, data: dict[int, bytes]) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(build(packed(data))[:-1600])
    with pytest.raises(FormatError, match=r"byte 0x38: gd_offset = .*needs a footer"):
        open_chain(path)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (zlib.compress(b"x" * (GRAIN + 1)), "compressed grain"),
        (zlib.compress(b"x" * 100)[:-3], "compressed grain"),
        (b"not zlib", "compressed grain"),
        (b"", "length of the compressed grain"),
    ],
)
def test_a_damaged_grain_is_named(tmp_path: Path, raw: bytes, field: str) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(build({0: zlib.compress(b"good"), 1: raw}))
    with open_chain(path) as chain:
        assert chain.read_at(0, 4) == b"good"
        with pytest.raises(FormatError) as error:
            chain.read_at(GRAIN, 1)
    assert error.value.field == field
    assert 128 * 512 < error.value.offset < 132 * 512


def test_a_stream_is_never_written(tmp_path: Path, data: dict[int, bytes]) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(build(packed(data)))
    with pytest.raises(Unsupported, match="streamOptimized images are written once"):
        open_chain(path, writable=True)


def written(tmp_path: Path, pieces: list[tuple[int, bytes]]) -> tuple[Path, list[bytes]]:
    parts: list[bytes] = []
    writer = StreamWriter(parts.append, SIZE // 512, TEXT, tmp_path / "a.vmdk", threads=3)
    for offset, piece in pieces:
        writer.write_run(offset, piece)
    writer.finish()
    (tmp_path / "a.vmdk").write_bytes(b"".join(parts))
    return tmp_path / "a.vmdk", parts


def test_what_we_write_has_the_parts_that_esxi_asks_for(tmp_path: Path, data: dict[int, bytes]) -> None:
    path, _ = written(tmp_path, [(grain * GRAIN, value) for grain, value in data.items()])
    assert_reads(path, data)
    raw = path.read_bytes()
    assert raw[:64] == header()[:64]
    assert raw[77:79] == b"\1\0"
    assert raw[512 : 512 + len(TEXT)] == TEXT
    assert raw[-512:] == bytes(512), "the end-of-stream marker"
    footer, footer_marker = raw[-1024:-512], raw[-1536:-1024]
    assert footer_marker == marker(3, 1)
    assert footer[:56] + footer[64:] == raw[:56] + raw[64:512], "the footer is the header with the directory's place"
    gd = struct.unpack_from("<Q", footer, 56)[0]
    assert raw[(gd - 1) * 512 : gd * 512] == marker(2, 1)
    at, seen, tables = 128 * 512, [], []
    while True:  # from record to record, as a reader of a pipe goes
        value, size, kind = struct.unpack_from("<QII", raw, at)
        if size:
            seen.append(value // 128)
            assert zlib.decompress(raw[at + 12 : at + 12 + size]) == data[value // 128]
            at += -(-(12 + size) // 512) * 512
        elif kind:
            tables.append(kind)
            at += 512 + value * 512
        else:
            break
    assert seen == sorted(data)
    assert tables == [1, 1, 2, 3]
    assert at + 512 == len(raw)


def test_pieces_of_any_cut_make_the_same_stream(tmp_path: Path, data: dict[int, bytes]) -> None:
    whole = [(grain * GRAIN, value) for grain, value in data.items()]
    path, _ = written(tmp_path, whole)
    one = path.read_bytes()
    pieces = [(at + cut, value[cut : cut + 777]) for at, value in whole for cut in range(0, len(value), 777)]
    path, _ = written(tmp_path, pieces)
    assert path.read_bytes() == one


def test_zeros_are_left_out_and_order_is_kept(tmp_path: Path) -> None:
    path, _ = written(tmp_path, [(0, bytes(GRAIN * 3)), (GRAIN * 3 + 5, b"x")])
    assert_reads(path, {3: b"\0" * 5 + b"x" + bytes(GRAIN - 6)})
    writer = StreamWriter(lambda _: None, SIZE // 512, TEXT, path)
    writer.write_run(GRAIN, b"x")
    with pytest.raises(InvalidRequest, match="do not follow in the stream"):
        writer.write_run(GRAIN, b"y")
    with pytest.raises(InvalidRequest, match="do not follow in the stream"):
        writer.write_run(SIZE, b"y")
    writer.close()


def test_size_is_near_that_of_zlib(tmp_path: Path) -> None:
    """On the bytes of programs: at most 5 % more than zlib's level 6 makes of them."""
    program = Path("/proc/self/exe").read_bytes()[: 6 << 20]
    grains = [program[i : i + GRAIN] for i in range(0, len(program) - GRAIN, GRAIN)]
    _, parts = written(tmp_path, [(i * GRAIN, grain) for i, grain in enumerate(grains)])
    zlib_size = sum(len(sectors(zlib.compress(grain, 6) + bytes(12))) for grain in grains)
    assert sum(map(len, parts)) < 1.05 * zlib_size


def test_an_empty_stream(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vmdk", SIZE, kind="streamOptimized", durable=False)
    assert assert_reads(tmp_path / "a.vmdk", {}) == []
