"""Two processes at once in one folder: is every write that was acknowledged there afterwards, and nothing lost?

Each round starts from a fresh chain `base <- mid <- top`, lets two processes loose on it at one moment, and looks at
what they left. A command may be refused by an error of ours; what it acknowledged must hold. The rounds are bounded,
and the moments differ: each side waits a little longer in every round.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from qemu_vmdk_snap import VmdkSnapError, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.compact import compact
from qemu_vmdk_snap.ops.edit.remove import remove
from qemu_vmdk_snap.ops.edit.renew import renew_overlay
from qemu_vmdk_snap.ops.edit.resize import resize
from qemu_vmdk_snap.ops.journal.recover import recover
from qemu_vmdk_snap.storage.blockfile import BlockFile, open_posix
from tests.support.qemu import content
from tests.support.tree import Tree, line

SIZE: Final = 1 << 20
ROUNDS: Final = int(os.environ.get("VMDK_RACE_ROUNDS", "12"))
BLOCK: Final = 4096

Side = Callable[[Tree], object]


def repeat(times: int, work: Side) -> Side:
    """Return what does `work` so many times and returns what each gave; None where it was refused."""

    def run(tree: Tree) -> list[object]:
        found: list[object] = []
        for _ in range(times):
            try:
                found.append(work(tree) or True)
            except (VmdkSnapError, FileNotFoundError):
                found.append(None)
        return found

    return run


def at_once(tree: Tree, round_: int, *sides: Side) -> list[Any]:
    """Run the sides in processes of their own, from one moment on; return what each returned, as JSON has it."""
    ready, go = os.pipe()
    children = []
    for number, side in enumerate(sides):
        answer, say = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(go)
            os.read(ready, 1)  # ends when the parent closes its end
            _side(side, tree, say, 0.0007 * (round_ // 2) * (number == round_ % 2))
        os.close(say)
        children.append((pid, answer))
    os.close(ready)
    os.close(go)
    found = []
    for pid, answer in children:
        with os.fdopen(answer) as text:
            told = text.read()
        _, status = os.waitpid(pid, 0)
        assert status == 0, told
        found.append(json.loads(told))
    return found


def _side(side: Side, tree: Tree, say: int, wait: float) -> None:
    status = 1
    try:
        time.sleep(wait)
        told = json.dumps(side(tree), default=str)
        status = 0
    except (VmdkSnapError, FileNotFoundError):
        told, status = "null", 0
    except BaseException:
        told = traceback.format_exc()
    os.write(say, told.encode())
    os._exit(status)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    folder = tmp_path_factory.mktemp("races") / "origin"
    folder.mkdir()
    tree = Tree(folder, SIZE)
    line(tree, 3)
    return tree


def fresh(origin: Tree, folder: Path) -> Tree:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(origin.folder, folder)
    tree = Tree(folder, origin.size)
    tree.model, tree.parents = dict(origin.model), dict(origin.parents)
    return tree


def settled(tree: Tree) -> None:
    """Assert that nothing waits to be finished, and no image is damaged."""
    assert [one.operation for one in recover(tree.folder) if one.operation != "sweep"] == []
    assert not [name for name in tree.files() if name.startswith(".")]
    for path in sorted(tree.folder.glob("*.vmdk")):
        assert not check_image(path, resolver=confined()).corruptions, path


def reads(tree: Tree, name: str) -> bytes:
    return tree.read(name)


def _new_overlay(parent: str) -> Side:
    def make(tree: Tree) -> str:
        create_overlay(tree.path("new"), tree.path(parent), durable=False)
        return "made"

    return make


@pytest.mark.parametrize("parent", ["image-2", "image-1"])
def test_commit_against_create(origin: Tree, tmp_path: Path, parent: str) -> None:
    """An overlay that was made reads what its parent read before the merge, or after it; or it was not made."""
    for round_ in range(ROUNDS):
        tree = fresh(origin, tmp_path / "run")
        done, made = at_once(tree, round_, lambda tree: commit(tree.path("image-2"), delete=True), _new_overlay(parent))
        settled(tree)
        assert tree.path("new").exists() is (made is not None)
        assert tree.read("image-3") == tree.model["image-3"]
        if made is not None:
            assert tree.read("new") in (tree.model["image-1"], tree.model["image-2"])
        assert tree.path("image-2").exists() is (done is None)


def test_remove_against_create(origin: Tree, tmp_path: Path) -> None:
    for round_ in range(ROUNDS):
        tree = fresh(origin, tmp_path / "run")
        done, made = at_once(tree, round_, lambda tree: remove(tree.path("image-2")), _new_overlay("image-2"))
        settled(tree)
        assert tree.path("new").exists() is (made is not None)
        for name in ("image-1", "image-3"):
            assert tree.read(name) == tree.model[name]
        if made is not None:
            assert tree.read("new") == tree.model["image-2"]
        assert tree.path("image-2").exists() is (done is None)


def test_an_overlay_that_comes_too_late_is_withdrawn(origin: Tree, tmp_path: Path) -> None:
    """The window itself: the operation has looked around, and the overlay gets its name before or after its record."""
    from qemu_vmdk_snap.storage.journal.record import Operation

    begin = Operation.begin
    for before in (True, False):
        tree = fresh(origin, tmp_path / "run")
        made: list[str] = []

        def begins(operation: Operation, tree: Tree = tree, before: bool = before, made: list[str] = made) -> None:
            if not before:
                begin(operation)
            try:
                create_overlay(tree.path("new"), tree.path("image-2"))
                made.append("made")
            except VmdkSnapError:
                made.append("refused")
            if before:
                begin(operation)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(Operation, "begin", begins)
            if before:
                with pytest.raises(VmdkSnapError, match=r"is still needed: .*new\.vmdk"):
                    remove(tree.path("image-2"))
            else:
                remove(tree.path("image-2"))
        assert made == ["made" if before else "refused"]
        assert tree.path("new").exists() is before
        if before:
            assert tree.read("new") == tree.model["image-2"]
        settled(tree)


def _grow(tree: Tree) -> int:
    return resize(tree.path("image-3"), 2 * SIZE).after


def _compact(tree: Tree) -> int:
    return compact(tree.path("image-3")).after


def test_resize_against_compact(origin: Tree, tmp_path: Path) -> None:
    for round_ in range(ROUNDS):
        tree = fresh(origin, tmp_path / "run")
        with tree.path("image-3").open("ab") as file:
            file.write(b"leaked" * 30000)
        grown, _ = at_once(tree, round_, _grow, repeat(3, _compact))
        settled(tree)
        expected = tree.model["image-3"] + bytes(SIZE if grown is not None else 0)
        assert tree.read("image-3") == expected


@pytest.mark.parametrize("operation", ["compact", "commit"])
def test_recover_against_a_running_operation(origin: Tree, tmp_path: Path, operation: str) -> None:
    for round_ in range(ROUNDS):
        tree = fresh(origin, tmp_path / "run")
        work: Side = _compact if operation == "compact" else (lambda tree: commit(tree.path("image-3")).path)
        with tree.path("image-3").open("ab") as file:
            file.write(b"leaked" * 30000)
        done, recovered = at_once(tree, round_, work, repeat(20, lambda tree: recover(tree.folder)))
        assert done is not None, "recover kept the operation from its work"
        assert [one for one in recovered if one not in (None, True)] == [], "recover touched what was running"
        settled(tree)
        assert tree.read("image-3") == tree.model["image-3"]


def test_renew_against_writes(origin: Tree, tmp_path: Path) -> None:
    """What was written is there, or was thrown away as a whole: the overlay that is left is one or the other."""
    for round_ in range(ROUNDS):
        tree = fresh(origin, tmp_path / "run")
        _, written = at_once(tree, round_, lambda tree: renew_overlay(tree.path("image-3")), _writer("image-3", 3, 20))
        settled(tree)
        found = tree.read("image-3")
        below, above = tree.model["image-2"], tree.model["image-3"]
        for offset in range(0, SIZE, BLOCK):
            may_be = [below[offset : offset + BLOCK], above[offset : offset + BLOCK]]
            if offset // BLOCK in written:
                may_be.append(block(offset // BLOCK))
            assert found[offset : offset + BLOCK] in may_be
        if written:  # the last was acknowledged when the renewal had ended, or the renewal came after all of them
            last = written[-1] * BLOCK
            emptied = all(
                found[at : at + BLOCK] == below[at : at + BLOCK] for at in (number * BLOCK for number in written)
            )
            assert emptied or found[last : last + BLOCK] == block(written[-1])


def block(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK)


def _writer(name: str, seed: int, times: int) -> Side:
    """Return what writes blocks, each in an open of its own, and returns those that were acknowledged."""

    def run(tree: Tree) -> list[int]:
        chance = random.Random(seed)
        done = []
        for _ in range(times):
            number = chance.randrange(SIZE // BLOCK)
            try:
                with open_chain(tree.path(name), writable=True) as chain:
                    chain.write_at(number * BLOCK, block(number))
                    chain.flush()
                done.append(number)
            except (VmdkSnapError, FileNotFoundError):
                pass
        return done

    return run


def _leaking(tree: Tree) -> object:
    """Compact an image that has something to lose each time."""
    path = tree.path("image-3")
    with open_chain(path, writable=True) as chain:
        chain.write_at(SIZE - 65536, bytes(65536))
    return compact(path).after


def _expect(tree: Tree, written: list[int], zeroed: int) -> None:
    found, old = tree.read("image-3"), tree.model["image-3"]
    for offset in range(0, zeroed, BLOCK):
        expected = block(offset // BLOCK) if offset // BLOCK in written else old[offset : offset + BLOCK]
        assert found[offset : offset + BLOCK] == expected, f"block {offset // BLOCK} is lost"


def test_compact_against_writes(origin: Tree, tmp_path: Path) -> None:
    acknowledged = 0
    for round_ in range(ROUNDS):
        tree = fresh(origin, tmp_path / "run")
        _, written = at_once(tree, round_, repeat(10, _leaking), _writer("image-3", round_, 30))
        acknowledged += len(written)
        settled(tree)
        _expect(tree, written, SIZE - 65536)
    assert acknowledged, "the writer was refused each time"


def test_a_writer_that_opened_the_file_before_it_was_replaced(origin: Tree, tmp_path: Path) -> None:
    """The window itself: opened, then compacted by somebody else, then locked."""
    tree = fresh(origin, tmp_path / "run")
    path = tree.path("image-3")
    with path.open("ab") as file:
        file.write(b"leaked" * 30000)
    opened: list[int] = []

    def late(name: Path, writable: bool) -> BlockFile:
        found = open_posix(name, writable)
        if name == path and not opened:
            opened.append(os.dup(found.fileno() or 0))
            report = compact(path)
            assert report.after < report.before
        return found

    with open_chain(path, writable=True, opener=late) as chain:
        chain.write_at(0, block(1))
    assert tree.read("image-3") == block(1) + tree.model["image-3"][BLOCK:]
    # QEMU does not look at the name again: it must find nothing that it could write into.
    assert os.fstat(opened[0]).st_size == 0
    os.close(opened[0])


@pytest.mark.needs("qemu-io")
@pytest.mark.parametrize("ours", ["compact", "commit", "resize"])
def test_ours_against_qemu_io(origin: Tree, tmp_path: Path, ours: str) -> None:
    def writer(tree: Tree) -> list[int]:
        done = []
        for number in [number for number in range(5) for _ in range(6)]:  # refused while the other has the lock
            if number in done:
                continue
            words = ["qemu-io", "-f", "vmdk", "-c", f"write -P {number + 1} {number * BLOCK} {BLOCK}", "-c", "flush"]
            told = subprocess.run([*words, tree.path("image-3")], capture_output=True, text=True, check=False)
            if told.returncode == 0 and f"wrote {BLOCK}/{BLOCK}" in told.stdout and not told.stderr:
                done.append(number)
        return done

    def work(tree: Tree) -> object:
        if ours == "compact":
            return _leaking(tree)
        if ours == "resize":
            with open_chain(tree.path("image-3")) as chain:
                capacity = chain.capacity
            return resize(tree.path("image-3"), capacity + 65536).after
        return commit(tree.path("image-3")).path

    acknowledged = 0
    for round_ in range(max(3, ROUNDS // 4)):
        tree = fresh(origin, tmp_path / "run")
        _, written = at_once(tree, round_, repeat(10, work), writer)
        acknowledged += len(written)
        settled(tree)
        found, old = tree.read("image-3"), tree.model["image-3"]
        for offset in range(0, SIZE - 65536, BLOCK):
            number = offset // BLOCK
            expected = bytes([number + 1]) * BLOCK if number in written else old[offset : offset + BLOCK]
            if number < 5 and number not in written:
                continue  # refused, or not acknowledged
            assert found[offset : offset + BLOCK] == expected, f"block {number} is lost"
    assert acknowledged, "QEMU was refused each time"


THREADS: Final = 8


def test_eight_threads_read_one_chain(origin: Tree, tmp_path: Path) -> None:
    """With a cache of tables that is far too small for them."""
    path = tmp_path / "wide.vmdk"
    create_image(path, 64 << 20, durable=False)
    per_table = 512 * 65536
    chance = random.Random(5)
    places = {table * per_table + grain * 65536: chance.randbytes(512) for table in (0, 1) for grain in (0, 9, 300)}
    with open_chain(path, writable=True) as chain:
        for offset, data in places.items():
            chain.write_at(offset, data)
    with open_chain(path) as reader:
        tables = reader.links[0].extents[0].extent.tables  # type: ignore[attr-defined]
        tables._cache_limit = 1

        def work(seed: int) -> None:
            mine = random.Random(seed)
            for _ in range(800):
                offset, data = mine.choice(list(places.items()))
                assert reader.read_at(offset, 512) == data
                assert next(reader.map(offset, 512)).kind == 2

        in_threads(work)


def in_threads(work: Callable[[int], None]) -> None:
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(work, seed) for seed in range(THREADS)]:
                done.result()
    finally:
        sys.setswitchinterval(old)


def test_eight_threads_write_one_chain(tmp_path: Path) -> None:
    """Each thread has blocks of its own, within the same grains and tables; all of them flush."""
    create_image(tmp_path / "base.vmdk", 4 * SIZE, durable=False)
    path = tmp_path / "top.vmdk"
    create_overlay(path, tmp_path / "base.vmdk", durable=False)
    model = bytearray(4 * SIZE)
    lock = threading.Lock()

    with open_chain(path, writable=True) as chain:

        def work(seed: int) -> None:
            mine = random.Random(seed)
            written: dict[int, bytes] = {}
            for turn in range(60):
                offset = (mine.randrange(4 * SIZE // 4096) // THREADS * THREADS + seed) % (4 * SIZE // 4096) * 4096
                data = mine.randbytes(4096)
                chain.write_at(offset, data)
                written[offset] = data
                with lock:
                    model[offset : offset + 4096] = data
                offset, data = mine.choice(list(written.items()))
                assert chain.read_at(offset, 4096) == data
                if turn % 10 == seed % 10:
                    chain.flush()
                    list(chain.map(0, SIZE))

        in_threads(work)
    assert content(path) == bytes(model)
    assert not check_image(path, resolver=confined()).findings
