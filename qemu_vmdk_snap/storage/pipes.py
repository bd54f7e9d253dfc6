"""Images that are read from or written to a pipe: bytes in order, without seeking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.storage.blockfile import Buffer

_STEP: Final = 1 << 20
_ZEROS: Final = bytes(_STEP)


class PipeReader:
    """Reads a file descriptor from start to end."""

    def __init__(self, fd: int, path: Path) -> None:
        """Read from `fd`, which the caller closes; `path` is the name to show in messages."""
        self._fd = fd
        self.path = path
        self.position = 0

    def read(self, length: int) -> bytes:
        """Return the next `length` bytes: fewer only where the pipe ends."""
        parts = []
        left = length
        while left and (data := os.read(self._fd, min(left, _STEP))):
            parts.append(data)
            left -= len(data)
        self.position += length - left
        return b"".join(parts)

    def skip(self, length: int) -> None:
        """Skip `length` bytes, or to the end of the pipe."""
        while length > 0 and (data := self.read(min(length, _STEP))):
            length -= len(data)


class PipeWriter:
    """Writes a file descriptor from start to end."""

    def __init__(self, fd: int, path: Path) -> None:
        """Write to `fd`, which the caller closes; `path` is the name to show in messages."""
        self._fd = fd
        self.path = path
        self.position = 0

    def write(self, data: Buffer) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        while view:
            done = os.write(self._fd, view)
            self.position += done
            view = view[done:]

    def zeros_to(self, position: int) -> None:
        """Write zeros up to `position`."""
        while self.position < position:
            self.write(memoryview(_ZEROS)[: min(_STEP, position - self.position)])
