"""A power cut within a commit: with the intent record, is everything that is left old or new?

Every write to either image is followed by the images that a cut could leave then. Each is put on the disk together with
the record of that moment, `recover` runs, and the snapshot must read what it read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qemu_vmdk_snap import CidMismatch, ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.journal.recover import recover
from qemu_vmdk_snap.storage.journal.record import Operation
from tests.support.crash.recording import RecordingFile

CAPACITY = 96 << 10
OLD, NEW = b"\x11", b"\x22"
GRAIN = 4096


class State(NamedTuple):
    """What a power cut could leave."""

    images: tuple[tuple[str, bytes], ...]
    record: bytes | None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base with OLD in its first half, and an overlay with NEW in every second grain."""
    create_image(tmp_path / "base.vmdk", CAPACITY, options=ImageOptions(grain_size=GRAIN), durable=False)
    with open_chain(tmp_path / "base.vmdk", writable=True) as chain:
        chain.write_at(0, OLD * (CAPACITY // 2))
    create_overlay(tmp_path / "top.vmdk", tmp_path / "base.vmdk", durable=False)
    with open_chain(tmp_path / "top.vmdk", writable=True) as chain:
        for offset in range(0, CAPACITY, 2 * GRAIN):
            chain.write_at(offset, NEW * GRAIN)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "top.vmdk").hardlink_to(tmp_path / "top.vmdk")
    return tmp_path


def states_of_a_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """Run a commit on recording files; return every state that a cut within it, or after it, could leave."""
    names = ("base.vmdk", "top.vmdk")
    files = {name: RecordingFile(folder / name, (folder / name).read_bytes()) for name in names}
    record = folder / ".top.vmdk.intent"
    seen: dict[State, None] = {}  # in the order they come: a red control fails alike each time

    def capture(*, top: bool = True) -> None:
        now = record.read_bytes() if record.exists() else None
        there = [file for name, file in files.items() if top or name != "top.vmdk"]
        for cut in there:
            for image in cut.images_after_crash(limit=24, seed=len(cut.log)):
                images = ((one.path.name, image if one is cut else one.durable) for one in there)
                seen[State(tuple(images), now)] = None

    def watched(call: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*args: object) -> None:
            call(*args)
            capture()

        return wrapper

    for file in files.values():
        file.write_at = watched(file.write_at)  # type: ignore[method-assign]
    monkeypatch.setattr(Operation, "begin", watched(Operation.begin))
    commit(folder / "top.vmdk", delete=True, opener=lambda path, writable: files[path.name])
    capture(top=False)
    return list(seen)


def put_back(folder: Path, state: State) -> None:
    """Let the folder hold the state. The files stay the same inodes, by which the record knows them."""
    for path in folder.iterdir():
        if path.is_file() and path.name != "base.vmdk":
            path.unlink()
    for name, content in state.images:
        path = folder / name
        if not path.exists():
            path.hardlink_to(folder / "kept" / name)
        with path.open("r+b") as file:
            file.write(content)
            file.truncate()
    if state.record is not None:
        record = folder / ".top.vmdk.intent"
        record.write_bytes(state.record)
        record.chmod(0o600)


def read(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, CAPACITY)


def reads(path: Path, content: bytes) -> bool:
    """Compare out of pytest's sight: it would explain in minutes how two long strings of bytes differ."""
    return read(path) == content


def verdict(folder: Path, state: State, content: bytes) -> None:
    put_back(folder, state)
    top, base = folder / "top.vmdk", folder / "base.vmdk"
    if top.exists():
        try:
            assert reads(top, content), "the snapshot reads something else after the cut"
        except CidMismatch:
            assert state.record is not None, "nobody can tell how to mend the chain"
    finished = recover(folder)
    if finished:
        assert not top.exists()
    assert reads(top if top.exists() else base, content), "the snapshot is lost"


def test_power_cut_within_a_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = read(folder / "top.vmdk")
    with monkeypatch.context() as patched:
        states = states_of_a_commit(folder, patched)
    assert len(states) > 100
    for state in states:
        verdict(folder, state, content)


def test_without_the_barriers_the_power_cut_test_is_red(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = read(folder / "top.vmdk")
    with monkeypatch.context() as patched:
        patched.setattr(RecordingFile, "flush", lambda self: None)
        states = states_of_a_commit(folder, patched)

    def all_hold() -> None:
        for state in reversed(states):  # the late ones miss the most
            verdict(folder, state, content)

    with pytest.raises(AssertionError, match="the snapshot is lost"):
        all_hold()
