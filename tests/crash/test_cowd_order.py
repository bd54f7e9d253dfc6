"""Does a power cut leave a COWD delta old or new, and a count of used sectors that covers all that is in use?"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qemu_vmdk_snap import FormatError, create_image, open_chain
from tests.support.crash.recording import RecordingDisk, RecordingFile
from tests.support.esxi import cowd, descriptor

SECTORS = 4096 + 64  # two tables, of which the second does not exist yet
OLD, NEW = b"\x11", b"\x22"


def images(folder: Path) -> set[bytes]:
    """Write on a delta over a base of OLD; return every extent file that a power cut within that can leave."""
    create_image(folder / "base.vmdk", SECTORS * 512, kind="monolithicFlat", durable=False)
    with open_chain(folder / "base.vmdk", writable=True) as chain:
        chain.write_at(0, OLD * SECTORS * 512)
    with open_chain(folder / "base.vmdk") as base:
        cid = base.links[0].cid
    cowd(folder / "top-delta.vmdk", SECTORS, {3: OLD * 512})
    line = [f'RW {SECTORS} VMFSSPARSE "top-delta.vmdk"']
    descriptor(folder / "top.vmdk", "vmfsSparse", line, parent_cid=cid, hint="base.vmdk")
    disk = RecordingDisk({path.name: path.read_bytes() for path in folder.iterdir()})
    extent = disk.files["top-delta.vmdk"]
    write = extent.write_at
    seen: set[bytes] = set()

    def write_and_cut(offset: int, data: bytes) -> None:
        write(offset, data)
        seen.update(extent.images_after_crash(limit=64, seed=len(extent.log)))

    extent.write_at = write_and_cut  # type: ignore[method-assign,assignment]
    with open_chain(
        folder / "top.vmdk", writable=True, opener=disk, resolver=lambda _, name, __: Path(name), lock=False
    ) as chain:
        chain.write_at(3 * 512 + 512, NEW * 1536)
        chain.write_at((SECTORS - 9) * 512, NEW * 1024)  # into a table that is made for it
        chain.flush()
        chain.write_at(2 * 512, NEW * 1024)  # a new grain, and one in place
        chain.flush()
    return seen


def verify(folder: Path, image: bytes) -> None:
    (folder / "top-delta.vmdk").write_bytes(image)
    with open_chain(folder / "top.vmdk") as chain:
        for sector in (1, 2, 3, 4, 5, 6, 7, SECTORS - 10, SECTORS - 9, SECTORS - 8, SECTORS - 7, SECTORS - 1):
            found = chain.read_at(sector * 512, 512)
            assert found in (OLD * 512, NEW * 512), f"sector {sector} is neither old nor new"
        named = [run.file_offset + run.length for run in chain.map() if run.file_offset is not None and run.depth == 0]
    free = struct.unpack_from("<I", image, 28)[0] * 512
    directory = struct.unpack_from("<2I", image, 2048)
    tables = [(sector + 32) * 512 for sector in directory if sector]
    assert max([*named, *tables]) <= free, "another writer would go on inside what is in use"


def verify_all(folder: Path, seen: set[bytes]) -> None:
    for image in seen:
        verify(folder, image)


def test_power_cut_leaves_old_or_new(tmp_path: Path) -> None:
    seen = images(tmp_path)
    verify_all(tmp_path, seen)
    assert len(seen) > 60


def test_without_the_barriers_the_test_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordingFile, "flush", lambda self: None)
    seen = images(tmp_path)
    # Which of the broken images comes first differs from run to run.
    broken = r"neither old nor new|inside what is in use|must place grain"
    with pytest.raises((AssertionError, FormatError), match=broken):
        verify_all(tmp_path, seen)
