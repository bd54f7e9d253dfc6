"""How long to wait: seconds of an idle, ordinary machine, stretched to this one and to what else it is doing."""

from __future__ import annotations

import functools
import os
import time
from typing import Final

from qemu_vmdk_snap.errors import InvalidRequest

VARIABLE: Final = "QEMU_VMDK_SNAP_TIMEOUT_SCALE"
HUNG_SECONDS: Final = 2.0
"""Seconds of its own time (see `watch.clock`) after which a guest that shows no sign of life hangs."""

SYSTEM_SECONDS: Final = 300.0
"""The same for a whole system that boots, which may well be silent: what it may take in all."""

SILENT_SECONDS: Final = 30.0
"""How long such a system may show no sign of life, unless its processor has been halted for good."""

_REFERENCE: Final = 0.012  # seconds that the loop below takes on an ordinary machine
_LONGEST: Final = 20.0


def scaled(seconds: float, *, extra: bool = True) -> float:
    """Return `seconds` times what this machine is slower now; the environment's factor comes on top with `extra`."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return seconds * min(_LONGEST, _slowness() * max(1.0, load)) * (timeout_scale() if extra else 1.0)


def timeout_scale() -> float:
    """Return the factor for all deadlines that the environment asks for, 1 without one.

    Raises:
        InvalidRequest: it is not a positive number.
    """
    text = os.environ.get(VARIABLE, "1")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InvalidRequest(VARIABLE, f"{text!r} is not a positive number")
    return value


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
