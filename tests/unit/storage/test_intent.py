"""An intent record is whole or absent, is found from every folder it concerns, and is followed for its owner alone."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from qemu_vmdk_snap import CorruptChain, create_image, open_chain
from qemu_vmdk_snap.ops.journal.recover import recover
from qemu_vmdk_snap.storage.intent import Intent, make_intent, pending_in, refuse_pending, sweep


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("top", "base"):
        (tmp_path / name).mkdir()
        create_image(tmp_path / name / "disk.vmdk", 1 << 20, durable=False)
    return tmp_path / "top", tmp_path / "base"


def begun(folders: tuple[Path, Path]) -> Intent:
    top, base = folders
    intent = make_intent("commit", top / "disk.vmdk", [base / "disk.vmdk"], {"stage": "copy"})
    intent.begin()
    return intent


def test_found_from_every_folder_until_it_ends(folders: tuple[Path, Path]) -> None:
    intent = begun(folders)
    for folder in folders:
        assert pending_in(folder) == [intent]
        with pytest.raises(CorruptChain, match="an interrupted commit is not finished yet"):
            refuse_pending(folder / "disk.vmdk")
    changed = intent.update(stage="finish")
    assert [one.details for one in pending_in(folders[1])] == [{"stage": "finish"}]
    changed.end()
    for folder in folders:
        assert pending_in(folder) == []
        assert [path.name for path in folder.iterdir()] == ["disk.vmdk"]


def test_writers_are_refused_and_readers_are_not(folders: tuple[Path, Path]) -> None:
    begun(folders)
    for folder in folders:
        with pytest.raises(CorruptChain, match="run `recover"):
            open_chain(folder / "disk.vmdk", writable=True)
        open_chain(folder / "disk.vmdk").close()


def test_a_pointer_whose_record_is_gone_says_nothing(folders: tuple[Path, Path]) -> None:
    begun(folders).path.unlink()
    assert pending_in(folders[1]) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "operation": "commit"}'])
def test_what_cannot_be_read_is_named(folders: tuple[Path, Path], text: str) -> None:
    intent = begun(folders)
    intent.path.write_text(text)
    with pytest.raises(CorruptChain, match="cannot be read"):
        pending_in(folders[0])


def test_a_record_that_others_may_write_is_not_followed(folders: tuple[Path, Path]) -> None:
    intent = begun(folders)
    intent.path.chmod(0o666)
    with pytest.raises(CorruptChain, match="not followed"):
        recover(folders[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_record_is_not_followed(folders: tuple[Path, Path]) -> None:
    intent = begun(folders)
    os.chown(intent.path, 12345, 12345)
    with pytest.raises(CorruptChain, match="another user's"):
        recover(folders[0])


def test_a_link_is_not_followed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    intent = begun(folders)
    intent.path.rename(tmp_path / "elsewhere")
    intent.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        pending_in(folders[0])


def test_an_operation_of_a_later_version_is_left_alone(folders: tuple[Path, Path]) -> None:
    intent = begun(folders)
    record = json.loads(intent.path.read_text())
    intent.path.write_text(json.dumps(record | {"operation": "transmogrify"}))
    with pytest.raises(CorruptChain, match="'transmogrify' is not known"):
        recover(folders[0])
    assert intent.path.exists()


def test_a_record_that_finds_no_room_leaves_nothing(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = set(folders[0].iterdir())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make_intent("resize", folders[0] / "a.vmdk", [], {}).begin()
    assert set(folders[0].iterdir()) == before


def test_drafts_are_swept(folders: tuple[Path, Path]) -> None:
    draft = folders[0] / ".other.vmdk.intent.new"
    draft.write_text("{")
    sweep(folders[0])
    assert not draft.exists()
    assert recover(folders[0]) == []
