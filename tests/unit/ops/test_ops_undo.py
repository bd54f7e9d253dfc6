"""An undo file is followed only where all is as the repair left it; else one line says why, and nothing changes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import CorruptChain, LockBusy, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.check.repair import finish_repair, repair, take_back
from qemu_vmdk_snap.ops.journal.recover import recover
from qemu_vmdk_snap.storage.blockfile import open_posix
from qemu_vmdk_snap.storage.journal.record import Operation, make_operation, pending_in
from qemu_vmdk_snap.storage.locks import lock_image

SIZE = 4 << 20


class Repaired:
    """An image that was repaired: before, after, and its undo file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / "disk.vmdk"
        create_image(self.path, SIZE, durable=False)
        with open_chain(self.path, writable=True) as chain:
            chain.write_at(0, b"kept" * 50_000)
        with self.path.open("r+b") as file:
            file.seek(72)
            file.write(b"\1")  # not closed cleanly
            file.seek(0, os.SEEK_END)
            file.write(b"leaked" * 30_000)
        self.before = self.path.read_bytes()
        undo = repair(self.path, resolver=confined()).undo
        assert undo is not None
        self.undo = undo
        self.after = self.path.read_bytes()
        assert len(self.after) < len(self.before)

    def change_head(self, change: Callable[[dict[str, object], dict[str, object]], None]) -> None:
        """Change the head of the undo file, under a checksum that fits."""
        raw = self.undo.read_bytes()[:-32]
        line, _, rest = raw.partition(b"\n")
        head = json.loads(line)
        change(head, head["files"][0])
        self.store(json.dumps(head).encode() + b"\n" + rest)

    def store(self, raw: bytes) -> None:
        self.undo.write_bytes(raw + hashlib.sha256(raw).digest())

    def refused(self, reason: str, **keywords: object) -> None:
        """Assert that nothing is taken back, for `reason`."""
        now = self.path.read_bytes()
        with pytest.raises(CorruptChain, match=reason) as caught:
            take_back(self.undo, **keywords)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert self.path.read_bytes() == now
        assert pending_in(self.path.parent) == []


@pytest.fixture
def repaired(tmp_path: Path) -> Repaired:
    return Repaired(tmp_path / "images")


def test_taken_back_twice(repaired: Repaired) -> None:
    take_back(repaired.undo)
    assert repaired.path.read_bytes() == repaired.before
    repaired.refused(f"has {len(repaired.before)} bytes, not the {len(repaired.after)} that the repair left")


def test_after_a_write_of_the_same_length(repaired: Repaired) -> None:
    with open_chain(repaired.path, writable=True) as chain:
        chain.write_at(0, b"new")
    assert repaired.path.stat().st_size == len(repaired.after)
    repaired.refused("has the CID [0-9a-f]{8}, not the [0-9a-f]{8} that the repair left: written since")


def test_after_a_write_of_a_new_grain(repaired: Repaired) -> None:
    with open_chain(repaired.path, writable=True) as chain:
        chain.write_at(2 << 20, b"new")
    repaired.refused("written since")
    assert main(["image", "check", "-q", "--take-back", str(repaired.undo), str(repaired.path)]) == 1


def test_another_file_of_the_name(repaired: Repaired) -> None:
    copy = repaired.path.with_name("copy")
    shutil.copyfile(repaired.path, copy)
    copy.replace(repaired.path)
    repaired.refused("is not the file that was repaired")


def test_a_moved_folder_is_followed(repaired: Repaired, tmp_path: Path) -> None:
    (tmp_path / "images").rename(tmp_path / "moved")
    take_back(tmp_path / "moved" / "disk.vmdk.undo")
    assert (tmp_path / "moved" / "disk.vmdk").read_bytes() == repaired.before


def test_a_copied_folder_changes_neither(repaired: Repaired, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    with pytest.raises(CorruptChain, match="is not the file that was repaired"):
        take_back(tmp_path / "copy" / "disk.vmdk.undo")
    assert repaired.path.read_bytes() == repaired.after == (tmp_path / "copy" / "disk.vmdk").read_bytes()


def test_in_another_folder_only_where_that_is_allowed(repaired: Repaired, tmp_path: Path) -> None:
    take_back(repaired.undo)
    repaired.undo.unlink()
    away = tmp_path / "away.undo"
    repair(repaired.path, resolver=confined(), undo=away)
    repaired.undo = away
    repaired.refused("is outside its folder: allow")
    take_back(away, trusted_dirs=[repaired.path.parent])
    assert repaired.path.read_bytes() == repaired.before


def test_the_command_allows_the_folder_of_the_image(repaired: Repaired, tmp_path: Path) -> None:
    take_back(repaired.undo)
    away = str(tmp_path / "away.undo")
    assert main(["image", "check", "-q", "-r", "all", "--undo-file", away, str(repaired.path)]) == 0
    assert main(["image", "check", "-q", "--take-back", away, str(repaired.path)]) == 2
    assert repaired.path.read_bytes() == repaired.before


def test_a_symbolic_link_is_not_followed(repaired: Repaired) -> None:
    target = repaired.undo.rename(repaired.undo.with_name("target"))
    repaired.undo.symlink_to(target)
    repaired.refused("is a symbolic link: not followed")


def test_what_is_no_regular_file(repaired: Repaired) -> None:
    repaired.undo.unlink()
    os.mkfifo(repaired.undo)
    repaired.refused("not a regular file")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_what_others_may_write(repaired: Repaired, mode: int) -> None:
    repaired.undo.chmod(mode)
    repaired.refused("may be written by others: not followed")


def test_what_another_user_owns(repaired: Repaired, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: repaired.undo.stat().st_uid + 1)
    with pytest.raises(CorruptChain, match="is another user's"):
        take_back(repaired.undo)
    assert repaired.path.read_bytes() == repaired.after


def test_a_name_that_leads_elsewhere(repaired: Repaired, tmp_path: Path) -> None:
    victim = tmp_path / "victim.vmdk"
    victim.write_bytes(repaired.after)

    def climb(head: dict[str, object], one: dict[str, object]) -> None:
        one |= {"name": "../victim.vmdk", "inode": victim.stat().st_ino}

    repaired.change_head(climb)
    repaired.refused("its image .*victim.vmdk is outside its folder", opener=lambda *_: pytest.fail("opened"))
    repaired.change_head(lambda head, one: one.update(name=str(victim)))
    repaired.refused("is not an undo file: ValueError")
    repaired.change_head(lambda head, one: one.update(name="link.vmdk"))
    repaired.path.with_name("link.vmdk").symlink_to(victim)
    repaired.refused("is outside its folder", opener=lambda *_: pytest.fail("opened"))
    assert victim.read_bytes() == repaired.after


def test_what_is_no_image(repaired: Repaired) -> None:
    other = repaired.path.with_name("notes.txt")
    other.write_bytes(b"text" * 100_000)

    def rename(head: dict[str, object], one: dict[str, object]) -> None:
        one |= {"name": other.name, "inode": other.stat().st_ino}

    repaired.change_head(rename)
    repaired.refused("is not a VMDK image")
    assert other.read_bytes() == b"text" * 100_000


def test_an_undo_file_of_the_first_version(repaired: Repaired) -> None:
    head = {"version": 1, "files": [{"path": str(repaired.path), "size": 4, "ranges": [[0, 4]]}]}
    repaired.store(json.dumps(head).encode() + b"\nKDMV")
    repaired.refused("is not an undo file: ValueError: 'version 1 is not 2'")


def test_while_the_image_is_in_use(repaired: Repaired) -> None:
    with open_chain(repaired.path), pytest.raises(LockBusy):
        take_back(repaired.undo)
    assert repaired.path.read_bytes() == repaired.after


def test_while_another_operation_is_pending(repaired: Repaired) -> None:
    operation = make_operation("commit", repaired.path, [repaired.path], {})
    with operation.hold:
        operation.begin()
    with pytest.raises(CorruptChain, match="an interrupted commit is not finished"):
        take_back(repaired.undo)
    assert repaired.path.read_bytes() == repaired.after


def begun(repaired: Repaired, undo: object) -> Operation:
    operation = make_operation("repair", repaired.path, [repaired.path], {"undo": undo})
    with operation.hold:
        operation.begin()
    return operation


def test_a_record_without_its_undo_file_was_taken_back(repaired: Repaired) -> None:
    """As a kill leaves it between the last two steps of taking back."""
    begun(repaired, repaired.undo)
    repaired.undo.unlink()
    assert [one.operation for one in recover(repaired.path.parent)] == ["repair"]
    assert repaired.path.read_bytes() == repaired.after
    assert pending_in(repaired.path.parent) == []


def test_a_record_is_followed_to_no_other_folder(repaired: Repaired, tmp_path: Path) -> None:
    planted = tmp_path / "x.undo"
    shutil.copyfile(repaired.undo, planted)
    begun(repaired, planted)
    with pytest.raises(CorruptChain, match="outside its folder"):
        recover(repaired.path.parent)
    assert planted.exists()
    assert repaired.path.read_bytes() == repaired.after


@pytest.mark.parametrize("undo", ["disk.vmdk.undo", "", 5, None, ["x"]])
def test_a_record_that_names_no_undo_file(repaired: Repaired, undo: object) -> None:
    begun(repaired, undo)
    with pytest.raises(CorruptChain, match="the operation record names no undo file"):
        recover(repaired.path.parent)
    assert repaired.path.read_bytes() == repaired.after


def test_a_record_of_other_images_is_not_followed(repaired: Repaired) -> None:
    other = repaired.path.with_name("other.vmdk")
    create_image(other, SIZE, durable=False)
    operation = make_operation("repair", other, [other], {"undo": repaired.undo})
    with pytest.raises(CorruptChain, match=r"does not name .*disk.vmdk"):
        finish_repair(operation, open_posix)
    assert repaired.path.read_bytes() == repaired.after
    assert repaired.undo.exists()


def chain_of(folder: Path, links: int) -> list[Path]:
    """Return a chain, base first, whose every link but the top was written after its overlay was made."""
    paths = [folder / f"link-{number}.vmdk" for number in range(links)]
    create_image(paths[0], SIZE, durable=False)
    for parent, path in itertools.pairwise(paths):
        create_overlay(path, parent, durable=False)
    for path in paths[:-1]:
        raw = path.read_bytes()
        at = raw.index(b"\nCID=") + 5
        path.write_bytes(raw[:at] + b"0badcaf%d" % paths.index(path) + raw[at + 8 :])
    return paths


def test_every_link_is_relinked_and_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = chain_of(tmp_path, 4)
    before = [path.read_bytes() for path in paths]
    assert main(["image", "check", "-q", str(paths[-1])]) == 2
    assert main(["image", "check", "-r", "all", "--relink-cids", str(paths[-1])]) == 0
    shown = capsys.readouterr()
    for path in paths[1:]:
        assert f"{path}: parentCID is now the CID of its parent." in shown.out
    open_chain(paths[-1]).close()
    assert paths[0].read_bytes() == before[0]
    take_back(tmp_path / f"{paths[-1].name}.undo")
    assert [path.read_bytes() for path in paths] == before


def test_a_link_further_down_alone_is_relinked(tmp_path: Path) -> None:
    paths = chain_of(tmp_path, 3)
    assert repair(paths[1], resolver=confined(), relink_cids=True).relinked == (paths[1],)
    (tmp_path / "link-1.vmdk.undo").unlink()
    before = paths[0].read_bytes(), paths[1].read_bytes()
    assert repair(paths[2], resolver=confined(), relink_cids=True).relinked == (paths[2],)
    assert (paths[0].read_bytes(), paths[1].read_bytes()) == before
    open_chain(paths[2]).close()


@pytest.mark.parametrize("busy", [0, 1, 2])
def test_relinking_needs_every_lock(tmp_path: Path, busy: int) -> None:
    paths = chain_of(tmp_path, 3)
    before = [path.read_bytes() for path in paths]
    with contextlib.closing(open_posix(paths[busy], True)) as held:
        lock_image(held.fileno() or 0, paths[busy], writable=True)
        with pytest.raises(LockBusy):
            repair(paths[2], resolver=confined(), relink_cids=True)
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--relink-cids"], "--relink-cids is ignored: it changes images, and needs -r all"),
        (["--relink-cids", "-r", "leaks"], "--relink-cids is ignored: it changes images, and needs -r all"),
        (["--relink-cids", "-r", "all"], "--relink-cids is ignored: the parentCID of every link is the CID"),
    ],
)
def test_it_is_said_that_relinking_is_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    create_image(tmp_path / "disk.vmdk", SIZE, durable=False)
    create_overlay(tmp_path / "top.vmdk", tmp_path / "disk.vmdk", durable=False)
    assert main(["image", "check", *options, str(tmp_path / "top.vmdk")]) == 0
    assert message in capsys.readouterr().err
