from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qemu_vmdk_snap import check_image, create_image, create_overlay, open_chain, read_links
from tests.support.qemu import qemu_img
from tests.support.served import ControlError, Served, io, serving

MIB = 1 << 20
SIZE = 8 * MIB
BLOCK = 4096

pytestmark = pytest.mark.needs("libnbd", "qemu-io")


def assert_clean(path: Path) -> None:
    report = check_image(path)
    assert not report.findings, [str(finding) for finding in report.findings]


def read(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, chain.capacity)


def made(folder: Path, depth: int) -> list[Path]:
    """Return the links of a chain, the base first, each with data of its own everywhere."""
    chance = random.Random(depth)
    paths = [folder / f"d{number}.vmdk" for number in range(depth)]
    for number, path in enumerate(paths):
        create_image(path, SIZE) if number == 0 else create_overlay(path, paths[number - 1])
        with open_chain(path, writable=True) as chain:
            for _ in range(40):
                data = chance.randbytes(chance.choice([512, 4096, 65536, 200_000]))
                chain.write_at(chance.randrange(SIZE - len(data)), data)
    return paths


class Writer(threading.Thread):
    """A guest that writes and reads all the while, and knows what is right."""

    def __init__(self, path: Path, model: bytearray) -> None:
        super().__init__()
        self.model, self._path, self._ends = model, path, threading.Event()
        self.failure: BaseException | None = None
        self.count = 0

    def run(self) -> None:
        import nbd

        chance = random.Random(5)
        try:
            handle = nbd.NBD()
            handle.connect_unix(str(self._path))
            while not self._ends.is_set():
                length = chance.choice([512, 4096, 100_000])
                offset = chance.randrange(SIZE - length)
                if chance.random() < 0.5:
                    self.model[offset : offset + length] = data = chance.randbytes(length)
                    handle.pwrite(data, offset)
                elif chance.random() < 0.1:
                    self.model[offset : offset + length] = bytes(length)
                    handle.zero(length, offset)
                else:
                    assert handle.pread(length, offset) == self.model[offset : offset + length]
                self.count += 1
            handle.shutdown()
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        deadline = time.monotonic() + 60
        while self.count <= 20 and self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._ends.set()
        self.join()
        assert self.failure is None, self.failure
        assert self.count > 20


def wait(served: Served, copied: int = SIZE) -> dict[str, Any]:
    """Return what is told of the merge once it has ended, or has copied so many bytes."""
    deadline = time.monotonic() + 60
    while (merge := served.control("status")["merge"])["state"] == "running" and merge["copied"] < copied:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return dict(merge)


@pytest.fixture
def chain(scratch: Path) -> list[Path]:
    return made(scratch, 4)


@pytest.mark.parametrize("deleted", [0, 1, 2])
def test_any_frozen_link_is_deleted_while_a_guest_writes(scratch: Path, chain: list[Path], deleted: int) -> None:
    expected = {path: read(path) for path in chain}
    with serving(chain[-1], scratch) as served:
        writer = Writer(scratch / "s", bytearray(expected[chain[-1]]))
        writer.start()
        served.control("merge", delete=str(chain[deleted]), bytes_per_second=20 * MIB)
        merge = wait(served)
        writer.stop()
        assert merge["state"] == "done", merge
        assert merge["done"] == merge["total"] > 0
        assert merge["into"] == str(chain[deleted + 1])
        left = [path for path in chain if path != chain[deleted]]
        assert served.control("status")["chain"] == [str(path) for path in reversed(left)]
        io(served.uri, "write -P 9 0 64k")
        writer.model[:65536] = b"\x09" * 65536
    assert not chain[deleted].exists()
    assert [link.path for link in read_links(chain[-1])] == left[::-1]
    for path in left:
        assert read(path) == (bytes(writer.model) if path == chain[-1] else expected[path]), path
        assert_clean(path)


def test_a_snapshot_in_the_middle_of_a_merge(scratch: Path, chain: list[Path]) -> None:
    before = read(chain[-1])
    with serving(chain[-1], scratch) as served:
        served.control("merge", delete=str(chain[2]), bytes_per_second=4 * MIB)
        io(served.uri, "write -P 1 0 4k")
        served.control("snapshot", overlay=str(scratch / "new.vmdk"))
        io(served.uri, "write -P 2 0 4k")
        served.control("merge-speed", bytes_per_second=0)
        assert wait(served)["state"] == "done"
        with pytest.raises(ControlError, match="is the top"):
            served.control("merge", delete=str(scratch / "new.vmdk"))
    assert read(chain[-1]) == b"\x01" * 4096 + before[4096:]
    assert read(scratch / "new.vmdk") == b"\x02" * 4096 + before[4096:]
    for path in (chain[1], chain[3], scratch / "new.vmdk"):
        assert_clean(path)


def test_cancelled_and_begun_again(scratch: Path, chain: list[Path]) -> None:
    expected = {path: read(path) for path in chain}
    with serving(chain[-1], scratch) as served:
        for deleted in (2, 1):
            served.control("merge", delete=str(chain[deleted]), bytes_per_second=1000)  # it does not end by itself
            with pytest.raises(ControlError, match="one at a time"):
                served.control("merge", delete=str(chain[0]))
            with pytest.raises(ControlError, match="a merge runs"):
                served.control("switch", top=str(chain[-1]))
            served.control("merge-cancel")
            assert served.control("status")["merge"]["state"] == "cancelled"
        served.control("merge", delete=str(chain[1]))
        assert wait(served)["state"] == "done"
    for path in (chain[0], chain[2], chain[3]):
        assert read(path) == expected[path]
        assert_clean(path)


def test_a_branch_keeps_what_it_reads(scratch: Path, chain: list[Path]) -> None:
    create_overlay(scratch / "branch.vmdk", chain[2])
    with open_chain(scratch / "branch.vmdk", writable=True) as branch:
        branch.write_at(5000, b"branch")
    expected = {path: read(path) for path in (scratch / "branch.vmdk", chain[-1])}
    with serving(chain[-1], scratch) as served:
        served.control("merge", delete=str(chain[2]))
        assert wait(served)["state"] == "done"
    for path, content in expected.items():
        assert read(path) == content
        assert_clean(path)


def test_what_something_else_needs_is_not_deleted(scratch: Path, chain: list[Path]) -> None:
    with serving(chain[-1], scratch) as served:
        with pytest.raises(ControlError, match="no link of the served chain"):
            served.control("merge", delete=str(scratch / "other.vmdk"))
        import nbd

        client = nbd.NBD()
        client.set_export_name(chain[1].name)
        client.connect_unix(str(scratch / "s"))
        with pytest.raises(ControlError, match="1 clients read this export"):
            served.control("merge", delete=str(chain[1]))
        client.shutdown()
        with open_chain(chain[1]), pytest.raises(ControlError, match="lock"):
            served.control("merge", delete=str(chain[1]))
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "vmdk", "-b", chain[1], scratch / "x.qcow2", str(SIZE))
        with pytest.raises(ControlError, match=r"is still needed: .*x.qcow2"):
            served.control("merge", delete=str(chain[1]))
    assert all(path.exists() for path in chain)


@pytest.mark.parametrize(("begun", "deleted"), [(0, 2), (1, 2), (1, 1)])
def test_killed_while_it_merges(scratch: Path, chain: list[Path], begun: int, deleted: int) -> None:
    expected = {path: read(path) for path in chain}
    with serving(chain[-1], scratch) as served:
        io(served.uri, "write -P 1 0 100k")
        served.control("merge", delete=str(chain[deleted]), bytes_per_second=1000)  # it does not end by itself
        wait(served, begun)
        io(served.uri, "write -P 2 5M 100k")
        served.kill()
    top = bytearray(expected[chain[-1]])
    top[: 100 << 10] = b"\x01" * (100 << 10)
    top[5 * MIB : 5 * MIB + (100 << 10)] = b"\x02" * (100 << 10)
    with serving(chain[-1], scratch) as served:
        io(served.uri, "read -P 1 0 100k", "read -P 2 5M 100k")
    assert read(chain[-1]) == top
    for path in chain:
        if path.exists():
            assert path in (chain[-1],) or read(path) == expected[path]
            assert_clean(path)
