"""Is each cell of the table in docs/formats.md what the reader really does? VirtualBox's column is not measured."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pytest

from qemu_vmdk_snap import (
    ImageOptions,
    PosixFile,
    Unsupported,
    create_image,
    open_chain,
    read_descriptor,
    read_facts,
)
from qemu_vmdk_snap.ops.make.layout import KINDS
from tests.support.esxi import descriptor
from tests.support.kinds import GRAIN, HOLE, SECTORS, SIZE, Sample, content, patch_file, samples

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

DOCS: Final = Path(__file__).parents[3] / "docs" / "formats.md"
DEVICES: Final = "a device in an extent line; vmfsRDM, vmfsRDMP, vmfsRaw"
PEERS: Final = """
import hashlib, importlib.metadata, json, sys
from pathlib import Path
def dissect(path):
    from dissect.hypervisor.disk.vmdk import VMDK
    disk = VMDK(Path(path))
    return disk.read(disk.size)
def libvmdk(path):
    import pyvmdk
    disk = pyvmdk.handle()
    disk.open(path)
    disk.open_extent_data_files()
    size = disk.get_media_size()
    return b"".join(disk.read_buffer_at_offset(min(1 << 20, size - at), at) for at in range(0, size, 1 << 20))
import pyvmdk
read, answers = locals()[sys.argv[1]], {}
for path in sys.argv[2:]:
    try:
        answers[path] = hashlib.sha256(read(path)).hexdigest()
    except Exception as error:
        answers[path] = f"no: {error!r}"
version = {"libvmdk": pyvmdk.get_version(), "dissect": importlib.metadata.version("dissect.hypervisor")}[sys.argv[1]]
print(json.dumps([version, answers]))
"""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return samples(tmp_path_factory.mktemp("kinds"))


def rows() -> dict[str, dict[str, str]]:
    """Return the table: by kind, then by the heading of the column."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(number for number, line in enumerate(cells) if line[0].startswith("kind"))
    end = next((n for n in range(start + 2, len(cells)) if len(cells[n]) != len(cells[start])), len(cells))
    return {line[0]: dict(zip(cells[start], line, strict=True)) for line in cells[start + 2 : end]}


def word(cell: str) -> str:
    """Return what a cell says, without the explanation that may follow a colon, a comma, a bracket or a note."""
    return re.split(r"[:,(\[]", cell)[0].strip()


def check_column(column: str, measured: Iterable[tuple[str, str]]) -> None:
    """Compare a column with (row, what was measured) of every sample."""
    found: dict[str, set[str]] = defaultdict(set)
    for row, verdict in measured:
        found[row].add(verdict)
    told = {row: {word(cells[column])} for row, cells in rows().items() if row in found}
    assert told == dict(found)


def verdict_of(sample: Sample, answer: str) -> str:
    """Return the word for a reader's answer: the digest of what it read, or `no: ` and its reason."""
    if answer.startswith("no: "):
        return "no"
    if answer == digest(sample.expected):
        return "yes"
    return next((name for name, data in sample.variants.items() if answer == digest(data)), "wrong bytes")


def test_every_row_has_a_sample_and_every_sample_a_row(disks: list[Sample]) -> None:
    assert {sample.row for sample in disks} | {DEVICES} == set(rows())


def test_what_is_read(disks: list[Sample]) -> None:
    def read(sample: Sample) -> str:
        with open_chain(sample.path) as chain:
            return verdict_of(sample, digest(chain.read_at(0, chain.capacity)))

    check_column("read", ((sample.row, read(sample)) for sample in disks))


def test_what_is_written_in_place(disks: list[Sample], tmp_path: Path) -> None:
    def write(sample: Sample, data: bytes) -> bool:
        try:
            with open_chain(sample.path, writable=True) as chain:
                chain.write_at(sample.write_at, data)
        except Unsupported:
            return False
        with open_chain(sample.path) as chain:
            return (
                chain.read_at(sample.write_at - 1, len(data) + 1)[1:] == data
                if sample.write_at
                else (chain.read_at(0, len(data)) == data)
            )

    def verdict(sample: Sample) -> str:
        if write(sample, b"written here"):
            return "in place"
        return "zeros only" if sample.row.startswith("extents") and write(sample, bytes(512)) else "no"

    check_column("written", ((sample.row, verdict(sample)) for sample in copies(disks, tmp_path)))


def test_which_kinds_a_subformat_makes(disks: list[Sample], tmp_path: Path) -> None:
    """The names in the column are all there are, and what each makes says that it is of the row's kind."""
    types = {sample.row: read_facts(sample.path).create_type for sample in disks if "COWD without" not in sample.row}
    named = {row: re.findall(r"`([^`]+)`", cells["new with `subformat=`"]) for row, cells in rows().items()}
    assert sorted(name for names in named.values() for name in names if "=" not in name) == sorted(KINDS)
    for row, names in named.items():
        for name in names:
            path = tmp_path / f"{name}.vmdk"
            options = ImageOptions(zeroed_grain=True) if "=" in name else ImageOptions(subformat=name)
            create_image(path, SIZE, options=options, durable=False)
            assert read_facts(path).create_type == types[row]
    for sample in disks:
        assert named[sample.row] or word(rows()[sample.row]["new with `subformat=`"]) == "no"


def test_which_kinds_show_a_parent(disks: list[Sample], tmp_path: Path) -> None:
    """A hole shows the parent in every kind that has holes; `yes` also says that an overlay of the kind can be made."""
    create_image(tmp_path / "parent.vmdk", SIZE, durable=False)
    with open_chain(tmp_path / "parent.vmdk", writable=True) as chain:
        chain.write_at(0, b"P" * SIZE)
        cid = chain.links[0].cid

    def verdict(sample: Sample) -> str:
        shutil.copy(tmp_path / "parent.vmdk", sample.path.with_name("parent.vmdk"))
        name_parent(sample.path, cid)
        with open_chain(sample.path) as chain:
            seen = chain.read_at(HOLE, 2 * GRAIN)
        if b"P" not in seen:
            return "no"
        makes = re.findall(r"`([^`]+)`", rows()[sample.row]["new with `subformat=`"])
        return "yes" if any("=" in name or KINDS[name].may_have_parent for name in makes) else "read only"

    told = [sample for sample in copies(disks, tmp_path) if word(rows()[sample.row]["may carry a parent"])]
    check_column("may carry a parent", ((sample.row, verdict(sample)) for sample in told))


def name_parent(path: Path, cid: int) -> None:
    """Make the image say that parent.vmdk is its parent."""
    if path.read_bytes()[:4] == b"COWD":
        patch_file(path, 8, (2).to_bytes(4, "little"))
        patch_file(path, 32, b"parent.vmdk\0")
        patch_file(path, 32 + 1024, cid.to_bytes(4, "little"))
        return
    file = PosixFile.open(path)
    old, _ = read_descriptor(file)
    file.close()
    new = old.with_parent(cid, "parent.vmdk")
    if new.base:
        patch_file(path, new.base, new.raw + b"\0")
    else:
        path.write_bytes(new.raw)


@pytest.mark.needs("libvmdk-python", "dissect.hypervisor")
@pytest.mark.parametrize("reader", ["libvmdk", "dissect"])
def test_what_peers_read(disks: list[Sample], reader: str) -> None:
    version, answers = ask_peer(reader, [sample.path for sample in disks])
    assert f" {version} " in told_versions(), "the table tells of another version"
    check_column(reader, ((sample.row, verdict_of(sample, answers[str(sample.path)])) for sample in disks))


def ask_peer(reader: str, paths: list[Path]) -> tuple[str, dict[str, str]]:
    """Return the peer's version, and for each path the digest of what it reads or `no: ` and its reason."""
    done = run(sys.executable, "-c", PEERS, reader, *paths)
    assert done.returncode == 0, done.stderr
    version, answers = json.loads(done.stdout)
    return version, answers


def told_versions() -> str:
    return DOCS.read_text().split("|")[0].replace("\n", " ")


def test_what_qemu_reads_and_writes(disks: list[Sample], tmp_path: Path) -> None:
    version = re.findall(r"version ([0-9]+\.[0-9]+)", run("qemu-img", "--version").stdout)[0]
    if f"QEMU {version}" not in told_versions():
        pytest.skip(f"the table tells of another QEMU than {version}")

    def verdict(sample: Sample) -> str:
        raw = sample.path.with_name("raw")
        done = run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", sample.path, raw)
        answer = f"no: {done.stderr}" if done.returncode else digest(raw.read_bytes())
        if (reads := verdict_of(sample, answer)) != "yes":
            return reads
        wrote = run("qemu-io", "-f", "vmdk", "-c", "write -P 1 0 512", sample.path)
        return "read-only" if wrote.returncode or "failed" in wrote.stdout + wrote.stderr else "yes"

    check_column("QEMU", ((sample.row, verdict(sample)) for sample in copies(disks, tmp_path)))


def test_qemu_aborts_where_no_extent_is_left(tmp_path: Path) -> None:
    """What the row of RDONLY says of QEMU 7.2."""
    (tmp_path / "f").write_bytes(bytes(4096))
    lines = ["# Disk DescriptorFile", "version=1", "CID=12345678", "parentCID=ffffffff", 'createType="monolithicFlat"']
    (tmp_path / "a.vmdk").write_text("\n".join([*lines, 'RDONLY 8 FLAT "f" 0', ""]))
    done = run("qemu-img", "info", "-f", "vmdk", tmp_path / "a.vmdk")
    if "7.2" not in run("qemu-img", "--version").stdout:
        pytest.skip("the table tells of QEMU 7.2")
    assert done.returncode < 0
    assert "num_extents" in done.stderr


@pytest.mark.needs("losetup")
def test_a_device_in_an_extent_line(tmp_path: Path) -> None:
    (tmp_path / "backing").write_bytes(content())
    made = run("losetup", "-f", "--show", tmp_path / "backing")
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        lines = {"fullDevice": f'RW {SECTORS} FLAT "{device}" 0', "vmfsRDM": f'RW {SECTORS} VMFSRDM "{device}"'}
        for kind, line in lines.items():
            path = descriptor(tmp_path / f"{kind}.vmdk", kind, [line])
            with pytest.raises(Unsupported, match="--allow-devices"):
                open_chain(path)
            with open_chain(path, allow_devices=True) as chain:
                assert chain.read_at(0, SIZE) == content()
            readers = {reader: ask_peer(reader, [path])[1][str(path)] for reader in ("libvmdk", "dissect")}
            converted = run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, tmp_path / "raw")
            readers["QEMU"] = "no: " if converted.returncode else digest((tmp_path / "raw").read_bytes())
            told = {reader: word(rows()[DEVICES][reader]) for reader in readers}
            found = {reader: verdict_of(Sample(DEVICES, path), answer) for reader, answer in readers.items()}
            assert "yes" not in found.values()
            assert kind != "fullDevice" or found == told
        assert rows()[DEVICES]["read"] == "with `--allow-devices`"
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, errors="replace", check=False)


def copies(disks: list[Sample], folder: Path) -> list[Sample]:
    """Return the same samples in copies of their own, to be written to."""
    copied = []
    for number, sample in enumerate(disks):
        place = folder / str(number)
        shutil.copytree(sample.path.parent, place)
        copied.append(Sample(sample.row, place / sample.path.name, sample.expected, sample.variants, sample.write_at))
    return copied
