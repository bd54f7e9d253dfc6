"""A repair mends every planted fault, keeps what can be kept, and can be taken back to the byte."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import CidMismatch, FormatError, LockBusy, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.check.repair import RepairReport, repair, take_back
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader
from tests.support.tree import Tree

MIB = 1 << 20
GRAIN = 65536
SIZE = 40 * MIB  # two grain tables
STORED = (0, 1, 2, 5, 600)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path, SIZE)
    base = tree.base()
    for grain in STORED:
        tree.write(base, grain * GRAIN, bytes([grain % 251 + 1]) * GRAIN)
    return tree


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


class Tables:
    """Where the parts of an image are."""

    def __init__(self, path: Path) -> None:
        self.path, self.raw = path, path.read_bytes()
        header = SparseExtentHeader.parse(self.raw[:512], path=path)
        self.gd, self.rgd = header.gd_offset * 512, header.rgd_offset * 512

    def at(self, grain: int, *, redundant: bool = False) -> int:
        table, index = divmod(grain, 512)
        gde: int = struct.unpack_from("<I", self.raw, (self.rgd if redundant else self.gd) + 4 * table)[0]
        return gde * 512 + 4 * index

    def sector(self, grain: int) -> int:
        return int(struct.unpack_from("<I", self.raw, self.at(grain))[0])

    def set(self, grain: int, sector: int, *, primary: bool = True, redundant: bool = True) -> None:
        for wanted, other in ((primary, False), (redundant, True)):
            if wanted:
                put(self.path, self.at(grain, redundant=other), struct.pack("<I", sector))


def mend(tree: Tree, *, leaks_only: bool = False) -> RepairReport:
    return repair(tree.path("image-1"), resolver=confined(), leaks_only=leaks_only)


def forget_grain(tree: Tree, grain: int, *, of: str = "image-1") -> None:
    old = tree.model[of]
    tree.model[of] = old[: grain * GRAIN] + bytes(GRAIN) + old[(grain + 1) * GRAIN :]


def shared(tree: Tree, tables: Tables) -> None:
    tables.set(7, tables.sector(1))
    old = tree.model["image-1"]
    tree.model["image-1"] = old[: 7 * GRAIN] + old[GRAIN : 2 * GRAIN] + old[8 * GRAIN :]


def beyond_in_both(tree: Tree, tables: Tables) -> None:
    tables.set(5, 1 << 24)
    forget_grain(tree, 5)


def beyond_in_the_primary(tree: Tree, tables: Tables) -> None:
    tables.set(5, 1 << 24, redundant=False)


def metadata_in_the_primary(tree: Tree, tables: Tables) -> None:
    tables.set(5, 21, redundant=False)


def primary_forgot(tree: Tree, tables: Tables) -> None:
    tables.set(5, 0, redundant=False)


def redundant_forgot(tree: Tree, tables: Tables) -> None:
    tables.set(5, 0, primary=False)


def no_primary_table(tree: Tree, tables: Tables) -> None:
    put(tables.path, tables.gd + 4, bytes(4))


def no_table_at_all(tree: Tree, tables: Tables) -> None:
    put(tables.path, tables.gd + 4, bytes(4))
    put(tables.path, tables.rgd + 4, bytes(4))
    forget_grain(tree, 600)


def one_table_for_two(tree: Tree, tables: Tables) -> None:
    put(tables.path, tables.gd + 4, tables.raw[tables.gd : tables.gd + 4])


def redundant_table_beyond(tree: Tree, tables: Tables) -> None:
    put(tables.path, tables.rgd, struct.pack("<I", 0xFFFF_FF00))


def one_table_for_both_copies(tree: Tree, tables: Tables) -> None:
    put(tables.path, tables.gd + 4, tables.raw[tables.rgd + 4 : tables.rgd + 8])


def a_table_over_another(tree: Tree, tables: Tables) -> None:
    """Its first entries are the last of the table before it: what they name is stored, and means something else."""
    (first,) = struct.unpack_from("<I", tables.raw, tables.gd)
    put(tables.path, tables.gd + 4, struct.pack("<I", first - 1))


def a_table_over_the_header(tree: Tree, tables: Tables) -> None:
    put(tables.path, tables.gd, bytes(4))
    put(tables.path, tables.rgd, struct.pack("<I", 1))
    for grain in (0, 1, 2, 5):
        forget_grain(tree, grain)


def lost_directory(tree: Tree, tables: Tables) -> None:
    put(tables.path, 56, struct.pack("<Q", 1 << 40))


def no_redundant_directory(tree: Tree, tables: Tables) -> None:
    put(tables.path, 48, struct.pack("<Q", 1 << 20))


def header(tree: Tree, tables: Tables) -> None:
    put(tables.path, 72, b"\1\n \n\n")


def leaked(tree: Tree, tables: Tables) -> None:
    tables.set(0, 0)
    tables.set(2, 0)
    forget_grain(tree, 0)
    forget_grain(tree, 2)


def beyond_in_both_and_more_behind(tree: Tree, tables: Tables) -> None:
    """The grain that nothing names any more is in front of others, which move into its place."""
    beyond_in_both(tree, tables)
    shared(tree, tables)


def cut_short(tree: Tree, tables: Tables) -> None:
    """The last grain in the file has lost its end, which reads as zeros from then on, and does so when mended."""
    last = max(STORED, key=tables.sector)
    with tables.path.open("r+b") as file:
        file.truncate(tables.sector(last) * 512 + GRAIN - 1000)
    end = last * GRAIN + GRAIN
    old = tree.model["image-1"]
    tree.model["image-1"] = old[: end - 1000] + bytes(1000) + old[end:]


FAULTS = [
    cut_short,
    beyond_in_both_and_more_behind,
    shared,
    beyond_in_both,
    beyond_in_the_primary,
    metadata_in_the_primary,
    primary_forgot,
    redundant_forgot,
    no_primary_table,
    no_table_at_all,
    one_table_for_two,
    redundant_table_beyond,
    one_table_for_both_copies,
    a_table_over_another,
    a_table_over_the_header,
    lost_directory,
    no_redundant_directory,
    header,
    leaked,
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_mended_and_taken_back(tree: Tree, fault: Callable[[Tree, Tables], None]) -> None:
    path = tree.path("image-1")
    fault(tree, Tables(path))
    broken = path.read_bytes()
    report = mend(tree)
    assert report.before.corruptions + report.before.leaks + report.before.repairable > 0
    assert report.undo == path.with_name("image-1.vmdk.undo")
    mended = path.read_bytes()
    away = report.undo.rename(tree.folder.parent / "undo")
    tree.verify()
    assert mend(tree).undo is None
    take_back(away.rename(report.undo))
    report.undo.unlink()
    # What a damaged entry has named may lie where nothing does: it comes back too. Only leaks alone may be gone.
    assert len(path.read_bytes()) == len(broken)
    assert path.read_bytes() == broken or not report.before.corruptions + report.before.repairable
    assert mend(tree).undo is not None
    report.undo.unlink()
    assert path.read_bytes() == mended
    tree.verify()


def test_zeros_over_a_parent_are_told_from_the_copy_that_is_left(tmp_path: Path) -> None:
    tree = Tree(tmp_path, SIZE)
    top = tree.base()
    tree.write(top, 0, b"below" * GRAIN)
    top = tree.overlay(top, grain=GRAIN, zeroed=True)
    tables = Tables(tree.path(top))
    tables.set(1, 1)
    forget_grain(tree, 1, of=top)
    put(tree.path(top), tables.gd, bytes(4))
    undo = repair(tree.path(top), resolver=confined()).undo
    assert undo is not None
    undo.unlink()
    tree.verify()


def test_what_names_no_directory_is_told_with_its_place(tree: Tree) -> None:
    put(tree.path("image-1"), 48, struct.pack("<QQ", 1, 1))
    before = tree.path("image-1").read_bytes()
    with pytest.raises(FormatError, match="byte 0x38: gd_offset = 1: must name a grain directory"):
        mend(tree)
    assert tree.path("image-1").read_bytes() == before


def test_everything_at_once(tree: Tree) -> None:
    path = tree.path("image-1")
    tables = Tables(path)
    for fault in (shared, beyond_in_the_primary, header):
        fault(tree, tables)
    tables.set(2, 0)
    forget_grain(tree, 2)
    report = mend(tree)
    assert (report.after.corruptions, report.after.leaks) == (0, 0)
    assert report.undo is not None
    report.undo.unlink()
    tree.verify()


def test_leaks_only(tree: Tree) -> None:
    path = tree.path("image-1")
    leaked(tree, Tables(path))
    before = path.stat().st_size
    report = mend(tree, leaks_only=True)
    assert (report.before.leaks, report.after.leaks) == (2, 0)
    assert path.stat().st_size == before - 2 * GRAIN
    assert report.undo is not None
    report.undo.unlink()
    tree.verify()


def test_leaks_only_leaves_a_corrupt_image_alone(tree: Tree) -> None:
    path = tree.path("image-1")
    tables = Tables(path)
    leaked(tree, tables)
    put(path, 72, b"\1")
    before = path.read_bytes()
    assert mend(tree, leaks_only=True).undo is None
    assert path.read_bytes() == before


def test_cids_only_when_asked(tree: Tree) -> None:
    top = tree.overlay("image-1")
    tree.write(top, 0, b"x")
    tree.model[top] = tree.model[top][:GRAIN] + b"y" + tree.model[top][GRAIN + 1 :]
    with open_chain(tree.path("image-1"), writable=True) as chain:
        chain.write_at(GRAIN, b"y")
    tree.model["image-1"] = tree.read("image-1")
    path = tree.path(top)
    assert repair(path, resolver=confined()).undo is None
    with pytest.raises(CidMismatch):
        open_chain(path)
    report = repair(path, resolver=confined(), relink_cids=True)
    assert report.undo is not None
    report.undo.unlink()
    tree.verify()


def test_refusals(tree: Tree) -> None:
    path = tree.path("image-1")
    put(path, 72, b"\1")
    with open_chain(path), pytest.raises(LockBusy):
        mend(tree)
    path.with_name("image-1.vmdk.undo").write_bytes(b"")
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        mend(tree)
    assert path.read_bytes() == before


def test_command(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, undo = str(tree.path("image-1")), str(tmp_path.parent / f"{tmp_path.name}.undo")
    put(tree.path("image-1"), 72, b"\1")
    assert main(["image", "check", "-r", "all", "--undo-file", undo, path]) == 0
    out = capsys.readouterr().out
    assert "    0 leaked clusters\n    1 corruptions\n" in out
    assert "No errors were found on the image." in out
    tree.verify()
    assert main(["image", "check", "-q", "--take-back", undo, path]) == 2
