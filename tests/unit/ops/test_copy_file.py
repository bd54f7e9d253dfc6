"""Copying a file as it is: bytes, holes, mode and attributes; never over another file, and nothing half done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_vmdk_snap import Progress, copy_file

MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a file with data at its start, in the middle and at its end, and holes between them."""
    path = tmp_path / "source"
    with path.open("wb") as file:
        for offset in (0, 40 * MIB, 90 * MIB - 4096):
            file.seek(offset)
            file.write(os.urandom(4096))
    path.chmod(0o640)
    return path


@pytest.mark.parametrize("durable", [True, False])
def test_it_is_the_same_file_elsewhere(source: Path, tmp_path: Path, durable: bool) -> None:
    seen: list[Progress] = []
    made = copy_file(source, str(tmp_path / "copy"), durable=durable, on_progress=seen.append)
    copy = tmp_path / "copy"
    facts = copy.stat()
    assert made == (facts.st_dev, facts.st_ino)
    assert copy.read_bytes() == source.read_bytes()
    assert (facts.st_mode, facts.st_blocks) == (source.stat().st_mode, source.stat().st_blocks)
    assert (seen[-1].done, seen[-1].total) == (90 * MIB, 90 * MIB)
    assert [step.done for step in seen] == sorted(step.done for step in seen)


@pytest.mark.parametrize("size", [0, 1, 4097])
def test_small_files(tmp_path: Path, size: int) -> None:
    (tmp_path / "source").write_bytes(b"x" * size)
    copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"x" * size


def test_nothing_is_overwritten_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        copy_file(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"mine"

    def cancel(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_file(source, tmp_path / "other", on_progress=cancel)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        copy_file(tmp_path / "pipe", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "pipe", "source"]
