"""Which of the two copies of the tables is right, for every way in which they can differ; and what settling writes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, compact, create_image, open_chain, resize
from qemu_vmdk_snap.chain.link import open_link
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.storage.blockfile import PosixFile, open_posix
from qemu_vmdk_snap.vmdk.extent import ExtentSpec, open_extent
from qemu_vmdk_snap.vmdk.sparse.copies import CopiesReport, compare_copies, settle_copies
from qemu_vmdk_snap.vmdk.sparse.extent import SparseExtent
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader

GRAIN = 4096
STEP = GRAIN // 512
SIZE = 5 * (1 << 20) + 1536  # three tables of 2 MiB, the last one covered in part
STORED = (0, 1, 2, 513, 1030, SIZE // GRAIN)


class Image:
    """An image whose tables are known, and can be changed."""

    def __init__(self, path: Path, *, zeroed: bool = True) -> None:
        self.path = path
        create_image(path, SIZE, options=ImageOptions(grain_size=GRAIN, zeroed_grain=zeroed), durable=False)
        with open_chain(path, writable=True) as chain:
            for grain in STORED:
                chain.write_at(grain * GRAIN, bytes([grain % 250 + 1]) * min(GRAIN, SIZE - grain * GRAIN))
        self.whole = path.read_bytes()
        self.header = SparseExtentHeader.parse(self.whole[:512], path=path)

    def directory(self, copy: int) -> int:
        return (self.header.gd_offset, self.header.rgd_offset)[copy] * 512

    def at(self, copy: int, grain: int) -> int:
        table, index = divmod(grain, 512)
        sector: int = struct.unpack_from("<I", self.whole, self.directory(copy) + 4 * table)[0]
        return sector * 512 + 4 * index

    def sector(self, grain: int) -> int:
        return int(struct.unpack_from("<I", self.whole, self.at(0, grain))[0])

    def put(self, offset: int, data: bytes | int) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack("<I", data) if isinstance(data, int) else data)

    def compare(self) -> CopiesReport:
        file = PosixFile.open(self.path)
        try:
            return compare_copies(file, self.header)
        finally:
            file.close()

    def settle(self) -> int:
        file = PosixFile.open(self.path, writable=True)
        try:
            return settle_copies(file, self.header)
        finally:
            file.close()


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path / "disk.vmdk")


def all_tables(copy: int) -> Callable[[Image], int]:
    def lose(image: Image) -> int:
        for table in range(3):
            image.put(image.at(copy, 512 * table), bytes(2048))
        return len(STORED)

    return lose


def entries(copy: int, *grains: int) -> Callable[[Image], int]:
    def lose(image: Image) -> int:
        for grain in grains:
            image.put(image.at(copy, grain), 0)
        return len(grains)

    return lose


def some_of_each(image: Image) -> int:
    return entries(0, 0, 513)(image) + entries(1, 1, 1030)(image)


def marks_over_places(image: Image) -> int:
    image.put(image.at(0, 1), 1)
    image.put(image.at(1, 2), 1)
    return 2


LOSSES = [all_tables(0), all_tables(1), entries(0, 2), entries(1, *STORED), some_of_each, marks_over_places]


@pytest.mark.parametrize("lose", LOSSES, ids=range(len(LOSSES)))
def test_what_one_copy_lacks_is_taken_from_the_other(image: Image, lose: Callable[[Image], int]) -> None:
    count = lose(image)
    report = image.compare()
    assert (report.missing_count, report.conflict_count, report.conflicts) == (count, 0, ())
    for missing in report.missing:
        copy = int(missing.primary > missing.redundant)
        assert missing.offset == image.at(copy, missing.grain)
        assert max(missing.primary, missing.redundant) == image.sector(missing.grain)
    assert image.settle() == count
    assert image.path.read_bytes() == image.whole
    assert image.settle() == 0
    assert image.compare() == CopiesReport()


@pytest.mark.parametrize("copy", [0, 1])
def test_a_mark_of_zeros_in_one_copy_is_one_in_both(image: Image, copy: int) -> None:
    image.put(image.at(copy, 7), 1)
    assert image.settle() == 1
    raw = image.path.read_bytes()
    assert [struct.unpack_from("<I", raw, image.at(one, 7)) for one in (0, 1)] == [(1,), (1,)]


def both_name_a_place(image: Image) -> int:
    image.put(image.at(1, 1), image.sector(1) + 64 * STEP)
    return image.at(1, 1)


def past_the_end(image: Image) -> int:
    image.put(image.at(1, 9), len(image.whole) // 512)
    return image.at(1, 9)


def cut_by_the_end(image: Image) -> int:
    image.put(image.at(1, 9), len(image.whole) // 512 - STEP + 1)
    return image.at(1, 9)


def over_the_metadata(image: Image) -> int:
    image.put(image.at(1, 9), 21)
    return image.at(1, 9)


def shared(image: Image) -> int:
    image.put(image.at(1, 9), image.sector(513))
    return image.at(1, 9)


def half_shared(image: Image) -> int:
    image.put(image.at(1, 9), image.sector(513) + STEP // 2)
    return image.at(1, 9)


def two_missing_with_one_place(image: Image) -> int:
    image.put(image.at(0, 1), 0)
    image.put(image.at(1, 9), image.sector(1))
    return image.at(1, 1)


def no_primary_table(image: Image) -> int:
    image.put(image.directory(0) + 4, 0)
    return image.directory(0) + 4


def no_redundant_table(image: Image) -> int:
    image.put(image.directory(1) + 4, 0)
    return image.directory(1) + 4


def primary_table_outside(image: Image) -> int:
    image.put(image.directory(0), 1 << 30)
    return image.directory(0)


def redundant_table_outside(image: Image) -> int:
    image.put(image.directory(1) + 8, 0xFFFF_FFFF)
    return image.directory(1) + 8


def one_table_for_two(image: Image) -> int:
    """What is missing would have to be written into a table that another entry of the directory names too."""
    image.put(image.directory(1) + 4, image.whole[image.directory(1) : image.directory(1) + 4])
    return image.at(1, 2)


CONFLICTS = [
    both_name_a_place,
    past_the_end,
    cut_by_the_end,
    over_the_metadata,
    shared,
    half_shared,
    two_missing_with_one_place,
    no_primary_table,
    no_redundant_table,
    primary_table_outside,
    redundant_table_outside,
    one_table_for_two,
]


@pytest.mark.parametrize("damage", CONFLICTS, ids=[damage.__name__ for damage in CONFLICTS])
def test_a_conflict_is_left_to_a_repair(image: Image, damage: Callable[[Image], int]) -> None:
    entries(0, 2)(image)  # something that could be settled, and is not while there is a conflict
    at = damage(image)
    before = image.path.read_bytes()
    report = image.compare()
    assert report.conflict_count >= 1
    assert report.conflicts[0].offset == at
    with pytest.raises(FormatError, match="repair the image first: image check -r all") as caught:
        image.settle()
    assert (caught.value.path, caught.value.offset) == (image.path, at)
    assert caught.value.value == struct.unpack_from("<I", before, at)[0]
    assert image.path.read_bytes() == before


def test_a_table_that_nothing_is_in_may_be_missing_in_one_copy(image: Image) -> None:
    image.put(image.at(1, 512), bytes(2048))
    image.put(image.at(0, 512), bytes(2048))
    image.put(image.directory(0) + 4, 0)
    assert image.compare() == CopiesReport()


def test_without_the_mark_of_zeros_a_1_is_a_place(tmp_path: Path) -> None:
    image = Image(tmp_path / "disk.vmdk", zeroed=False)
    image.put(image.at(0, 2), 1)
    assert image.compare().conflict_count == 1


def test_one_copy_has_nothing_to_settle(image: Image) -> None:
    image.put(48, bytes(8))
    image.header = SparseExtentHeader.parse(image.path.read_bytes()[:512], path=image.path)
    assert image.compare() == CopiesReport()
    assert image.settle() == 0


@pytest.mark.parametrize("field", [48, 56])
def test_a_directory_outside_the_file_is_a_conflict(image: Image, field: int) -> None:
    image.put(field, struct.pack("<Q", 1 << 40))
    image.header = SparseExtentHeader.parse(image.path.read_bytes()[:512], path=image.path)
    [conflict] = image.compare().conflicts
    assert (conflict.offset, conflict.value) == (field, 1 << 40)


def test_an_open_extent_settles_and_reads_what_it_settled(image: Image) -> None:
    all_tables(0)(image)
    link = open_link(image.path, opener=open_posix, writable=True, resolver=confined())
    try:
        [placed] = link.extents
        extent = placed.extent
        assert isinstance(extent, SparseExtent)
        assert extent.resolve(0, GRAIN).kinds.tolist() == [0]
        assert extent.lookup(GRAIN).kind == 0
        assert extent.settle_copies() == len(STORED)
        assert extent.resolve(0, GRAIN).file_offsets.tolist() == [image.sector(0) * 512]
        assert extent.lookup(GRAIN).file_offset == image.sector(1) * 512
    finally:
        link.close()
    assert image.path.read_bytes() == image.whole


def test_an_extent_that_is_only_read_settles_nothing(image: Image) -> None:
    all_tables(0)(image)
    before = image.path.read_bytes()
    link = open_link(image.path, opener=open_posix, writable=False, resolver=confined())
    try:
        extent = link.extents[0].extent
        assert isinstance(extent, SparseExtent)
        with pytest.raises(Unsupported, match="its tables cannot change"):
            extent.settle_copies()
    finally:
        link.close()
    assert image.path.read_bytes() == before


@pytest.mark.parametrize("kind", ["monolithicSparse", "vmfsSparse"])
def test_an_emptied_extent_takes_no_more_room_than_a_new_one(tmp_path: Path, kind: str) -> None:
    size = 64 << 30
    create_image(tmp_path / "disk.vmdk", size, options=ImageOptions(subformat=kind), durable=False)
    extent_path = tmp_path / ("disk-delta.vmdk" if kind == "vmfsSparse" else "disk.vmdk")
    new = extent_path.stat().st_blocks
    with open_chain(tmp_path / "disk.vmdk", writable=True) as chain:
        for offset in range(0, size, 1 << 30):
            chain.write_at(offset, b"x" * 512)
    assert extent_path.stat().st_blocks > new + 1000
    link = open_link(tmp_path / "disk.vmdk", opener=open_posix, writable=True, resolver=confined())
    try:
        extent = link.extents[0].extent
        extent.clear()  # type: ignore[attr-defined]
        assert extent.resolve(0, 1 << 31).kinds.tolist() == [0]
    finally:
        link.close()
    # Where the file system punches no holes, tables that were in use are stored zeros; all others stay holes.
    room = 0 if hasattr(PosixFile, "discard_range") else 64 * 2 * 40
    assert extent_path.stat().st_blocks <= new + room + 64


def test_an_edited_descriptor_that_moved_the_tables_is_named(image: Image) -> None:
    raw = image.whole.replace(b'adapterType = "ide"', b'adapterType = "lsilogic"')
    image.path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"length of the embedded descriptor = '\+5': must fill 20 sectors") as caught:
        open_chain(image.path)
    assert caught.value.offset == 512
    image.path.write_bytes(image.whole + b"rubbish")  # what is appended moves nothing
    open_chain(image.path).close()


def test_a_file_that_ends_inside_a_grain_is_noted(image: Image) -> None:
    last = max(STORED, key=image.sector)
    with image.path.open("r+b") as file:
        file.truncate(image.sector(last) * 512 + 1000)
    header, file_ = image.header, PosixFile.open(image.path)
    try:
        with open_chain(image.path) as chain:
            line = chain.links[0].descriptor.extents[0]
        extent = open_extent(ExtentSpec(line, image.path, file_, False))
        extent.resolve(0, header.capacity * 512)
    finally:
        file_.close()
    assert any("past the end of the file of" in note for note in extent.notes), extent.notes


def test_nothing_is_changed_while_a_table_is_lost_in_both_directories(image: Image) -> None:
    for directory in (image.header.gd_offset, image.header.rgd_offset):
        with image.path.open("r+b") as file:
            file.seek(directory * 512)
            file.write(bytes(4))
    before = image.path.read_bytes()
    with pytest.raises(FormatError, match="grain directory entry 0 = 0: must name a grain table") as caught:
        compact(image.path)
    assert caught.value.offset == image.header.gd_offset * 512
    with pytest.raises(FormatError, match="must name a grain table"):
        resize(image.path, 64 << 20)
    assert image.path.read_bytes() == before
