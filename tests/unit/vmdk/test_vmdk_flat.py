"""Are flat, empty, forbidden and device extents, and mixes of them, read and written as their lines say?"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap import FormatError, RunKind, Unsupported, commit, create_image, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main

SECTOR = 512


def descriptor(path: Path, kind: str, *extents: str) -> Path:
    lines = ["# Disk DescriptorFile", "version=1", "CID=0000abcd", "parentCID=ffffffff", f'createType="{kind}"']
    path.write_text("\n".join([*lines, "# Extent description", *extents]) + "\n")
    return path


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.mark.parametrize("kind", ["monolithicFlat", "2GbMaxExtentFlat", "twoGbMaxExtentFlat", "custom"])
def test_flat_extents_of_any_split_and_offset(tmp_path: Path, kind: str) -> None:
    (tmp_path / "one").write_bytes(noise(10 * SECTOR))
    (tmp_path / "two").write_bytes(noise(7 * SECTOR, 2))
    path = descriptor(
        tmp_path / "a.vmdk", kind, 'RW 3 FLAT "one" 2', 'RW 5 FLAT "two" 1', 'RW 2 FLAT "one" 7 "uuid" id'
    )
    model = bytearray(noise(10 * SECTOR)[2 * SECTOR : 5 * SECTOR] + noise(7 * SECTOR, 2)[SECTOR : 6 * SECTOR])
    model += noise(10 * SECTOR)[7 * SECTOR : 9 * SECTOR]
    with open_chain(path, writable=True) as chain:
        assert chain.read_at(0, chain.capacity) == model
        chain.write_at(3 * SECTOR - 4, b"across")
        chain.write_at(8 * SECTOR, b"third")
    model[3 * SECTOR - 4 : 3 * SECTOR + 2] = b"across"
    model[8 * SECTOR : 8 * SECTOR + 5] = b"third"
    with open_chain(path) as chain:
        assert chain.read_at(0, chain.capacity) == model
    assert (tmp_path / "one").read_bytes()[: 2 * SECTOR] == noise(10 * SECTOR)[: 2 * SECTOR]
    assert (tmp_path / "two").stat().st_size == 7 * SECTOR
    assert b"CID=0000abcd" not in path.read_bytes()


@pytest.mark.parametrize("kind", ["vmfs", "vmfsPreallocated", "vmfsEagerZeroedThick", "vmfsThin"])
def test_holes_of_a_flat_file_are_zeros(tmp_path: Path, kind: str) -> None:
    flat = tmp_path / "a-flat.vmdk"
    with flat.open("wb") as file:
        file.truncate(4 << 20)
        file.seek(1 << 20)
        file.write(b"d" * (1 << 20))
    path = descriptor(tmp_path / "a.vmdk", kind, f'RW {(4 << 20) // SECTOR} VMFS "a-flat.vmdk"')
    with open_chain(path) as chain:
        kinds = [(run.offset >> 20, run.length >> 20, run.kind) for run in chain.map()]
    assert kinds == [(0, 1, RunKind.ZERO), (1, 1, RunKind.DATA), (2, 2, RunKind.ZERO)]


def test_a_flat_file_that_is_too_short_reads_zeros_and_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 700)
    path = descriptor(tmp_path / "a.vmdk", "monolithicFlat", 'RW 5 FLAT "f" 0')
    with open_chain(path) as chain:
        assert chain.read_at(0, 5 * SECTOR) == b"x" * 700 + bytes(5 * SECTOR - 700)
        assert sum(run.length for run in chain.map()) == 5 * SECTOR
        missing = 5 * SECTOR - 700
        short = f"is {missing} bytes shorter than its extent: what is missing reads as zeros"
        assert chain.links[0].notes == [f"{tmp_path / 'f'}: {short}"]


def test_a_mix_of_kinds(tmp_path: Path) -> None:
    """Sparse, flat, empty, read-only and forbidden extents in one disk; a forbidden one's file is never opened."""
    create_image(tmp_path / "s.vmdk", 64 * SECTOR, durable=False)
    with open_chain(tmp_path / "s.vmdk", writable=True) as chain:
        chain.write_at(0, noise(64 * SECTOR))
    for name in ("f", "g"):
        (tmp_path / name).write_bytes(noise(8 * SECTOR, 2))
    path = descriptor(
        tmp_path / "a.vmdk",
        "custom",
        'RW 64 SPARSE "s.vmdk"',
        "RW 10 ZERO",
        'RDONLY 8 FLAT "f" 0',
        'NOACCESS 6 FLAT "does not exist" 0',
        'RW 2 FLAT "g" 1',
    )
    model = noise(64 * SECTOR) + bytes(10 * SECTOR) + noise(8 * SECTOR, 2) + bytes(6 * SECTOR)
    model += noise(8 * SECTOR, 2)[SECTOR : 3 * SECTOR]
    with open_chain(path) as chain:
        assert chain.read_at(0, chain.capacity) == model
        assert chain.links[0].notes == [
            f"{path}: an extent of {6 * SECTOR} bytes is marked NOACCESS: it reads as zeros"
        ]
    with open_chain(path, writable=True) as chain:
        chain.write_at(10, b"sparse")
        chain.write_at(70 * SECTOR, bytes(SECTOR))
        for sector, text in ((66, "without storage"), (75, "read-only"), (85, "without storage")):
            with pytest.raises(Unsupported, match=text):
                chain.write_at(sector * SECTOR, b"no")
    create_overlay(tmp_path / "top.vmdk", path, durable=False)
    with open_chain(tmp_path / "top.vmdk", writable=True) as chain:
        chain.write_at(75 * SECTOR, b"yes")
        assert chain.read_at(75 * SECTOR, 4) == b"yes" + noise(8 * SECTOR, 2)[SECTOR + 3 : SECTOR + 4]


def test_an_extent_line_without_a_file_is_refused(tmp_path: Path) -> None:
    path = descriptor(tmp_path / "a.vmdk", "custom", "RW 5 FLAT")
    with pytest.raises(FormatError, match="must name a file"):
        open_chain(path)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    backing = tmp_path / "backing"
    backing.write_bytes(noise(64 * 1024))
    made = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


@pytest.mark.parametrize(("kind", "line"), [("fullDevice", 'RW 100 FLAT "{}" 0'), ("vmfsRDM", 'RW 100 VMFSRDM "{}"')])
@pytest.mark.needs("losetup")
def test_a_device_is_opened_only_where_that_is_allowed(
    tmp_path: Path, device: Path, kind: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = descriptor(tmp_path / "a.vmdk", kind, line.format(device))
    assert main(["image", "map", "--allow-dir", "/dev", str(path)]) == 63
    allowed = f"its extent is the device '{device}': opened only where that is allowed (--allow-devices)"
    assert allowed in capsys.readouterr().err
    with open_chain(path, allow_devices=True) as chain:
        assert chain.read_at(0, 100 * SECTOR) == noise(64 * 1024)[: 100 * SECTOR]
    for command in (["info"], ["map"], ["compare", str(path)]):
        assert main(["image", *command, "--allow-devices", str(path)]) == 0


def test_a_device_is_refused_before_it_is_looked_at(tmp_path: Path) -> None:
    for name in ("/dev/null", "/dev/no-such-device", r"\\.\PhysicalDrive0"):
        path = descriptor(tmp_path / "a.vmdk", "fullDevice", f'RW 100 FLAT "{name}" 0')
        with pytest.raises(Unsupported, match="--allow-devices"):
            open_chain(path, trusted_dirs=["/dev"])
    path = descriptor(tmp_path / "a.vmdk", "fullDevice", 'RW 100 FLAT "/dev/null" 0')
    with pytest.raises(OSError, match="not a regular file"):
        open_chain(path, allow_devices=True)
    (tmp_path / "x-rdm.vmdk").write_bytes(bytes(512))
    path = descriptor(tmp_path / "a.vmdk", "vmfsRDM", 'RW 100 VMFSRDM "x-rdm.vmdk"')
    with pytest.raises(Unsupported, match="can be followed by ESXi alone"):
        open_chain(path, allow_devices=True)


def test_a_fifo_is_no_extent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = descriptor(tmp_path / "a.vmdk", "monolithicFlat", 'RW 100 FLAT "pipe" 0')
    for allow in (False, True):
        with pytest.raises(OSError, match="not a regular file"):
            open_chain(path, allow_devices=allow)


@pytest.mark.parametrize(
    ("line", "at"), [('RDONLY 8 FLAT "f" 0', 64), ("RW 8 ZERO", 64), ('NOACCESS 8 FLAT "f" 0', 64)]
)
def test_a_commit_into_what_cannot_take_it_changes_nothing(tmp_path: Path, line: str, at: int) -> None:
    """All of the data is looked at before the first byte of the base is written; where it fits, it is merged."""
    for name in ("f", "g"):
        (tmp_path / name).write_bytes(noise(64 * SECTOR, 2))
    path = descriptor(tmp_path / "a.vmdk", "custom", 'RW 64 FLAT "g" 0', line)
    top = tmp_path / "top.vmdk"
    create_overlay(top, path, durable=False)
    with open_chain(top, writable=True) as chain:
        chain.write_at(0, b"takes this")
        chain.write_at(at * SECTOR + 5, b"not this")
        model = chain.read_at(0, chain.capacity)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        Unsupported, match=rf"its extent {line[: line.index(' ')]} .* cannot take what .*top.vmdk has at"
    ):
        commit(top)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    with open_chain(top) as chain:
        assert chain.read_at(0, chain.capacity) == model


def test_a_commit_beside_what_cannot_be_written(tmp_path: Path) -> None:
    for name in ("f", "g"):
        (tmp_path / name).write_bytes(noise(256 * SECTOR, 2))
    path = descriptor(tmp_path / "a.vmdk", "custom", 'RW 256 FLAT "g" 0', 'RDONLY 8 FLAT "f" 0', "RW 8 ZERO")
    top = tmp_path / "top.vmdk"
    create_overlay(top, path, durable=False)
    with open_chain(top, writable=True) as chain:
        chain.write_at(0, b"takes this")
    commit(top)
    assert (tmp_path / "g").read_bytes()[:10] == b"takes this"
