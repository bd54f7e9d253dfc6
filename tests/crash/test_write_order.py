"""Is every image that a power cut can leave one that reads old or new, under a CID that says which?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import CidMismatch, FormatError, ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.chain import WritableChain
from tests.support.crash.recording import RecordingDisk, RecordingFile

CAPACITY = 64 << 10
OLD, NEW = b"\x11", b"\x22"
OPTIONS = ImageOptions(grain_size=4096)


@pytest.fixture
def chain_files(tmp_path: Path) -> dict[str, bytes]:
    """A base whose every grain is OLD, and an empty overlay on it."""
    create_image(tmp_path / "base.vmdk", CAPACITY, options=OPTIONS, durable=False)
    with open_chain(tmp_path / "base.vmdk", writable=True) as chain:
        chain.write_at(0, OLD * CAPACITY)
    create_overlay(tmp_path / "top.vmdk", tmp_path / "base.vmdk", durable=False)
    return {name: (tmp_path / name).read_bytes() for name in ("base.vmdk", "top.vmdk")}


def cut_at_every_write(
    contents: dict[str, bytes],
    work: Callable[[WritableChain], None],
    folder: Path,
    verdict: Callable[[Path], None],
) -> int:
    """Run `work` on the chain, and hand `verdict` a folder with each image that a power cut within it can leave."""
    seen: set[bytes] = set()
    disk = RecordingDisk(contents)
    top = disk.files["top.vmdk"]
    write = top.write_at

    def write_and_cut(offset: int, data: bytes) -> None:
        write(offset, data)
        seen.update(top.images_after_crash(limit=64, seed=len(top.log)))

    top.write_at = write_and_cut  # type: ignore[method-assign,assignment]
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with open_chain(folder / "top.vmdk", writable=True, opener=disk, resolver=by_name, lock=False) as chain:
        work(chain)
    for image in seen:
        (folder / "top.vmdk").write_bytes(image)
        verdict(folder / "top.vmdk")
    return len(seen)


def old_or_new(path: Path) -> None:
    with open_chain(path) as chain:
        for offset in range(0, CAPACITY, 512):
            assert chain.read_at(offset, 512) in (OLD * 512, NEW * 512), f"sector at {offset} is neither old nor new"


def write_some(chain: WritableChain) -> None:
    chain.write_at(4096 + 512, NEW * 1024)  # inside a grain: the rest of it is copied
    chain.write_at(16384, NEW * 12288)
    chain.flush()
    chain.write_at(512, NEW * 5120)  # a new grain, and in place
    chain.flush()


def test_power_cut_leaves_old_or_new(chain_files: dict[str, bytes], tmp_path: Path) -> None:
    assert cut_at_every_write(chain_files, write_some, tmp_path, old_or_new) > 100


def test_without_the_barrier_the_power_cut_test_is_red(
    chain_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordingFile, "flush", lambda self: None)
    # Which of the broken images comes first differs from run to run.
    with pytest.raises((AssertionError, FormatError), match=r"neither old nor new|must place grain"):
        cut_at_every_write(chain_files, write_some, tmp_path, old_or_new)


def test_no_data_is_durable_under_the_old_cid(chain_files: dict[str, bytes], tmp_path: Path) -> None:
    """Whoever made an overlay on this image before the writes must be told: by the CID."""
    for name, content in chain_files.items():
        (tmp_path / name).write_bytes(content)
    with open_chain(tmp_path / "top.vmdk", writable=True) as chain:
        chain.write_at(0, OLD * 4096)  # a grain of its own, so that the next write is visible without any table
    chain_files["top.vmdk"] = (tmp_path / "top.vmdk").read_bytes()
    create_overlay(tmp_path / "child.vmdk", tmp_path / "top.vmdk", durable=False)
    refused = 0

    def told(path: Path) -> None:
        nonlocal refused
        try:
            with open_chain(path.parent / "child.vmdk") as chain:
                assert chain.read_at(0, CAPACITY) == OLD * CAPACITY, "new data under the CID that the child trusts"
        except CidMismatch:
            refused += 1

    def write_in_place(chain: WritableChain) -> None:
        chain.write_at(512, NEW * 1024)

    assert cut_at_every_write(chain_files, write_in_place, tmp_path, told) > refused > 0


def test_both_copies_of_the_tables_are_written(chain_files: dict[str, bytes]) -> None:
    disk = RecordingDisk(chain_files)
    with open_chain(Path("top.vmdk"), writable=True, opener=disk, resolver=by_name, lock=False) as chain:
        write_some(chain)
    image = disk.files["top.vmdk"].content
    assert image[22 * 512 : 26 * 512] == image[27 * 512 : 31 * 512] != bytes(2048)


def by_name(owner: Path, name: str, role: str) -> Path:
    return Path(name)
