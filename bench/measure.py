"""Runs a command as a process of its own and tells its wall time and its peak memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

OURS: Final = str(Path(sys.executable).with_name("qemu-vmdk-snap"))


_SPAWN: Final = Path(__file__).with_name("spawn.py")


class Taken(NamedTuple):
    """What one process took."""

    seconds: float
    peak_bytes: int


def timed(words: Sequence[object], *, output: Path | None = None) -> Taken:
    """Run `words` to the end.

    Raises:
        RuntimeError: the command failed.
    """
    command = [str(word) for word in words]
    helper = [sys.executable, "-I", "-S", str(_SPAWN), str(output or os.devnull), *command]
    done = subprocess.run(helper, capture_output=True, text=True, check=True)
    status, seconds, peak = done.stdout.split()
    if status != "0":
        raise RuntimeError(f"{' '.join(command)}: status {status}: {done.stderr}")
    return Taken(float(seconds), int(peak))


def repeated(run: Callable[[], Taken], prepare: Callable[[], None] | None, times: int) -> Taken:
    """Run so many times, each after `prepare`; return the median time and the highest peak."""
    taken = []
    for _ in range(times):
        if prepare is not None:
            prepare()
        taken.append(run())
    return Taken(statistics.median(one.seconds for one in taken), max(one.peak_bytes for one in taken))
