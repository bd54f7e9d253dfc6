"""Does a small file whose header claims all that the format allows take little memory to check and to repair?"""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

LIMIT_KIB: Final = 256 << 10
MAX_TABLES: Final = 32 << 20
Fill = Callable[[int, int], bytes]
"""(entries, sector behind the directories) -> a directory."""


def one_table(count: int, end: int) -> bytes:
    return struct.pack("<I", end) * count


def any_table(count: int, end: int) -> bytes:
    chooser = random.Random(1)
    return struct.pack(f"<{count}I", *(end + chooser.randrange(4000) for _ in range(count)))


def each_a_table(count: int, end: int) -> bytes:
    return struct.pack(f"<{count}I", *range(end, end + 4 * count, 4))


def claim(path: Path, capacity: int, fill: Fill | None, *, grain: int = 128, per_table: int = 512) -> None:
    """Make a small file (in the sense of what it takes on the disk) with such a header, and two equal directories."""
    tables = -(-capacity // (grain * per_table))
    sectors = -(-tables * 4 // 512)
    rgd, gd = 21, 21 + sectors
    end = gd + sectors
    header = struct.pack(
        "<4sIIQQQQIQQQB4sH", b"KDMV", 1, 3, capacity, grain, 1, 20, per_table, rgd, gd, end + 4096, 0, b"\n \r\n", 0
    )
    text = '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicSparse"\n'
    chooser = random.Random(2)
    entries = struct.pack("<512I", *(end + 1000 + chooser.randrange(5000) for _ in range(512)))
    with path.open("wb") as file:
        file.write(header.ljust(512, b"\0") + f'{text}RW {capacity} SPARSE "{path.name}"\n'.encode())
        if fill is not None:
            for place in (rgd, gd):
                file.seek(place * 512)
                file.write(fill(tables, end))
            if fill is not each_a_table:
                file.seek(end * 512)
                file.write(entries * 1000)
        file.truncate((end + (4 * tables if fill is each_a_table else 0) + 8192) * 512)


CLAIMS: Final[dict[str, Callable[[Path], None]]] = {
    "no table": lambda path: claim(path, 1 << 33, None),
    "one table for all": lambda path: claim(path, 1 << 33, one_table),
    "tables over one another": lambda path: claim(path, 1 << 33, any_table),
    "every table a hole": lambda path: claim(path, 1 << 33, each_a_table),
    "the largest directory": lambda path: claim(path, MAX_TABLES * 512 * 128, None),
    "the smallest tables": lambda path: claim(path, MAX_TABLES, None, grain=1, per_table=1),
}


MEASURED: Final = """
import sys
from pathlib import Path
from qemu_vmdk_snap.cli.main import main
status = main(sys.argv[1:])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
sys.stderr.write(f"\\n{peak.split()[1]}")
sys.exit(status)
"""
"""The most memory that the process has had is counted anew with exec, which `ru_maxrss` is not."""


def run(*words: str) -> tuple[int, int]:
    """Run a command and return its exit status and the most memory it had, KiB."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, int(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("name", CLAIMS)
def test_little_memory_is_taken(tmp_path: Path, name: str) -> None:
    path = tmp_path / "claim.vmdk"
    CLAIMS[name](path)
    assert path.stat().st_blocks * 512 < 8 << 20
    status, memory = run("image", "check", str(path))
    assert status in (2, 3)
    assert memory < LIMIT_KIB
    status, memory = run("image", "check", "-r", "all", str(path))
    assert status in (0, 1)
    assert memory < LIMIT_KIB
    assert path.stat().st_blocks * 512 < 64 << 20, "new tables of zeros stay holes"
