"""How long to wait: seconds of an idle, ordinary machine, stretched to this one and to what else it is doing."""

from __future__ import annotations

import functools
import os
import time
from typing import Final

VARIABLE: Final = "QEMU_VMDK_SNAP_TIMEOUT_SCALE"
_REFERENCE: Final = 0.012  # seconds that the loop below takes on an ordinary machine
_LONGEST: Final = 20.0


def scaled(seconds: float) -> float:
    """Return `seconds` times what this machine is slower now; the environment's factor comes on top."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    extra = float(os.environ.get(VARIABLE, "1"))
    return seconds * min(_LONGEST, _slowness() * max(1.0, load)) * extra


@functools.cache
def _slowness() -> float:
    """Return how many times slower than the reference this machine is, never below 1; the best of three counts."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        total = 0
        for i in range(200_000):
            total += i
        best = min(best, time.perf_counter() - started)
    return max(1.0, best / _REFERENCE)
