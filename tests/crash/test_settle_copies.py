"""Does a power cut while table copies are settled, or emptied, leave what the next settling brings to its end?"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

from qemu_vmdk_snap import ImageOptions, create_image, open_chain
from qemu_vmdk_snap.chain.link import open_link
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.vmdk.sparse.copies import CopiesReport, compare_copies, settle_copies
from qemu_vmdk_snap.vmdk.sparse.extent import SparseExtent
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader
from tests.support.crash.recording import RecordingDisk, RecordingFile, Write

GRAIN = 4096
SIZE = 4 << 20
PATH = Path("disk.vmdk")


def made(folder: Path) -> bytes:
    create_image(folder / PATH.name, SIZE, options=ImageOptions(grain_size=GRAIN), durable=False)
    with open_chain(folder / PATH.name, writable=True) as chain:
        for grain in range(0, SIZE // GRAIN, 3):
            chain.write_at(grain * GRAIN, bytes([grain % 250 + 1]) * GRAIN)
    return (folder / PATH.name).read_bytes()


def header_of(raw: bytes) -> SparseExtentHeader:
    return SparseExtentHeader.parse(raw[:512], path=PATH)


def entries_of(raw: bytes, copy: int) -> list[int]:
    """Return the bytes of the file where a copy's entries are."""
    header = header_of(raw)
    gd = (header.gd_offset, header.rgd_offset)[copy] * 512
    tables = struct.unpack_from(f"<{header.gd_entries}I", raw, gd)
    return [table * 512 + 4 * index for table in tables for index in range(512)]


def losses(whole: bytes) -> list[bytes]:
    """Return images in which each entry is in one copy at least."""
    chooser = random.Random(1)
    found = []
    for share in ((1.0, 0.0), (0.0, 1.0), (0.2, 0.2)):
        raw = bytearray(whole)
        for primary, redundant in zip(entries_of(whole, 0), entries_of(whole, 1), strict=True):
            lot = chooser.random()
            if lot < share[0]:
                raw[primary : primary + 4] = bytes(4)
            elif lot < sum(share):
                raw[redundant : redundant + 4] = bytes(4)
        found.append(bytes(raw))
    return found


def cuts(disk: RecordingFile, work: Callable[[], object]) -> set[bytes]:
    """Return every image that a power cut within `work` can leave, as far as they are few, else a sample."""
    seen: set[bytes] = set()
    write = disk.write_at

    def write_and_cut(offset: int, data: bytes) -> None:
        write(offset, data)
        seen.update(disk.images_after_crash(limit=64, seed=len(disk.log)))

    disk.write_at = write_and_cut  # type: ignore[method-assign,assignment]
    work()
    seen.update(disk.images_after_crash(limit=64))
    return seen


def test_a_power_cut_while_copies_are_settled(tmp_path: Path) -> None:
    whole = made(tmp_path)
    for lost in losses(whole):
        disk = RecordingFile(PATH, lost)
        images = cuts(disk, lambda disk=disk, lost=lost: settle_copies(disk, header_of(lost)))  # type: ignore[misc]
        assert bytes(disk.content) == disk.durable == whole
        assert len(images) > 4
        for image in images:
            again = RecordingFile(PATH, image)
            assert compare_copies(again, header_of(image)).conflict_count == 0
            settle_copies(again, header_of(image))
            assert bytes(again.content) == whole


def test_what_is_settled_is_durable_before_it_is_named(tmp_path: Path) -> None:
    """A killed writer may have left grains in the page cache: without the first barrier an entry may be there first."""
    whole = made(tmp_path)
    [lost, *_] = losses(whole)
    disk = RecordingFile(PATH, lost)
    settle_copies(disk, header_of(lost))
    assert disk.log[0] is None
    assert disk.log[-1] is None
    assert any(isinstance(entry, Write) for entry in disk.log)
    quiet = RecordingFile(PATH, whole)
    assert settle_copies(quiet, header_of(whole)) == 0
    assert quiet.log == []


def test_a_power_cut_while_tables_are_emptied(tmp_path: Path) -> None:
    """Entries that are left in one copy come back whole: the space of the grains is given back after a barrier."""
    whole = made(tmp_path)
    disk = RecordingDisk({PATH.name: whole})
    file = disk.files[PATH.name]
    waiting: list[int] = []
    file.truncate = lambda size: waiting.append(len(file.pending))  # type: ignore[method-assign]
    link = open_link(PATH, opener=disk, writable=True, resolver=confined(), lock=False)
    extent = link.extents[0].extent
    assert isinstance(extent, SparseExtent)
    images = cuts(file, extent.clear)
    assert len(images) > 10
    assert waiting == [0], "no table names a grain any more when the space goes"
    assert compare_copies(file, header_of(whole)) == CopiesReport()
    assert not any(struct.unpack_from("<I", file.content, at)[0] for at in entries_of(whole, 0))
    partly = 0
    for image in images:
        again = RecordingFile(PATH, image)
        partly += settle_copies(again, header_of(image)) > 0
        for primary, redundant in zip(entries_of(whole, 0), entries_of(whole, 1), strict=True):
            entry = again.content[primary : primary + 4]
            assert entry == again.content[redundant : redundant + 4]
            assert entry in (bytes(4), whole[primary : primary + 4])
    assert partly
