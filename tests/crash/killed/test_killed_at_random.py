"""The same with real time: an operation on larger chains is killed at random moments, and `recover` mends what it left.

`VMDK_KILL_SIZE` (bytes of the disk, default 64 MiB) and `VMDK_KILL_POINTS` (kills for each operation, default 3) make
it the long run: 1073741824 and 50.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from qemu_vmdk_snap import RunKind, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.check.repair import repair
from qemu_vmdk_snap.ops.copy.convert import convert
from qemu_vmdk_snap.ops.copy.diff import make_delta
from qemu_vmdk_snap.ops.edit.apply import apply_delta
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.compact import compact
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.ops.edit.remove import remove
from qemu_vmdk_snap.ops.edit.resize import resize
from qemu_vmdk_snap.ops.journal.recover import SWEEP, recover
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader

SIZE: Final = int(os.environ.get("VMDK_KILL_SIZE", 64 << 20))
POINTS: Final = int(os.environ.get("VMDK_KILL_POINTS", 3))
PIECE: Final = 1 << 20
NAMES: Final = ("one.vmdk", "two.vmdk", "three.vmdk")
NEW: Final = "new.vmdk"
DELTA: Final = ".delta.vmdk"  # hidden: no image that the test looks at
SHARED_PER_TABLE: Final = 16


def nothing(folder: Path) -> None:
    pass


def leave_a_delta(folder: Path) -> None:
    """Put a delta in the place of the last link."""
    with open_chain(folder / NAMES[2]) as chain:
        make_delta(chain, 1, folder / DELTA)
    (folder / NAMES[2]).unlink()


def share_grains(folder: Path) -> None:
    """Let empty grains of the second link name the place of a stored one, in both copies of the tables."""
    with (folder / NAMES[1]).open("r+b") as file:
        header = SparseExtentHeader.parse(file.read(512), path=folder / NAMES[1])
        for directory in (header.gd_offset, header.rgd_offset):
            file.seek(directory * 512)
            tables = struct.unpack(f"<{SIZE >> 25}I", file.read(SIZE >> 23))
            for table in tables:
                file.seek(table * 512)
                entries = list(struct.unpack("<512I", file.read(2048)))
                stored = next(entry for entry in entries if entry)
                for index in [index for index, entry in enumerate(entries) if not entry][:SHARED_PER_TABLE]:
                    entries[index] = stored
                file.seek(table * 512)
                file.write(struct.pack("<512I", *entries))


def convert_top(folder: Path) -> None:
    with open_chain(folder / NAMES[2]) as chain:
        convert(chain, folder / NEW)


class Case(NamedTuple):
    run: Callable[[Path], object]
    keeps: tuple[str, ...]
    """Images that read what they read, whatever happens."""
    after: dict[str, str]
    """Image -> the image whose content it has when the operation is done; what is not named is gone."""
    prepare: Callable[[Path], None] = nothing
    again: bool = False
    """Whether it must be run to its end before the images are sound."""


CASES: Final = {
    "commit": Case(
        lambda at: commit(at / NAMES[2]),
        (NAMES[0], NAMES[2]),
        {NAMES[0]: NAMES[0], NAMES[1]: NAMES[2], NAMES[2]: NAMES[2]},
    ),
    "commit-delete": Case(
        lambda at: commit(at / NAMES[1], delete=True), (NAMES[2],), {NAMES[0]: NAMES[1], NAMES[2]: NAMES[2]}
    ),
    "rebase": Case(lambda at: rebase(at / NAMES[2], at / NAMES[0]), NAMES, {name: name for name in NAMES}),
    "flatten": Case(lambda at: rebase(at / NAMES[2], None), NAMES, {name: name for name in NAMES}),
    "remove": Case(lambda at: remove(at / NAMES[0]), NAMES[1:], {name: name for name in NAMES[1:]}),
    "compact": Case(lambda at: compact(at / NAMES[1]), NAMES, {name: name for name in NAMES}),
    "resize": Case(lambda at: resize(at / NAMES[2], SIZE * 4), NAMES[:2], {name: name for name in NAMES[:2]}),
    "convert": Case(convert_top, NAMES, {**{name: name for name in NAMES}, NEW: NAMES[2]}),
    "apply": Case(
        lambda at: apply_delta(at / DELTA, at / NAMES[1]),
        NAMES[:1],
        {NAMES[0]: NAMES[0], NAMES[1]: NAMES[2]},
        leave_a_delta,
    ),
    "repair": Case(
        lambda at: repair(at / NAMES[1], resolver=confined(), undo=at / f".undo-{time.monotonic_ns()}"),
        NAMES,
        {name: name for name in NAMES},
        share_grains,
        again=True,
    ),
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three links, each with a quarter of the disk."""
    folder = tmp_path_factory.mktemp("origin")
    chooser = random.Random(1)
    for number, name in enumerate(NAMES):
        if number:
            create_overlay(folder / name, folder / NAMES[number - 1], durable=False)
        else:
            create_image(folder / name, SIZE, durable=False)
        with open_chain(folder / name, writable=True) as chain:
            for offset in chooser.sample(range(0, SIZE, PIECE), max(1, SIZE // PIECE // 4)):
                chain.write_at(offset, chooser.randbytes(PIECE))
    return folder


def digest(path: Path) -> str:
    """Return the digest of what the image reads as: where each stretch of data is, and its bytes.

    The engine tells where they lie, the test reads them there itself. None of the data is zeros, so stretches of
    zeros need not be read.
    """
    found, view, end = hashlib.sha256(), memoryview(bytearray(4 * PIECE)), 0
    with open_chain(path) as chain, contextlib.ExitStack() as stack:
        files: dict[Path, int] = {}
        for run in chain.map(0, SIZE):
            if run.kind is not RunKind.DATA:
                continue
            assert run.path is not None
            assert run.file_offset is not None
            if run.path not in files:
                files[run.path] = os.open(run.path, os.O_RDONLY)
                stack.callback(os.close, files[run.path])
            if run.offset != end:
                found.update(b"%d-%d" % (end, run.offset))
            for skip in range(0, run.length, len(view)):
                piece = view[: min(len(view), run.length - skip)]
                assert os.preadv(files[run.path], [piece], run.file_offset + skip) == len(piece)
                found.update(piece)
            end = run.offset + run.length
    return found.hexdigest()


def mark(path: Path) -> tuple[int, ...]:
    """Return what changes when the file does."""
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def images(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def run_for(seconds: float | None, work: Callable[[], object]) -> float:
    """Run `work` in a child, which is killed after so many seconds; return how long it ran."""
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the operation failed"
    return time.monotonic() - started


@pytest.mark.timeout(300 + 20 * POINTS * max(1, SIZE >> 28))
@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments(name: str, origin: Path, tmp_path: Path) -> None:
    case = CASES[name]
    begin, run = tmp_path / "begin", tmp_path / "run"
    marks: dict[str, tuple[int, ...]] = {}
    shutil.copytree(origin, begin)
    known = {image: digest(begin / image) for image in NAMES}
    case.prepare(begin)
    before = {image: digest(begin / image) for image in images(begin)}
    known |= before  # what was prepared may have taken one away, or changed one
    done = {image: known[like] for image, like in case.after.items()}

    def restore() -> None:
        run.mkdir(exist_ok=True)
        names = {path.name for path in begin.iterdir()}
        for path in run.iterdir():
            if path.name not in names or marks.get(path.name) != mark(path):
                path.unlink()
        for name in names:
            if not (run / name).exists():
                shutil.copyfile(begin / name, run / name)
                marks[name] = mark(run / name)

    restore()
    whole = run_for(None, lambda: case.run(run))
    chooser = random.Random(name)
    for _ in range(POINTS):
        restore()
        run_for(chooser.uniform(0, whole), lambda: case.run(run))
        finished = [one for one in recover(run) if one.operation != SWEEP]
        left = images(run)
        now = {image: digest(run / image) for image in left}
        for image in case.keeps:
            if image in left:
                assert now[image] == before[image], f"{image} reads something else"
        if finished:
            assert done.items() <= now.items(), "what recover finished is not finished"
        else:
            assert now == before or done.items() <= now.items(), "half done, and nothing to recover"
        assert not [path for path in run.iterdir() if path.suffix in (".tmp", ".intent")], "something is left lying"
        if case.again:
            case.run(run)
        for image in left:
            assert check_image(run / image, resolver=confined()).corruptions == 0
