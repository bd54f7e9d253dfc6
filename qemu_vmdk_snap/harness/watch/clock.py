"""The time that a process had for itself: what a deadline for a guest is measured by.

On a loaded machine a guest that is well answers late, since it waits for a processor. The kernel says how long:
`/proc/PID/task/*/schedstat` has the nanoseconds that a thread ran and those that it was ready to run but did not. So a
guest's seconds are those in which it ran, or in which it had nothing to do; waiting for a processor or for the host's
disk does not count. Source: the kernel's Documentation/scheduler/sched-stats.rst.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Final, NamedTuple

from qemu_vmdk_snap.harness.deadlines import scaled

_NANO: Final = 1e-9
_WAITS_FOR_DISK: Final = "D"
_STOPPED: Final = "T"


class _Sum(NamedTuple):
    ran: float
    waited: float
    in_disk_wait: bool


class GuestClock:
    """The seconds of its own that the process `pid` had."""

    def __init__(self, pid: int) -> None:
        self._tasks = Path(f"/proc/{pid}/task")
        self._at = time.monotonic()
        self._sum = self._read()

    def tick(self) -> float:
        """Return the guest's seconds since the last call."""
        now, sums = time.monotonic(), self._read()
        passed, before = now - self._at, self._sum
        self._at, self._sum = now, sums
        if sums is None or before is None:  # a kernel without these numbers: guess by the load
            return passed / scaled(1.0, extra=False)
        ran, waited = max(0.0, sums.ran - before.ran), max(0.0, sums.waited - before.waited)
        if sums.in_disk_wait:
            return min(ran, passed)
        return min(passed, max(ran, passed - waited))

    def _read(self) -> _Sum | None:
        ran = waited = 0
        disk = False
        try:
            for task in self._tasks.iterdir():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
                    one, two, _ = (task / "schedstat").read_text().split()
                    ran, waited = ran + int(one), waited + int(two)
                    disk = disk or _state(task) == _WAITS_FOR_DISK
        except (OSError, ValueError):
            return None
        return _Sum(ran * _NANO, waited * _NANO, disk) if ran else None


def is_stopped(pid: int) -> bool:
    """Return whether a signal has stopped the process, as SIGSTOP does."""
    try:
        return _state(Path(f"/proc/{pid}")) == _STOPPED
    except (OSError, IndexError):  # it is gone
        return False


def _state(process: Path) -> str:
    return (process / "stat").read_text().rpartition(")")[2].split()[0]
