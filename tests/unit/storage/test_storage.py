"""Do new files appear whole or not at all, do copies copy by every way, and do locks exclude?"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from qemu_vmdk_snap.errors import LockBusy
from qemu_vmdk_snap.storage import blockfile, copying, durable
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.storage.copying import Copier
from qemu_vmdk_snap.storage.durable import NewFiles, new_file, publish, replace_file
from qemu_vmdk_snap.storage.locks import lock_image
from tests.support.crash.recording import RecordingFile

PRECIOUS = b"precious"


class Stop(Exception):
    pass


def test_a_new_file_appears_complete(tmp_path: Path) -> None:
    with new_file(tmp_path / "a") as file:
        file.write_at(3, b"content")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"\0\0\0content"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_new_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_file(tmp_path / "a") as file:
            file.write_at(0, b"half")
            raise Stop

    with pytest.raises(Stop):
        fail()
    assert not list(tmp_path.iterdir())


def test_an_interruption_as_soon_as_a_file_is_there_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def struck(path: Path, flags: int, *rest: int) -> int:
        fd = real(path, flags, *rest)
        if flags & os.O_CREAT:
            os.close(fd)
            raise KeyboardInterrupt
        return fd

    monkeypatch.setattr(os, "open", struck)
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a"):
        pass
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "a", b"new")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_removed_the_first_error_is_told_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def read_only(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest)

    def kept(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    opened = set(Path("/proc/self/fd").iterdir())
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(Path, "unlink", kept)
    with pytest.raises(OSError, match="Read-only file system") as caught, new_file(tmp_path / "a"):
        pass
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="Read-only file system"):
        replace_file(tmp_path / "a", b"new")
    assert set(Path("/proc/self/fd").iterdir()) == opened


def test_what_a_full_disk_did_not_take_is_named_as_the_user_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, *_rest: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source").write_bytes(PRECIOUS)
    source = PosixFile.open(tmp_path / "source")

    def fill() -> None:
        with new_file(tmp_path / "a") as file:
            Copier(file).copy(source, 0, 0, len(PRECIOUS), lambda _: None)
            file.write_at(0, PRECIOUS)
            file.truncate(1)
            file.flush()

    def full_behind(*_arguments: int) -> int:
        return errno.ENOSPC

    monkeypatch.setattr(copying, "_WRITE_BACK_STEP", 1)
    monkeypatch.setattr(copying, "_KEPT_STEPS", 0)
    calls = [(os, name, full) for name in ("copy_file_range", "pwrite", "ftruncate", "fdatasync", "fsync")]
    for owner, name, failure in [*calls, (blockfile, "_sync_file_range", full_behind)]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failure)
            with pytest.raises(OSError, match="No space left") as caught:
                fill()
        assert caught.value.filename == str(tmp_path / "a"), name
    source.close()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def race() -> None:
        with NewFiles() as files:
            files.add(tmp_path / "first").write_at(0, b"ours")
            files.add(tmp_path / "second")
            (tmp_path / "second").write_bytes(PRECIOUS)

    with pytest.raises(FileExistsError):
        race()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"second": PRECIOUS}


def test_without_hard_links_a_taken_name_is_not_overwritten_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    with new_file(tmp_path / "a") as file:
        file.write_at(0, b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    (tmp_path / "t").write_bytes(b"new")
    with pytest.raises(FileExistsError):
        publish(tmp_path / "t", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert (tmp_path / "t").read_bytes() == b"new"


def test_the_barriers_of_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: steps.append("sync " + Path(f"/proc/self/fd/{fd}").readlink().name))
    link = durable._link

    def note_and_link(temporary: Path, path: Path) -> None:
        steps.append("link")
        link(temporary, path)

    monkeypatch.setattr(durable, "_link", note_and_link)
    with new_file(tmp_path / "a"):
        pass
    assert [step.split(".")[0] for step in steps] == ["sync ", "link", f"sync {tmp_path.name}".split(".")[0]]


def test_replace_file_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(PRECIOUS)

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="full"):
            replace_file(tmp_path / "a", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": PRECIOUS}
    replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("ways", ["all", "no clone", "buffer"])
@pytest.mark.parametrize(("source_at", "target_at", "length"), [(0, 0, 8192), (4096, 8192, 12288), (5, 7, 10_000)])
def test_every_way_of_copying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: str, source_at: int, target_at: int, length: int
) -> None:
    def refused(*_: object, **__: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not here")

    if ways != "all":
        monkeypatch.setattr(fcntl, "ioctl", refused)
    if ways == "buffer":
        monkeypatch.setattr(os, "copy_file_range", refused)
        monkeypatch.setattr(copying, "_BUFFER_STEP", 3000)
    data = os.urandom(20_000)
    (tmp_path / "s").write_bytes(data)
    (tmp_path / "t").write_bytes(b"")
    source, target = PosixFile.open(tmp_path / "s"), PosixFile.open(tmp_path / "t", writable=True)
    steps: list[int] = []
    Copier(target).copy(source, source_at, target_at, length, steps.append)
    assert (tmp_path / "t").read_bytes() == bytes(target_at) + data[source_at : source_at + length]
    assert sum(steps) == length
    source.close()
    target.close()


def test_a_large_copy_is_stored_and_forgotten_behind_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it pushes the pages of guests out of memory, and the flush at its end takes long."""
    monkeypatch.setattr(copying, "_WRITE_BACK_STEP", 1000)
    monkeypatch.setattr(copying, "_KEPT_STEPS", 2)
    calls: list[tuple[str, int, int]] = []

    class Target(RecordingFile):
        def begin_flush(self, offset: int, length: int) -> None:
            calls.append(("begin", offset, length))

        def drop_behind(self, offset: int, length: int) -> None:
            calls.append(("drop", offset, length))

    copier = Copier(Target(tmp_path / "target"))
    for offset in (0, 600, 5000, 6000, 7000, 3000, 9000):
        copier.write(offset, bytes(600 if offset < 5000 else 1000))
    assert calls == [
        ("begin", 0, 1200),
        ("begin", 5000, 1000),
        ("begin", 6000, 1000),
        ("drop", 0, 1200),
        ("begin", 7000, 1000),
        ("drop", 5000, 1000),
        ("begin", 3000, 7000),
        ("drop", 6000, 1000),
    ]


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_file_that_somebody_waits_for_is_stored_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    ranges: list[tuple[int, int, int]] = []

    def noted(_fd: int, *arguments: int) -> int:
        ranges.append(arguments)  # type: ignore[arg-type]
        return errno.ENOSYS

    monkeypatch.setattr(blockfile, "_sync_file_range", noted)
    with NewFiles(durable=durable) as files:
        file = files.add(tmp_path / "a")
        file.begin_flush(0, 10)
        file.drop_behind(10, 20)  # a system that has no such call is no reason to fail
    assert ranges == ([(0, 10, 2), (10, 20, 7)] if durable else [])


def test_what_a_copy_is_filled_up_with_takes_no_space(tmp_path: Path) -> None:
    """A grain may be 1 GiB, and its file may end in the first of its bytes."""
    (tmp_path / "short").write_bytes(b"s" * 5000)
    target = PosixFile(os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT), tmp_path / "target")
    target.write_at(9000, b"old" * 5000)
    Copier(target).copy(PosixFile.open(tmp_path / "short"), 0, 0, 1 << 30, lambda _: None)
    target.close()
    facts = (tmp_path / "target").stat()
    assert facts.st_size == 1 << 30
    assert facts.st_blocks * 512 < 100_000
    with (tmp_path / "target").open("rb") as file:
        assert file.read(100_000) == b"s" * 5000 + bytes(95_000)
        file.seek(-10, os.SEEK_END)
        assert file.read() == bytes(10)


def test_a_copy_past_the_end_is_filled_with_zeros(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"x" * 100)
    (tmp_path / "t").write_bytes(b"y" * 5000)
    source, target = PosixFile.open(tmp_path / "s"), PosixFile.open(tmp_path / "t", writable=True)
    Copier(target).copy(source, 60, 0, 1000, lambda _: None)
    assert (tmp_path / "t").read_bytes() == b"x" * 40 + bytes(960) + b"y" * 4000
    source.close()
    target.close()


@pytest.mark.parametrize(
    ("first", "second", "excluded"),
    [(False, False, False), (True, False, True), (False, True, True), (True, True, True)],
)
def test_locks(tmp_path: Path, first: bool, second: bool, excluded: bool) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    one, two = (PosixFile.open(path, writable=True) for _ in range(2))
    lock_image(one.fileno(), path, writable=first)
    if excluded:
        with pytest.raises(LockBusy, match="is another process using the image"):
            lock_image(two.fileno(), path, writable=second)
    else:
        lock_image(two.fileno(), path, writable=second)
    one.close()
    two.close()
    three = PosixFile.open(path, writable=True)
    lock_image(three.fileno(), path, writable=True)  # closing let go
    three.close()


def test_holes_are_found(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as raw:
        raw.seek(1 << 20)
        raw.write(b"x" * 4096)
        raw.truncate(3 << 20)
    file = PosixFile.open(tmp_path / "a")
    assert file.next_data(0) == 1 << 20
    assert file.next_hole(1 << 20) == (1 << 20) + 4096
    assert file.next_data((1 << 20) + 4096) == 3 << 20
    file.close()
