"""A limit to how many bytes a second a copy stores."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer
from qemu_vmdk_snap.units import MIB

if TYPE_CHECKING:
    from qemu_vmdk_snap.vmdk.grain.bulk import BulkWriter, OnStep

_STEP: Final = MIB


class Pace:
    """Waits so that no more than `rate` bytes a second pass, on the average since the first."""

    def __init__(self, rate: int, wait: Callable[[float], None] = time.sleep) -> None:
        self._rate, self._wait = rate, wait
        self._passed = 0
        self._start: float | None = None

    def passed(self, length: int) -> None:
        """Note that so many bytes were stored, and wait for as long as they were too early."""
        now = time.monotonic()
        if self._start is None:
            self._start = now
        self._passed += length
        early = self._passed / self._rate - (now - self._start)
        if early > 0:
            self._wait(early)


def paced(on_step: Callable[[int], object], rate: int) -> Callable[[int], None]:
    """Return `on_step` with a wait after each step, so that no more than `rate` bytes a second pass; 0 is no limit."""
    pace = Pace(rate) if rate else None

    def step(length: int) -> None:
        on_step(length)
        if pace is not None:
            pace.passed(length)

    return step


class LimitedWriter:
    """A writer of new images that stores at the pace given."""

    def __init__(self, writer: BulkWriter, pace: Pace) -> None:
        self._writer, self._pace = writer, pace

    def put(self, offset: int, length: int, source: BlockFile, source_offset: int, on_step: OnStep) -> None:
        """Copy `length` bytes of `source` to `offset`, a little at a time."""
        for done in range(0, length, _STEP):
            now = min(_STEP, length - done)
            self._writer.put(offset + done, now, source, source_offset + done, on_step)
            self._pace.passed(now)

    def put_bytes(self, offset: int, data: Buffer) -> None:
        """Write `data` to `offset`."""
        self._writer.put_bytes(offset, data)
        self._pace.passed(len(data))

    def finish(self) -> None:
        """Complete the file."""
        self._writer.finish()
