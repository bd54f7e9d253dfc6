"""Images and requests that are valid in their parts and would lose data, or mislead, when taken together."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qemu_vmdk_snap import (
    FormatError,
    ImageOptions,
    InvalidRequest,
    StillNeeded,
    commit,
    create_image,
    create_overlay,
    open_chain,
    remove,
)
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.vmdk.grain.tables import GrainTables

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.vmdk"
    create_image(path, 64 * MIB, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, b"A" * MIB)
    return path


def u64_at(path: Path, offset: int) -> int:
    return int(struct.unpack_from("<Q", path.read_bytes(), offset)[0])


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def edit(path: Path, old: bytes, new: bytes) -> None:
    text = path.read_bytes()[512 : 512 * 21].rstrip(b"\0")
    assert old in text
    poke(path, 512, text.replace(old, new).ljust(20 * 512, b"\0"))


def test_a_lost_directory_entry_is_read_by_its_copy_and_never_written_over(image: Path) -> None:
    poke(image, u64_at(image, 56) * 512, bytes(4))
    with open_chain(image) as chain:
        assert chain.read_at(0, MIB) == b"A" * MIB
    before = image.read_bytes()
    with pytest.raises(FormatError, match=r"grain directory entry 0 = 0: .* repair the image"):
        open_chain(image, writable=True)
    assert image.read_bytes() == before
    assert main(["image", "check", "-q", "-r", "all", str(image)]) == 0
    with open_chain(image, writable=True) as chain:
        assert chain.read_at(0, MIB) == b"A" * MIB


@pytest.mark.parametrize("kind", [b"FLAT", b"ZERO", b"VMFS"])
def test_an_embedded_descriptor_tells_of_its_own_extent(image: Path, kind: bytes) -> None:
    edit(image, b"SPARSE", kind)
    with pytest.raises(FormatError, match="must be SPARSE: the descriptor is embedded"):
        open_chain(image, writable=True)


def test_a_line_that_is_shorter_than_the_header_does_not_cut_the_disk(image: Path) -> None:
    edit(image, b"RW 131072 ", b"RW 65536 ")
    with pytest.raises(FormatError, match="extent sectors = 65536: must be the 131072 sectors of the header"):
        open_chain(image)


@pytest.mark.parametrize("line", ['RW 8 FLAT "a" 9999999999999999999', 'RW 18014398509481984 FLAT "a" 0'])
def test_places_beyond_every_disk(tmp_path: Path, line: str) -> None:
    path = tmp_path / "d.vmdk"
    path.write_text(f'# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType="custom"\n{line}\n')
    (tmp_path / "a").write_bytes(bytes(4096))
    with pytest.raises(FormatError, match=r"below"):
        open_chain(path)


def test_tables_smaller_than_a_sector_are_read_one_by_one(tmp_path: Path) -> None:
    content = b"".join(struct.pack("<64I", *range(n * 64, n * 64 + 64)).ljust(512, b"\0") for n in range(3))
    (tmp_path / "tables").write_bytes(bytes(512) + content)
    file = PosixFile.open(tmp_path / "tables")
    tables = GrainTables(file, file.path, struct.pack("<4I", 1, 2, 1, 3), entries_per_table=64)
    expected = [*range(64), *range(64, 128), *range(64), *range(128, 192)]
    assert tables.entries(0, 256).tolist() == expected == [tables.entry(i) for i in range(256)]
    file.close()


@pytest.mark.parametrize("kind", ["monolithicSparse", "monolithicFlat"])
def test_closing_twice_is_harmless(tmp_path: Path, kind: str) -> None:
    create_image(tmp_path / "a.vmdk", MIB, kind=kind, durable=False)
    with open_chain(tmp_path / "a.vmdk", writable=True) as chain:
        chain.write_at(0, b"x")
        chain.close()
    chain.close()


@pytest.mark.parametrize("name", [".hidden.vmdk", "s.vmdk"])
def test_remove_keeps_every_child(image: Path, name: str) -> None:
    child = image.with_name(name)
    create_overlay(child, image, durable=False)
    remove(image)
    with open_chain(child) as chain:
        assert chain.read_at(0, MIB) == b"A" * MIB


def test_remove_refuses_beside_an_image_that_it_cannot_read(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = image.with_name("foreign.whatever")
    foreign.write_bytes(b"whose?")
    opened = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path) == str(foreign):
            raise PermissionError(13, "Permission denied", str(path))
        return int(opened(path, flags, mode))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StillNeeded, match=r"foreign\.whatever cannot be read \(Permission denied\): it may"):
        remove(image)
    assert image.exists()


def test_remove_of_a_symbolic_link_is_refused(image: Path) -> None:
    link = image.with_name("link.vmdk")
    link.symlink_to(image)
    with pytest.raises(InvalidRequest, match="is a symbolic link"):
        remove(link)
    assert image.exists()


def test_commit_of_a_shorter_link_under_a_longer_child_is_refused(image: Path) -> None:
    create_overlay(image.with_name("t.vmdk"), image, durable=False)
    top = image.with_name("t.vmdk")
    edit(top, b"RW 131072 ", b"RW 65536 ")
    poke(top, 12, struct.pack("<Q", 65536))
    create_overlay(image.with_name("s.vmdk"), top, size=64 * MIB, durable=False)
    with pytest.raises(InvalidRequest, match="reads zeros past its end"):
        commit(top, delete=True)


def test_names_that_readers_would_take_for_something_else(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="readers take its bar for an escape"):
        create_image(tmp_path / "x|22.vmdk", MIB, durable=False)
    create_image(tmp_path / "q:1.vmdk", MIB, durable=False)
    create_overlay(tmp_path / "b.vmdk", tmp_path / "q:1.vmdk", durable=False)
    with open_chain(tmp_path / "b.vmdk") as chain:
        assert chain.links[0].hint == "./q:1.vmdk"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_request_to_end_leaves_nothing_half_done(tmp_path: Path, number: signal.Signals) -> None:
    create_image(tmp_path / "a.vmdk", 8 << 30, options=ImageOptions(grain_size=4096), durable=False)
    with open_chain(tmp_path / "a.vmdk", writable=True) as chain:
        for offset in range(0, 128 * MIB, 8192):
            chain.write_at(offset, b"x" * 4096)
    words = [sys.executable, "-m", "qemu_vmdk_snap", "image", "convert", "-r", "4M", "-O", "raw", "a.vmdk", "b.raw"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob(".b.raw.*")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert err == "qemu-vmdk-snap: cancelled\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.vmdk"]


_STRUCK_WHILE_IMPORTING = """
import os, signal, sys
from qemu_vmdk_snap.cli.main import main

class Striker:
    def find_spec(self, name, path=None, target=None):
        if name == "qemu_vmdk_snap.cli.image.convert":
            os.kill(os.getpid(), int(sys.argv.pop()))

sys.meta_path.insert(0, Striker())
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_request_to_end_while_the_command_starts_is_one_line_too(tmp_path: Path, number: signal.Signals) -> None:
    words = [sys.executable, "-c", _STRUCK_WHILE_IMPORTING, "image", "convert", "a.vmdk", "b.vmdk", str(int(number))]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (130, "qemu-vmdk-snap: cancelled\n")


def test_the_folder_that_cannot_be_written_is_named_by_the_users_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        create_image(tmp_path / "nowhere" / "a.vmdk", MIB)
    assert caught.value.filename == str(tmp_path / "nowhere" / "a.vmdk")


def test_a_base_that_is_being_written_is_taken_only_where_that_is_asked_for(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_chain(image, writable=True):
        assert main(["image", "create", "-q", "-b", image.name, str(image.with_name("t.vmdk"))]) == 75
        assert not image.with_name("t.vmdk").exists()
        assert "(-U, --force-share, reads it anyway)" in capsys.readouterr().err
        assert main(["image", "create", "-qU", "-b", image.name, str(image.with_name("t.vmdk"))]) == 0
    assert "is being written" in capsys.readouterr().err
    assert main(["image", "create", "-q", "-b", image.name, str(image.with_name("u.vmdk"))]) == 0
    assert capsys.readouterr().err == ""


def test_the_options_are_listed_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "create", "-o", "help"]) == 0
    assert "zeroed_grain" in capsys.readouterr().out
    assert main(["image", "create"]) == 64
