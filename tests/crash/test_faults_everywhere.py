"""Whatever the system refuses, at whatever call: does every image read its old content or its new one?

Each operation that writes is run once for each system call that it makes, and that call fails: once, or for good. Then
the operation ended or gave one error of ours (or the system's own), no descriptor is left open, and with the fault gone
`recover` ends what was begun and leaves no temporary file. The errors are taken in turn, so that one run has each of
them at every kind of call; VMDK_FAULTS_EACH=1 tries every error at every call.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from qemu_vmdk_snap import VmdkSnapError, convert, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.check.repair import repair, take_back
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.remove import remove
from qemu_vmdk_snap.ops.edit.renew import renew_overlay
from qemu_vmdk_snap.ops.journal.recover import recover
from qemu_vmdk_snap.storage.journal.record import Operation
from tests.crash.killed.test_killed_operations import CASES, SIZE, copy_of, killed_at, unclean_with_leaks
from tests.support.crash.faults import FAULTS, SHORT, Fault, calls
from tests.support.tree import Tree

EACH: Final = bool(os.environ.get("VMDK_FAULTS_EACH"))
MOST: Final = 40
"""How many calls of one operation are tried, spread over all of them."""
NEW: Final = b"new data" * 20000
AT: Final = 300_000

pytestmark = pytest.mark.usefixtures("not_durable", "no_server_was_killed")


def _nothing(tree: Tree) -> None:
    pass


class Work(NamedTuple):
    """An operation on a tree; `after` changes the model to what holds when it is done."""

    name: str
    run: Callable[[Tree], object]
    after: Callable[[Tree], None]
    prepare: Callable[[Tree], None] = _nothing
    """Done in every fresh copy, before the fault."""
    mixed: frozenset[str] = frozenset()
    """Images that may read old in one sector and new in another once an operation gave up: the base of a merge."""
    again: Callable[[Tree], None] = _nothing
    """Done after `recover`: what the user would do next."""


def _created(tree: Tree) -> None:
    tree.model["new"], tree.parents["new"] = bytes(SIZE), None


def _overlaid(tree: Tree) -> None:
    tree.model["new"], tree.parents["new"] = tree.model["image-2"], "image-2"


def _converted(tree: Tree) -> None:
    tree.model["new"], tree.parents["new"] = tree.model["image-3"], None


def _convert(tree: Tree) -> None:
    with open_chain(tree.path("image-3")) as chain:
        convert(chain, tree.path("new"))


def _write(tree: Tree) -> None:
    with open_chain(tree.path("image-3"), writable=True) as chain:
        chain.write_at(AT, NEW)
        chain.flush()
        chain.write_at(0, NEW[:700])


def _written(tree: Tree) -> None:
    old = tree.model["image-3"]
    tree.model["image-3"] = NEW[:700] + old[700:AT] + NEW + old[AT + len(NEW) :]


def _renewed(tree: Tree) -> None:
    tree.model["image-3"] = tree.model["image-2"]


def _commit(tree: Tree) -> None:
    commit(tree.path("image-2"), delete=True, keep_siblings=True)


def _committed(tree: Tree) -> None:
    tree.model["image-1"] = tree.model["image-2"]
    tree.forget("image-2")


def _interrupted(number: int) -> Callable[[Tree], None]:
    def prepare(tree: Tree) -> None:
        assert not killed_at(number, functools.partial(_commit, tree))
        assert any(path.name.endswith(".intent") for path in tree.folder.iterdir())

    return prepare


def _repair(tree: Tree) -> None:
    repair(tree.path("image-2"), resolver=confined())


def _leaks(tree: Tree) -> None:
    with tree.path("image-2").open("ab") as file:
        file.write(b"leaked" * 30000)


def _repaired_again(tree: Tree) -> None:
    undo = tree.path("image-2").with_name("image-2.vmdk.undo")
    undo.unlink(missing_ok=True)
    _repair(tree)
    undo.unlink(missing_ok=True)


def _damaged_and_repaired(tree: Tree) -> None:
    unclean_with_leaks(tree)
    _repair(tree)


WORKS: Final = [
    Work("create", lambda tree: create_image(tree.path("new"), SIZE), _created),
    Work("overlay", lambda tree: create_overlay(tree.path("new"), tree.path("image-2")), _overlaid),
    Work("write", _write, _written, mixed=frozenset({"image-3"})),
    *(
        Work(case.name, case.run, case.after, _leaks if case.name == "compact" else _nothing, mixed=case.changing)
        for case in CASES
    ),
    Work("renew", lambda tree: renew_overlay(tree.path("image-3")), _renewed),
    Work("convert", _convert, _converted),
    Work("repair", _repair, _nothing, unclean_with_leaks, again=_repaired_again),
    Work(
        "take-back",
        lambda tree: take_back(tree.path("image-2").with_name("image-2.vmdk.undo")),
        _nothing,
        _damaged_and_repaired,
        again=_repaired_again,
    ),
    *(
        Work(f"recover-{number}", lambda tree: recover(tree.folder), _committed, _interrupted(number))
        for number in (12, 20)
    ),
]


def open_descriptors() -> set[str]:
    """Return what is open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")  # noqa: PTH115
        except OSError:
            continue
    return found


def faults_of(seen: list[str], seed: str) -> Iterator[Fault]:
    """Yield what is tried: at each call one of its faults in turn, once and for good in turn; or all of them."""
    if EACH:
        for at, name in enumerate(seen):
            for code in FAULTS[name]:
                yield from (Fault(at, code, lasting) for lasting in (False, True) if code != errno.EINTR or not lasting)
        return
    turns: dict[str, int] = dict.fromkeys(FAULTS, 0)
    for at in sorted(random.Random(seed).sample(range(len(seen)), min(MOST, len(seen)))):
        name = seen[at]
        codes = FAULTS[name]
        if name in ("pwrite", "write", "copy_file_range"):
            yield Fault(at, SHORT, False)
        turn = turns[name]
        turns[name] += 1
        # The second round has the other half: neither count divides the other.
        code = codes[turn % len(codes)]
        yield Fault(at, code, code != errno.EINTR and (turn + turn // len(codes)) % 2 == 1)


@pytest.mark.timeout(3600 if EACH else 300)
@pytest.mark.parametrize("work", WORKS, ids=[work.name for work in WORKS])
def test_a_fault_at_every_call(work: Work, origin: Tree, tmp_path: Path) -> None:
    tree = fresh(origin, tmp_path, work)
    with calls() as counted:
        work.run(tree)
    check_done(tree, work)
    tried = 0
    for fault in faults_of(counted.seen, work.name):
        tree = fresh(origin, tmp_path, work)
        where = f"{counted.seen[fault.at]}, {fault}"
        failed = run_with(work, tree, fault, where)
        if fault.code == errno.EINTR:
            assert failed is None, f"{where}: what a signal interrupts is repeated"
        recovered = recover(tree.folder)
        work.again(tree)
        assert not [name for name in tree.files() if name.startswith(".")], f"{where}: a temporary file stays"
        if failed is None:
            check_done(tree, work)
        else:
            check_old_or_new(tree, work, f"{where}: {failed!r}, then {recovered}")
        tried += 1
    assert tried > 10


def fresh(origin: Tree, tmp_path: Path, work: Work) -> Tree:
    tree = copy_of(origin, tmp_path / "run")
    work.prepare(tree)
    return tree


def run_with(work: Work, tree: Tree, fault: Fault, where: str) -> Exception | None:
    """Run it with the fault; return the error that it gave."""
    before = open_descriptors()
    failed: Exception | None = None
    try:
        with calls(fault):
            work.run(tree)
    except (VmdkSnapError, OSError) as error:
        failed = error.with_traceback(None)
    except Exception as error:
        raise AssertionError(f"{where}: not an error of ours") from error
    assert failed is None or "\n" not in str(failed), where
    assert open_descriptors() <= before, f"{where}: a descriptor stays open"
    return failed


def check_done(tree: Tree, work: Work) -> None:
    done = model_after(tree, work)
    for name in done.model:
        assert tree.read(name) == done.model[name], f"{name} does not read what it is to read"


def model_after(tree: Tree, work: Work) -> Tree:
    done = copy_of(tree, tree.folder, files=False)
    work.after(done)
    return done


def check_old_or_new(tree: Tree, work: Work, where: str) -> None:
    done = model_after(tree, work)
    there = {path.stem for path in tree.folder.iterdir() if path.suffix == ".vmdk"}
    assert there in (set(tree.model), set(done.model)), where
    for name in there:
        content = tree.read(name)
        may_be = [model.model[name] for model in (tree, done) if name in model.model]
        whole = content in may_be or (name in work.mixed and is_mixture(content, may_be))
        assert whole, f"{where}: {name} reads neither the old nor the new"
        report = check_image(tree.path(name), resolver=confined())
        assert not report.corruptions, f"{where}: {report.findings}"


def is_mixture(content: bytes, may_be: list[bytes]) -> bool:
    if any(len(one) != len(content) for one in may_be):
        return False
    return all(content[at : at + 512] in [one[at : at + 512] for one in may_be] for at in range(0, len(content), 512))


def test_nothing_stays_in_another_folder(tmp_path: Path) -> None:
    """The record of an operation over two folders has a pointer in the second: each of its calls fails."""
    home, other = tmp_path / "home", tmp_path / "other"
    resolver = confined([home, other])

    def make() -> None:
        for folder in (home, other):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        create_image(home / "base.vmdk", SIZE)
        with open_chain(home / "base.vmdk", writable=True) as chain:
            chain.write_at(0, NEW)
        create_overlay(other / "top.vmdk", home / "base.vmdk")

    make()
    with calls() as counted:
        remove(home / "base.vmdk", resolver=resolver)
    changes = [at for at, name in enumerate(counted.seen) if name in ("fsync", "replace", "unlink", "open")]
    for at in changes:
        make()
        with calls(Fault(at, errno.EIO, True)), contextlib.suppress(OSError, VmdkSnapError):
            remove(home / "base.vmdk", resolver=resolver)
        for folder in (home, other):
            recover(folder, trusted_dirs=[home, other])
        assert not [path for folder in (home, other) for path in folder.glob(".*")], counted.seen[at]
        with open_chain(other / "top.vmdk", trusted_dirs=[home]) as chain:
            assert chain.read_at(0, len(NEW)) == NEW


def test_a_repair_that_could_not_begin_can_be_asked_for_again(
    origin: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = copy_of(origin, tmp_path / "run")
    unclean_with_leaks(tree)

    def full(operation: Operation) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(operation.path))

    with monkeypatch.context() as patched:
        patched.setattr(Operation, "begin", full)
        with pytest.raises(OSError, match="No space left"):
            _repair(tree)
    _repair(tree)
    assert not check_image(tree.path("image-2"), resolver=confined()).findings
