"""An operation record is whole or absent, is found from all its folders, and is followed only where it fits."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import CorruptChain, LockBusy, create_image, open_chain
from qemu_vmdk_snap.ops.journal.recover import give_up, recover
from qemu_vmdk_snap.storage.journal.record import (
    Operation,
    make_operation,
    pending_in,
    record_path,
    refuse_pending,
    sweep,
    taking_over,
)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("top", "base"):
        (tmp_path / name).mkdir()
        create_image(tmp_path / name / "disk.vmdk", 1 << 20, durable=False)
    return tmp_path / "top", tmp_path / "base"


def begun(folders: tuple[Path, Path]) -> Operation:
    """Return an operation that has begun, and whose process has died since."""
    top, base = folders
    operation = make_operation("commit", top / "disk.vmdk", [base / "disk.vmdk"], {"stage": "copy", "base": base / "x"})
    operation.begin()
    operation.hold.close()
    return operation


def test_found_from_every_folder_until_it_ends(folders: tuple[Path, Path]) -> None:
    operation = begun(folders)
    for folder in folders:
        (pending,) = pending_in(folder, allowed=folders)
        assert (pending.operation, pending.problem, pending.path) == (operation, None, operation.path)
        with pytest.raises(CorruptChain, match=r"run `recover|allow .*--allow-dir"):
            refuse_pending(folder / "disk.vmdk")
    changed = operation.update(stage="finish")
    (pending,) = pending_in(folders[1], allowed=folders)
    assert pending.operation is not None
    assert pending.operation.details == {"stage": "finish", "base": folders[1] / "x"}
    changed.end()
    for folder in folders:
        assert pending_in(folder) == []
        assert [path.name for path in folder.iterdir()] == ["disk.vmdk"]


def test_writers_are_refused_and_readers_are_not(folders: tuple[Path, Path]) -> None:
    begun(folders)
    for folder in folders:
        with pytest.raises(CorruptChain, match=r"to finish the operation|is not finished: run"):
            open_chain(folder / "disk.vmdk", writable=True)
        open_chain(folder / "disk.vmdk").close()


def test_a_running_operation_is_left_alone(folders: tuple[Path, Path]) -> None:
    operation = begun(folders)
    operation.begin()
    with operation.hold, pytest.raises(LockBusy, match="record"):
        recover(folders[0], trusted_dirs=folders)
    with pytest.raises(LockBusy), operation.update(stage="finish").hold:
        give_up(folders[0])
    assert operation.path.exists()
    assert [one.operation for one in give_up(folders[0])] == ["commit"]
    assert not operation.path.exists()


def test_a_record_moves_with_its_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    operation = make_operation("resize", folders[0] / "disk.vmdk", [], {"file": folders[0] / "disk.vmdk"})
    operation.begin()
    operation.hold.close()
    folders[0].rename(tmp_path / "moved")
    (pending,) = pending_in(tmp_path / "moved")
    assert pending.problem is None
    assert pending.operation is not None
    assert pending.operation.details["file"] == tmp_path / "moved" / "disk.vmdk"


def test_a_copied_record_fits_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    operation = make_operation("resize", folders[0] / "disk.vmdk", [], {"file": folders[0] / "disk.vmdk"})
    operation.begin()
    operation.hold.close()
    before = (folders[0] / "disk.vmdk").read_bytes()
    shutil.copytree(folders[0], tmp_path / "copy")
    with pytest.raises(CorruptChain, match=r"names .*copy/disk\.vmdk.*--abandon"):
        recover(tmp_path / "copy")
    with pytest.raises(CorruptChain, match="is another file now"):
        refuse_pending(tmp_path / "copy" / "disk.vmdk")
    create_image(tmp_path / "copy" / "other.vmdk", 1 << 20, durable=False)
    open_chain(tmp_path / "copy" / "other.vmdk", writable=True).close()
    assert (folders[0] / "disk.vmdk").read_bytes() == before
    assert [one.image.name for one in give_up(tmp_path / "copy")] == ["disk.vmdk"]
    refuse_pending(tmp_path / "copy" / "disk.vmdk")
    assert operation.path.exists()


def test_other_folders_are_written_where_they_are_allowed(folders: tuple[Path, Path]) -> None:
    begun(folders)
    with pytest.raises(CorruptChain, match=r"names .*base/.*, outside its folder: allow .*base \(--allow-dir\)"):
        recover(folders[0])


def planted(folder: Path, files: list[dict[str, object]], **more: object) -> Path:
    record = {"version": 2, "operation": "remove", "image": {"$file": 0}, "images": [{"$file": 0}], "files": files}
    path = record_path(folder / "disk.vmdk")
    path.write_text(json.dumps(record | {"details": {"changes": [], "targets": [], "delete": []}} | more))
    path.chmod(0o600)
    return path


def told(folder: Path, name: str = "disk.vmdk") -> dict[str, object]:
    return {"name": name, "inode": (folder / name).stat().st_ino, "same-device": True}


def test_a_planted_record_deletes_nothing_outside(folders: tuple[Path, Path], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    inode = victim.stat().st_ino
    for name in ("../victim", str(victim)):
        files: list[dict[str, object]] = [told(folders[0]), {"name": name, "inode": inode, "same-device": True}]
        planted(folders[0], files, details={"changes": [], "targets": [], "delete": [{"$file": 1}], "cids": []})
        with pytest.raises(CorruptChain, match="outside its folder"):
            recover(folders[0])
    (folders[0] / "link").symlink_to(victim)
    files = [told(folders[0]), told(folders[0], "link")]
    planted(folders[0], files, details={"changes": [], "targets": [], "delete": [{"$file": 1}], "cids": []})
    with pytest.raises(CorruptChain, match="is another file now"):
        recover(folders[0])
    assert victim.read_text() == "precious"


def test_what_is_there_only_now_is_not_the_recorded_file(folders: tuple[Path, Path]) -> None:
    (folders[0] / "new").write_text("mine")
    files: list[dict[str, object]] = [told(folders[0]), {"name": "new", "inode": None, "same-device": True}]
    planted(folders[0], files, details={"changes": [], "targets": [], "delete": [{"$file": 1}], "cids": []})
    with pytest.raises(CorruptChain, match="is another file now"):
        recover(folders[0])
    assert (folders[0] / "new").exists()


def test_a_pointer_whose_record_is_gone_says_nothing(folders: tuple[Path, Path]) -> None:
    begun(folders).path.unlink()
    assert pending_in(folders[1]) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"version": 2}', '{"version": 2, "files": 3}', "[" * 100000])
def test_what_cannot_be_read_is_named_and_holds_up_its_own_image_alone(folders: tuple[Path, Path], text: str) -> None:
    operation = begun(folders)
    operation.path.write_text(text)
    create_image(folders[0] / "other.vmdk", 1 << 20, durable=False)
    open_chain(folders[0] / "other.vmdk", writable=True).close()
    with pytest.raises(CorruptChain, match=r"\.disk\.vmdk\.intent: the operation record is damaged"):
        open_chain(folders[0] / "disk.vmdk", writable=True)
    with pytest.raises(CorruptChain, match="damaged"):
        recover(folders[0])


def test_a_record_that_others_may_write_is_not_followed(folders: tuple[Path, Path]) -> None:
    operation = begun(folders)
    operation.path.chmod(0o666)
    with pytest.raises(CorruptChain, match="not followed"):
        recover(folders[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_record_is_not_followed(folders: tuple[Path, Path]) -> None:
    operation = begun(folders)
    os.chown(operation.path, 12345, 12345)
    with pytest.raises(CorruptChain, match="another user's"):
        recover(folders[0])


def test_a_link_is_not_followed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    operation = begun(folders)
    operation.path.rename(tmp_path / "elsewhere")
    operation.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptChain, match="symbolic links"):
        recover(folders[0])


def test_an_operation_of_a_later_version_is_left_alone(folders: tuple[Path, Path]) -> None:
    path = planted(folders[0], [told(folders[0])], operation="transmogrify")
    with pytest.raises(CorruptChain, match="'transmogrify' is not known"):
        recover(folders[0])
    assert path.exists()
    planted(folders[0], [told(folders[0])], version=3)
    with pytest.raises(CorruptChain, match="has version 3, not 2"):
        recover(folders[0])


def test_one_that_cannot_be_finished_does_not_keep_the_others_from_it(folders: tuple[Path, Path]) -> None:
    planted(folders[0], [told(folders[0])], operation="transmogrify")
    create_image(folders[0] / "zzz.vmdk", 1 << 20, durable=False)
    draft = make_operation("remove", folders[0] / "zzz.vmdk", [], {"changes": [], "targets": [], "delete": []})
    draft.begin()
    draft.hold.close()
    with pytest.raises(CorruptChain, match="transmogrify"):
        recover(folders[0])
    assert not draft.path.exists()


def test_a_record_that_finds_no_room_leaves_nothing(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before, opened = set(folders[0].iterdir()), set(Path("/proc/self/fd").iterdir())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        make_operation("resize", folders[0] / "a.vmdk", [], {}).begin()
    assert Path(raised.value.filename).parent == folders[0]
    assert set(folders[0].iterdir()) == before
    assert set(Path("/proc/self/fd").iterdir()) == opened


def test_drafts_are_swept(folders: tuple[Path, Path]) -> None:
    draft = folders[0] / ".other.vmdk.intent.new"
    draft.write_text("{")
    sweep(folders[0])
    assert not draft.exists()
    assert recover(folders[0]) == []


@pytest.mark.parametrize("name", ["磁盘" * 38 + ".vmdk", "x" * 250, "a\nb.vmdk"])
def test_any_name_has_a_record(tmp_path: Path, name: str) -> None:
    image = tmp_path / name
    image.write_bytes(b"")
    operation = make_operation("remove", image, [], {})
    operation.begin()
    with pytest.raises(CorruptChain, match="not finished"):
        refuse_pending(image)
    operation.end()


def test_taking_over_gives_none_for_what_has_ended(folders: tuple[Path, Path]) -> None:
    operation = begun(folders)
    (pending,) = pending_in(folders[0], allowed=folders)
    operation.end()
    with taking_over(pending, allowed=folders) as again:
        assert again is None


def damaged_details() -> list[Callable[[dict[str, object]], object]]:
    return [lambda d: d.clear(), lambda d: d.update(changes=3), lambda d: d.update(changes=[{}], targets=[None])]


@pytest.mark.parametrize("damage", damaged_details())
def test_details_that_an_operation_does_not_write_are_one_typed_error(
    folders: tuple[Path, Path], damage: Callable[[dict[str, object]], object]
) -> None:
    details: dict[str, object] = {"changes": [], "targets": [], "delete": []}
    damage(details)
    planted(folders[0], [told(folders[0])], details=details)
    with pytest.raises(CorruptChain, match="damaged"):
        recover(folders[0])
