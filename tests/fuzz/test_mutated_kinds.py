"""Do mutated files of every kind give our own errors and nothing else, in bounded time and memory?"""

from __future__ import annotations

import errno
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap import VmdkSnapError, open_chain
from qemu_vmdk_snap.ops.copy.pipes import StreamDisk
from qemu_vmdk_snap.storage.pipes import PipeReader
from tests.oracle.kinds.test_kinds import make
from tests.support.esxi import cowd, descriptor, sesparse

SIZE = 300_000 // 512 * 512
TELLING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF_FFFF, 0xFFFF_FFFF, (1 << 63) - 1, 1 << 63, 1 << 31, 1 << 20]
MUTANTS = 300


def flat(folder: Path) -> Path:
    (folder / "f").write_bytes(b"f" * 4096)
    return descriptor(folder / "a.vmdk", "custom", ['RW 8 FLAT "f" 0', "RW 10 ZERO", 'RDONLY 5 FLAT "f" 3'])


def delta(folder: Path) -> Path:
    cowd(folder / "a-delta.vmdk", 9000, {0: b"a", 5000: b"b", 8999: b"c"})
    return descriptor(folder / "a.vmdk", "vmfsSparse", ['RW 9000 VMFSSPARSE "a-delta.vmdk"'])


def se(folder: Path) -> Path:
    sesparse(folder / "a-sesparse.vmdk", 9000, {0: b"a" * 10, 7: "zero", 1000: b"q" * 4096})
    return descriptor(folder / "a.vmdk", "seSparse", ['RW 9000 SESPARSE "a-sesparse.vmdk"'])


def bare(folder: Path) -> Path:
    cowd(folder / "a.vmdk", 9000, {0: b"a", 5000: b"b"}, generation=3)
    return folder / "a.vmdk"


def of(kind: str) -> Callable[[Path], Path]:
    return lambda folder: make(folder, kind, SIZE, "a.vmdk")


KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "sparse": (of("monolithicSparse"), "a.vmdk"),
    "split": (of("twoGbMaxExtentSparse"), "a-s001.vmdk"),
    "stream": (of("streamOptimized"), "a.vmdk"),
    "cowd": (delta, "a-delta.vmdk"),
    "bare cowd": (bare, "a.vmdk"),
    "sesparse": (se, "a-sesparse.vmdk"),
    "descriptor": (delta, "a.vmdk"),
    "mix": (flat, "a.vmdk"),
}


def mutated(raw: bytes, chooser: random.Random) -> bytes:
    """Change a few values, mostly where headers, tables and footers are; sometimes cut the end off."""
    data = bytearray(raw)
    for _ in range(chooser.randint(1, 4)):
        edges = [chooser.randrange(min(len(data), reach)) for reach in (100, 2200, len(data))]
        at = chooser.choice([*edges, len(data) - chooser.randrange(1, min(len(data), 1600))])
        width = chooser.choice([1, 4, 8])
        near = int.from_bytes(data[at : at + width], "little") + chooser.choice([-1, 1, 128])
        value = chooser.choice([chooser.choice(TELLING), chooser.getrandbits(8 * width), near])
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")[: len(data) - at]
    return bytes(data[: chooser.randrange(len(data))] if chooser.random() < 0.1 else data)


def use(path: Path) -> None:
    """Open, map and read; then write, whatever may be written."""
    with open_chain(path) as chain:
        for number, run in enumerate(chain.map(0, min(chain.capacity, 1 << 30))):
            if number < 20:
                chain.read_at(run.offset, min(run.length, 4096))
    with open_chain(path, writable=True) as chain:
        chain.write_at(chain.capacity // 2, b"w" * min(700, chain.capacity // 2))


def use_as_pipe(path: Path) -> None:
    with path.open("rb") as file:
        for number, _ in enumerate(StreamDisk(PipeReader(file.fileno(), path)).rows_with_grains()):
            if number == 50:
                break


@pytest.fixture
def bounded() -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", KINDS)
def test_only_our_errors(tmp_path: Path, name: str) -> None:
    build, file = KINDS[name]
    path, target = build(tmp_path), tmp_path / file
    raw = target.read_bytes()
    chooser = random.Random(name)
    refused = 0
    for _ in range(MUTANTS):
        target.write_bytes(mutated(raw, chooser))
        started = time.process_time()
        for work in (use, use_as_pipe) if name == "stream" else (use,):
            try:
                work(path)
            except (VmdkSnapError, FileNotFoundError):
                refused += 1
            except OSError as error:
                if error.errno != errno.EINVAL:  # a name that leads to a folder
                    raise
        assert time.process_time() - started < 5
    assert refused > MUTANTS // 10
