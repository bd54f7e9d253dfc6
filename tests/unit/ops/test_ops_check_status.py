"""The exit status of a check: 2 is for damage alone; what cannot be checked is 1, and what only looks odd is 0."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.check.repair import repair
from qemu_vmdk_snap.storage.blockfile import BlockFile, PosixFile
from tests.support.qemu import qemu_img, qemu_io

SIZE = 4 << 20


def status(path: Path, *options: str) -> int:
    return main(["image", "check", "-q", *options, str(path)])


def split(folder: Path) -> Path:
    path = folder / "split.vmdk"
    create_image(path, 40 << 30, options=ImageOptions(subformat="twoGbMaxExtentSparse"), durable=False)
    return path


def overlay(folder: Path) -> Path:
    create_image(folder / "base.vmdk", SIZE, durable=False)
    create_overlay(folder / "top.vmdk", folder / "base.vmdk", durable=False)
    return folder / "top.vmdk"


@contextlib.contextmanager
def few_descriptors() -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


def test_not_enough_descriptors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = split(tmp_path)
    with few_descriptors():
        assert main(["image", "check", "--output=json", str(path)]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["check-errors"] == len(answer["findings"]) > 5
    assert "corruptions" not in answer
    assert all(finding["rule"].endswith("Too many open files") for finding in answer["findings"])
    assert status(path) == 0


def test_corruption_found_besides_is_2(tmp_path: Path) -> None:
    path = split(tmp_path)
    with (tmp_path / "split-s001.vmdk").open("r+b") as file:
        file.seek(72)
        file.write(b"\1")
    with few_descriptors():
        assert status(path) == 2


def test_an_extent_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = split(tmp_path)
    (tmp_path / "split-s007.vmdk").unlink()
    assert main(["image", "check", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"Not checked {path}: byte " in out
    assert "its extent 'split-s007.vmdk' does not exist" in out
    assert "1 internal errors have occurred during the check." in out
    assert "No errors were found" not in out


class Unreadable(PosixFile):
    """A file whose tables give EIO."""

    def read_at(self, offset: int, length: int) -> bytes:
        if offset >= 512 * 21:
            raise OSError(5, os.strerror(5), str(self.path))
        return super().read_at(offset, length)

    def read_into(self, offset: int, view: memoryview) -> int:
        return len(self.read_at(offset, len(view)))


@pytest.mark.parametrize("name", ["top.vmdk", "base.vmdk"])
def test_tables_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    path = overlay(tmp_path)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, b"x")

    def opener(path: Path, writable: bool) -> BlockFile:
        return (Unreadable if path.name == name else PosixFile).open(path, writable=writable)

    report = check_image(path, resolver=confined(), whole_chain=True, opener=opener)
    assert (report.corruptions, report.check_errors) == (0, 1)
    assert report.findings[0].rule == "must be readable: Input/output error"


def missing(path: Path) -> None:
    (path.parent / "base.vmdk").unlink()


def outside(path: Path) -> None:
    (path.parent / "away").mkdir()
    (path.parent / "base.vmdk").rename(path.parent / "away" / "base.vmdk")
    (path.parent / "base.vmdk").symlink_to("away/base.vmdk")


def an_extent(path: Path) -> None:
    with (path.parent / "base.vmdk").open("r+b") as file:
        file.seek(28)
        file.write(bytes(16))


@pytest.mark.parametrize("spoil", [missing, outside, an_extent])
def test_a_parent_that_cannot_be_looked_at(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = overlay(tmp_path)
    spoil(path)
    report = check_image(path, resolver=confined())
    assert (report.corruptions, report.check_errors) == (0, 1)
    assert report.findings[0].field == "parentFileNameHint"
    assert status(path) == 1


@pytest.mark.needs("qemu-img")
def test_an_overlay_that_is_smaller_than_its_parent(tmp_path: Path) -> None:
    qemu_img("create", "-f", "vmdk", tmp_path / "base.vmdk", "8M")
    qemu_img("create", "-f", "vmdk", "-b", tmp_path / "base.vmdk", "-F", "vmdk", tmp_path / "top.vmdk", "4M")
    report = check_image(tmp_path / "top.vmdk", resolver=confined())
    assert (report.corruptions, report.check_errors) == (0, 1)
    assert "QEMU makes smaller overlays, too" in report.findings[0].rule
    assert status(tmp_path / "top.vmdk") == 1


@pytest.mark.parametrize("kind", ["monolithicFlat", "vmfs"])
def test_a_flat_extent_that_was_cut_short(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk.vmdk"
    create_image(path, SIZE, options=ImageOptions(subformat=kind), durable=False)
    assert status(path) == 0
    os.truncate(tmp_path / "disk-flat.vmdk", SIZE - 1)
    [finding] = check_image(path, resolver=confined()).findings
    assert str(finding) == (
        f"{tmp_path / 'disk-flat.vmdk'}: byte {SIZE - 1:#x}: length = {SIZE - 1}: must be at least {SIZE}, "
        f"for the extent of {path}: the file was cut short"
    )
    assert status(path) == 2


@pytest.mark.parametrize("digits", ["12", "1234567890", ""], ids=["longer", "much longer", "shorter"])
def test_an_edited_descriptor_that_moved_the_tables(tmp_path: Path, digits: str) -> None:
    path = tmp_path / "disk.vmdk"
    create_image(path, SIZE, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, b"x" * 200_000)
    raw = path.read_bytes()
    old = b'ddb.virtualHWVersion = "4"'
    moved = path.read_bytes().replace(old, f'ddb.virtualHWVersion = "{digits}"'.encode())
    assert len(moved) != len(raw)
    path.write_bytes(moved)
    report = check_image(path, resolver=confined())
    assert report.corruptions == 1
    assert f"everything after it moved by {len(moved) - len(raw)} bytes" in report.findings[0].rule
    assert status(path) == 2
    assert status(path, "-r", "all") == 1
    assert path.read_bytes() == moved
    path.write_bytes(raw + b"rubbish")  # an odd length alone says nothing
    assert status(path) == 0


@pytest.mark.needs("qemu-io")
def test_a_cowd_extent_that_qemu_wrote_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    create_image(path, SIZE, options=ImageOptions(subformat="vmfsSparse"), durable=False)
    qemu_io(path, "write -P 7 1M 100k")
    report = check_image(path, resolver=confined())
    assert (report.corruptions, report.leaks, report.repairable) == (0, 0, 1)
    assert status(path) == 0
    assert repair(path, resolver=confined()).after.findings == ()
    with open_chain(path) as chain:
        assert chain.read_at(1 << 20, 102_400) == b"\7" * 102_400


def torn(path: Path, grain: int) -> None:
    """Take the entry of a grain out of the primary table."""
    raw = path.read_bytes()
    (gd,) = struct.unpack_from("<Q", raw, 56)
    (table,) = struct.unpack_from("<I", raw, gd * 512)
    with path.open("r+b") as file:
        file.seek(table * 512 + 4 * grain)
        file.write(bytes(4))


def test_leaks_are_given_back_beside_an_entry_that_one_copy_lacks(tmp_path: Path) -> None:
    """Its grain looks like a leak to whoever reads the primary table alone."""
    path = tmp_path / "disk.vmdk"
    create_image(path, SIZE, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, b"1" * 65536)
        chain.write_at(65536, b"2" * 65536)
    torn(path, 1)
    with path.open("ab") as file:
        file.write(b"leak" * 50_000)
    assert status(path) == 3
    assert status(path, "-r", "leaks") == 0
    with open_chain(path) as chain:
        assert chain.read_at(0, 131_072) == b"1" * 65536 + b"2" * 65536
    assert check_image(path, resolver=confined()).findings == ()
