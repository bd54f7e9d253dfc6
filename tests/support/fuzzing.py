"""What the fuzz tests share: how often they try, how bytes and JSON are changed, and what a case may take.

`VMDK_FUZZ_CASES` is how many mutants of each file are tried (the long run of `tox -e fuzz` sets it), `VMDK_FUZZ_SEED`
which ones.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from qemu_vmdk_snap import VmdkSnapError

CASES: Final = int(os.environ.get("VMDK_FUZZ_CASES", "0"))
SEED: Final = os.environ.get("VMDK_FUZZ_SEED", "1")
SECONDS: Final = 1.0
"""Of processor time: a busy machine does not count."""
BYTES: Final = 256 << 20
TELLING: Final = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    1 << 20,
    (1 << 63) - 1,
    1 << 63,
)
WRONG: Final[tuple[object, ...]] = (
    None, True, -1, 0, 1, 1 << 40, 1 << 63, 1 << 200, 1.5, "", "x" * 5000, "\0", "\udc80", "..", "/", "=", [], {}, [[]],
    {"$file": 0}, {"$file": 99}, {"$file": -1},
)  # fmt: skip


def chooser(name: str) -> random.Random:
    """Return the source of chance of one test."""
    return random.Random(f"{SEED} {name}")


def cases(usual: int) -> range:
    """Return the numbers of the cases: as many as asked for, else as many as every day allows."""
    return range(CASES or usual)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Let the block raise our own errors or the system's, and assert that it takes little time and memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = _status("VmRSS"), time.process_time()
    with contextlib.suppress(VmdkSnapError, OSError):
        yield
    taken = time.process_time() - started
    assert taken < SECONDS, f"{taken:.1f} s"
    assert _status("VmHWM") - before < BYTES


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let an allocation that a damaged number asks for fail at once, and not fill the machine."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def mutated(raw: bytes, chance: random.Random, *, head: int = 2200) -> bytes:
    """Change a few values, mostly where headers, tables and footers are; sometimes cut, repeat or move a part."""
    data = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        edges = [chance.randrange(min(len(data), reach)) for reach in (100, head, len(data))]
        at = chance.choice([*edges, len(data) - chance.randrange(1, min(len(data), 1600) + 1)])
        width = chance.choice([1, 4, 8])
        near = int.from_bytes(data[at : at + width], "little") + chance.choice([-1, 1, 128])
        value = chance.choice([chance.choice(TELLING), chance.getrandbits(8 * width), near])
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")[: len(data) - at]
    match chance.randrange(12):
        case 0:
            del data[chance.randrange(len(data)) :]
        case 1:
            at = chance.randrange(len(data))
            data[at:at] = data[: chance.randrange(1, 700)]
        case 2:
            at = chance.randrange(len(data))
            del data[at : at + chance.randrange(1, 700)]
    return bytes(data)


def mutated_text(text: str, chance: random.Random) -> str:
    """Change a text: its characters, words, quotes and lines."""
    for _ in range(chance.randint(1, 4)):
        at, until = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        until = min(until, at + chance.choice([1, 3, 30, 300]))
        piece = chance.choice(
            ["", '"', "'", "<", "&", ">", "=", "\n", "\0", "\r", "é", "-1", "9" * 30, text[at:until] * 3]
        )
        text = (text[:at] + piece + text[until:]) or " "
    return text


def mutated_json(value: Any, chance: random.Random) -> Any:  # noqa: ANN401
    """Return a copy in which one value, somewhere, is another, is gone, or is there under another key."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(sorted(value))
        changed = dict(value)
        match chance.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[chance.choice(["", "$file", "path", "x"])] = changed.pop(key)
            case _:
                changed[key] = mutated_json(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        one = mutated_json(value[at], chance)
        return chance.choice([[*value[:at], one, *value[at + 1 :]], value[:at], [*value, one]])
    if isinstance(value, str) and value and chance.random() < 0.5:
        return mutated_text(value, chance)
    if isinstance(value, int) and chance.random() < 0.5:
        return chance.choice([value + 1, value - 1, -value, *TELLING])
    return chance.choice(WRONG)


def _status(field: str) -> int:
    """Return a line of /proc/self/status that counts KiB, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
