"""An operation is killed, a guest writes an image of it, then comes `recover`: is what the guest wrote still there?"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import CorruptChain, LockBusy, create_image, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.edit import commit, move, resize
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.ops.edit.remove import remove
from qemu_vmdk_snap.ops.journal.recover import recover
from qemu_vmdk_snap.storage.locks import lock_image

pytestmark = pytest.mark.needs("qemu-io")

MIB = 1 << 20
PIECE = 64 << 10


def write(path: Path, offset: int, what: bytes) -> None:
    with open_chain(path, writable=True) as chain:
        chain.write_at(offset, what * PIECE)


def guest_writes(path: Path, offset: int) -> None:
    """QEMU knows nothing of intent records."""
    words = ["qemu-io", "-f", "vmdk", "-c", f"write -P 0x57 {offset} 64k", str(path)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "failed" not in done.stdout + done.stderr


def killed_at(module: object, name: str, work: Callable[[], object]) -> None:
    """Do `work` in a process that dies where it would call `name`."""
    pid = os.fork()
    if not pid:
        try:
            setattr(module, name, lambda *_, **__: os._exit(9))
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    create_image(tmp_path / "b.vmdk", 16 * MIB, durable=False)
    write(tmp_path / "b.vmdk", 0, b"B")
    create_overlay(tmp_path / "t.vmdk", tmp_path / "b.vmdk", durable=False)
    write(tmp_path / "t.vmdk", MIB, b"T")
    create_overlay(tmp_path / "s.vmdk", tmp_path / "t.vmdk", durable=False)
    return tmp_path


CASES: dict[str, tuple[object, str, Callable[[Path], object], str]] = {
    "commit before it empties": (
        commit,
        "_clear",
        lambda at: commit.commit(at / "t.vmdk", keep_siblings=True),
        "t.vmdk",
    ),
    "commit before it deletes": (
        commit,
        "delete_files",
        lambda at: commit.commit(at / "s.vmdk", delete=True),
        "s.vmdk",
    ),
    "commit while it copies": (commit, "_copy", lambda at: commit.commit(at / "s.vmdk"), "s.vmdk"),
    "flatten": (move, "copy_differences", lambda at: rebase(at / "s.vmdk", None), "s.vmdk"),
    "remove": (move, "copy_differences", lambda at: remove(at / "t.vmdk"), "s.vmdk"),
    "resize": (resize, "_grow_file", lambda at: resize.resize(at / "s.vmdk", 64 << 30), "s.vmdk"),
}


@pytest.mark.parametrize("name", CASES)
def test_recover_takes_nothing_away_that_a_guest_wrote(tree: Path, name: str) -> None:
    module, function, work, written = CASES[name]
    killed_at(module, function, lambda: work(tree))
    guest_writes(tree / written, 2 * MIB)
    before = {path.name: path.read_bytes() for path in tree.glob("*.vmdk")}
    with pytest.raises(CorruptChain, match=r"was written .* after a .* was interrupted"):
        recover(tree)
    assert {path.name: path.read_bytes() for path in tree.glob("*.vmdk")} == before
    # Other images in the folder are not held up, and do not set the recovery off.
    create_image(tree / "other.vmdk", MIB, durable=False)
    assert main(["image", "resize", str(tree / "other.vmdk"), "2M"]) == 0
    assert {path.name: path.read_bytes() for path in tree.glob("[bst].vmdk")} == before
    with open_chain(tree / written, check_cids=False) as chain:
        assert chain.read_at(2 * MIB, PIECE) == b"\x57" * PIECE
    # The owner can decide to keep what is there.
    assert main(["recover", "--abandon", str(tree)]) == 0
    write(tree / written, 3 * MIB, b"on")


def test_without_a_writer_between_recover_finishes(tree: Path) -> None:
    module, function, work, _ = CASES["flatten"]
    killed_at(module, function, lambda: work(tree))
    assert [one.operation for one in recover(tree)] == ["rebase"]
    with open_chain(tree / "s.vmdk") as chain:
        assert chain.depth == 1
        assert chain.read_at(0, 1) + chain.read_at(MIB, 1) == b"BT"


def test_a_strange_record_holds_up_only_the_image_that_it_names(tree: Path) -> None:
    (tree / ".x.intent").write_bytes(b"rubbish")
    os.mkfifo(tree / ".y.intent")
    (tree / ".z.intent").mkdir()
    opened = set(Path("/proc/self/fd").iterdir())
    write(tree / "s.vmdk", 0, b"1")
    assert set(Path("/proc/self/fd").iterdir()) == opened
    (tree / ".s.vmdk.intent").write_bytes(b"rubbish")
    with pytest.raises(CorruptChain, match="the operation record is damaged"):
        write(tree / "s.vmdk", 0, b"2")


@pytest.mark.parametrize("name", ["remove", "commit"])
def test_recover_deletes_nothing_that_is_in_use(tree: Path, name: str) -> None:
    """What is to be deleted may have been opened after the kill, and not been written yet."""
    top, child = tree / "t.vmdk", tree / "s.vmdk"
    works: dict[str, Callable[[], object]] = {
        "remove": lambda: remove(top),
        "commit": lambda: commit.commit(top, delete=True),
    }
    with open_chain(child) as chain:
        expected = chain.read_at(0, chain.capacity)
    killed_at(move if name == "remove" else commit, "delete_files", works[name])
    with top.open("r+b") as held:
        lock_image(held.fileno(), top, writable=True)  # as QEMU does before its first write
        with pytest.raises(LockBusy):
            recover(tree)
        assert top.exists()
    assert [one.operation for one in recover(tree)] == [name]
    assert not top.exists()
    with open_chain(child) as chain:
        assert chain.read_at(0, chain.capacity) == expected
        assert [link.path.name for link in chain.links] == ["s.vmdk", "b.vmdk"]
