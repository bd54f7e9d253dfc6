"""A flush that fails has lost what was written before it, and a disk that is full takes nothing: is all old or new?

The kernel reports a lost page once: whoever flushes again hears of a success. So no later flush of that file may
succeed, no table may name a grain that was lost, and whoever opens the image next reads the old content or the new.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from qemu_vmdk_snap import VmdkSnapError, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.journal.recover import recover
from tests.crash.killed.test_killed_operations import SIZE
from tests.crash.test_faults_everywhere import (
    WORKS,
    Work,
    check_done,
    check_old_or_new,
    fresh,
    model_after,
    open_descriptors,
)
from tests.support.crash.faults import LostPages, losing_pages
from tests.support.qemu import content
from tests.support.tree import Tree

PAGE: Final = 4096
ROOM: Final = (0, 1, 2, 3, 5, 9, 17, 33, 65, 129, 200, 280)
"""Free pages of the full file system."""

pytestmark = pytest.mark.usefixtures("not_durable", "no_server_was_killed")


@pytest.mark.parametrize("work", WORKS, ids=[work.name for work in WORKS])
def test_each_flush_fails_once_and_loses_pages(work: Work, origin: Tree, tmp_path: Path) -> None:
    tree = fresh(origin, tmp_path, work)
    with losing_pages(None) as counted:
        work.run(tree)
    check_done(tree, work)
    lost = 0
    for at in range(counted.flushes):
        tree = fresh(origin, tmp_path, work)
        where = f"flush {at}"
        with losing_pages(at) as disk, pytest.raises((VmdkSnapError, OSError)) as failed:
            work.run(tree)
        lost += disk.lost
        recover(tree.folder)
        work.again(tree)
        assert not [name for name in tree.files() if name.startswith(".")], where
        check_old_or_new(tree, work, f"{where}: {failed.value!r}")
    assert lost


@pytest.mark.parametrize("flushes", [1, 2, 3])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_chain_whose_flush_failed_stores_nothing_more(tmp_path: Path, flushes: int, zeroed: bool) -> None:
    """In this process, and for who opens it next: not by a second flush, nor by one with new data, nor by closing."""
    create_image(tmp_path / "base.vmdk", SIZE)
    with open_chain(tmp_path / "base.vmdk", writable=True) as chain:
        chain.write_at(0, b"old" * (SIZE // 3))
        old = chain.read_at(0, SIZE)
    path = tmp_path / "top.vmdk"
    create_overlay(path, tmp_path / "base.vmdk")
    new = b"new" * 1000
    chain = open_chain(path, writable=True)
    with losing_pages(flushes):  # the first is that of the CID
        failures = 0
        for number in range(6):
            try:
                chain.write_at(number * 65536, new)
                chain.flush()
            except OSError:
                failures += 1
            else:
                assert not failures, "a flush after the one that failed succeeded"
        with pytest.raises(OSError, match="an earlier flush failed"):
            chain.close()
    assert failures
    found_by_next = content(path)
    assert LostPages.MARK * 16 not in found_by_next, "a table names a lost grain"
    kept = 6 - failures
    for number in range(6):
        at = number * 65536
        found = found_by_next[at : at + len(new)]
        assert found in ((new,) if number < kept else (new, old[at : at + len(new)]))
    assert not check_image(path, resolver=confined()).corruptions


@pytest.fixture
def small_fs(scratch: Path) -> Iterator[Path]:
    """Give a file system of a few MiB."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs to mount a tmpfs")
    folder = scratch / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("work", WORKS, ids=[work.name for work in WORKS])
def test_a_full_file_system(work: Work, origin: Tree, small_fs: Path) -> None:
    failures = successes = 0
    for room in ROOM:
        shutil.rmtree(small_fs / "run", ignore_errors=True)
        tree = fresh(origin, small_fs, work)
        fill_up(small_fs, room)
        before = open_descriptors()
        failed = None
        try:
            work.run(tree)
        except (VmdkSnapError, OSError) as error:
            failed = error.with_traceback(None)
        assert open_descriptors() <= before
        (small_fs / "filler").unlink()
        recover(tree.folder)
        work.again(tree)
        where = f"{room} pages free: {failed!r}"
        assert not [name for name in tree.files() if name.startswith(".")], where
        if failed is None:
            successes += 1
            done = model_after(tree, work)
            assert all(tree.read(name) == done.model[name] for name in done.model), where
        else:
            failures += 1
            check_old_or_new(tree, work, where)
    assert successes or failures


def fill_up(folder: Path, room: int) -> None:
    """Leave so many pages of the file system free."""
    with (folder / "filler").open("wb") as filler:
        free = os.statvfs(folder).f_bfree
        assert free > room
        filler.write(bytes((free - room) * PAGE))
