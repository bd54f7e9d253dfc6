"""Is what a killed command leaves under temporary names swept, and nothing that a living one is still writing?"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.copy.convert import convert
from qemu_vmdk_snap.ops.journal.recover import SWEEP, recover
from qemu_vmdk_snap.ops.make.create import ImageOptions
from qemu_vmdk_snap.ops.progress import Progress
from qemu_vmdk_snap.storage import durable
from qemu_vmdk_snap.storage.durable import new_file, replace_file

MIB = 1 << 20


@contextmanager
def process(work: Callable[[Callable[[], None]], None]) -> Iterator[int]:
    """Run `work` in a forked child up to where it calls what it is given, where it stays; killed at the end."""
    reached, reach = os.pipe()

    def stay() -> None:
        os.write(reach, b"!")
        signal.pause()

    pid = os.fork()
    if not pid:
        try:
            os.close(reached)
            work(stay)
        finally:
            os._exit(1)
    os.close(reach)
    try:
        assert os.read(reached, 1) == b"!", "the child ended before it came so far"
        yield pid
    finally:
        os.close(reached)
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    path = tmp_path / "source/source.vmdk"
    create_image(path, 8 * MIB, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, b"data" * MIB)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def converting(
    source: Path, target: Path, options: ImageOptions | None = None, backing: Path | None = None
) -> AbstractContextManager[int]:
    def work(stay: Callable[[], None]) -> None:
        def on_progress(step: Progress) -> None:
            if step.done:
                stay()

        with open_chain(source) as chain:
            convert(chain, target, options=options, backing=backing, on_progress=on_progress)

    return process(work)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse", "monolithicFlat"])
def test_a_conversion(source: Path, folder: Path, subformat: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder / "target.vmdk"
    with converting(source, target, ImageOptions(subformat=subformat)):
        at_work = names(folder)
        assert recover(folder) == [], "it is alive"
        assert names(folder) == at_work
    assert names(folder) == at_work
    assert main(["recover", str(folder)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert sorted(told) == sorted(f"{folder / name}: removed (left by a killed command)" for name in at_work)
    assert not names(folder)
    with open_chain(source) as chain:
        convert(chain, target)


def test_an_overlay_that_is_filled_under_its_temporary_name(source: Path, folder: Path) -> None:
    base = folder / "base.vmdk"
    create_image(base, 8 * MIB, durable=False)
    with converting(source, folder / "target.vmdk", backing=base):
        assert recover(folder) == []
        assert len(names(folder)) == 2
    assert [one.operation for one in recover(folder)] == [SWEEP]
    assert names(folder) == {"base.vmdk"}


def test_of_one_image_alone(folder: Path) -> None:
    for name in ("one.vmdk", "other.vmdk"):
        path = folder / name

        def work(stay: Callable[[], None], path: Path = path) -> None:
            with new_file(path):
                stay()

        with process(work):
            pass
    assert len(recover(folder / "one.vmdk")) == 1
    assert len(names(folder)) == 1
    assert ".other.vmdk." in names(folder).pop()


def test_what_is_not_ours_stays(folder: Path) -> None:
    token = "0123456789ab"
    (folder / f".a.vmdk.{token}.tmp").write_bytes(b"another program's")
    (folder / f"a.vmdk.{token}.qemu-vmdk-snap.tmp").write_bytes(b"not hidden")
    (folder / f".link.{token}.qemu-vmdk-snap.tmp").symlink_to(folder / f".a.vmdk.{token}.tmp")
    (folder / f".folder.{token}.qemu-vmdk-snap.tmp").mkdir()
    in_use = folder / f".used.vmdk.{token}.qemu-vmdk-snap.tmp"
    create_image(in_use, MIB, durable=False)
    before = names(folder)
    with open_chain(in_use):  # by somebody who does not hold the folder
        assert recover(folder) == []
    assert names(folder) == before
    assert [one.image for one in recover(folder)] == [in_use]


def no_links(self: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "no links here")


def test_a_name_that_was_claimed_and_not_filled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are neither hard links nor renames that do not overwrite."""
    path = folder / "image.vmdk"

    def work(stay: Callable[[], None]) -> None:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
        monkeypatch.setattr(durable, "_renamed_beside", lambda temporary, path: False)
        monkeypatch.setattr(Path, "replace", lambda self, target: stay())
        with new_file(path) as file:
            file.write_at(0, b"complete")

    with process(work):
        assert path.stat().st_size == 0
        with pytest.raises(FileExistsError), new_file(path):
            pass
        assert recover(folder) == []
    assert [one.operation for one in recover(folder)] == [SWEEP]
    assert not names(folder)
    with new_file(path) as file:
        file.write_at(0, b"again")
    assert path.read_bytes() == b"again"


def test_a_name_that_somebody_filled_is_no_claim(folder: Path) -> None:
    path = folder / "image.vmdk"

    def work(stay: Callable[[], None]) -> None:
        with new_file(path):
            stay()

    with process(work):
        path.write_bytes(b"precious")
    recover(folder)
    assert names(folder) == {"image.vmdk"}
    assert path.read_bytes() == b"precious"


def test_without_hard_links_a_name_comes_in_one_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "hardlink_to", no_links)
    claimed: list[object] = []
    monkeypatch.setattr(Path, "replace", lambda self, target: claimed.append(target))
    with new_file(folder / "a") as file:
        file.write_at(0, b"content")
    assert (folder / "a").read_bytes() == b"content"
    assert names(folder) == {"a"}
    assert not claimed

    def taken() -> None:
        with new_file(folder / "b") as file:
            file.write_at(0, b"new")
            (folder / "b").write_bytes(b"old")

    with pytest.raises(FileExistsError):
        taken()
    assert (folder / "b").read_bytes() == b"old"
    assert names(folder) == {"a", "b"}


def test_a_file_that_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "policy").write_bytes(b"old")

    def work(stay: Callable[[], None]) -> None:
        monkeypatch.setattr(Path, "replace", lambda self, target: stay())
        replace_file(folder / "policy", b"new")

    with process(work):
        assert recover(folder) == []
    assert len(recover(folder)) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"policy": b"old"}
