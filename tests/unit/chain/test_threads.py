"""May several threads use one open chain, as docs/api.md says?"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, RawDisk, convert, create_image, create_overlay, open_chain

THREADS = 6
SLICE = 512 << 10
SIZE = THREADS * SLICE


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    create_image(tmp_path / "base.vmdk", SIZE, durable=False)
    with open_chain(tmp_path / "base.vmdk", writable=True) as chain:
        chain.write_at(0, random.Random(0).randbytes(SIZE // 2))
    create_overlay(tmp_path / "top.vmdk", tmp_path / "base.vmdk", durable=False)
    return tmp_path / "top.vmdk"


def at_once(work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, number) for number in range(THREADS)]:
            done.result()


def test_threads_write_read_map_and_flush_one_chain(top: Path) -> None:
    """Each in a slice of its own, whose first and last sectors share grains with the neighbours' slices."""
    with open_chain(top) as chain:
        model = bytearray(chain.read_at(0, SIZE))
    edge = 40 << 10
    slices = [range(max(0, n * SLICE - edge), min(SIZE, (n + 1) * SLICE - edge)) for n in range(THREADS)]
    with open_chain(top, writable=True) as writable:

        def work(number: int) -> None:
            mine, rng = slices[number], random.Random(number)
            for turn in range(60):
                length = rng.randrange(1, 3000)
                offset = rng.randrange(mine.start, mine.stop - length)
                data = rng.randbytes(length)
                writable.write_at(offset, data)
                model[offset : offset + length] = data
                assert writable.read_at(offset, length) == data
                if turn % 20 == number:
                    writable.flush()
                    assert sum(run.length for run in writable.map()) == SIZE

        at_once(work)
        covered = slices[-1].stop
        assert writable.read_at(0, covered) == bytes(model[:covered])
    with open_chain(top) as chain:
        assert chain.read_at(0, SIZE) == bytes(model)


@pytest.mark.parametrize("kind", ["chain", "streamOptimized", "raw"])
def test_threads_read_one_disk(top: Path, kind: str) -> None:
    with open_chain(top) as chain:
        whole = chain.read_at(0, SIZE)
        copy = top.with_name("copy")
        if kind == "streamOptimized":
            convert(chain, copy, options=ImageOptions(subformat=kind), durable=False)
        elif kind == "raw":
            convert(chain, copy, output_format="raw", durable=False)
    with RawDisk(copy) if kind == "raw" else open_chain(top if kind == "chain" else copy) as disk:

        def work(number: int) -> None:
            rng = random.Random(number)
            for _ in range(60):
                length = rng.randrange(1, 3000)
                offset = rng.randrange(SIZE - length)
                parts = [disk.read_row(row, 0, row.length) for row in disk.rows(offset, length)]
                assert b"".join(parts) == whole[offset : offset + length]

        at_once(work)
