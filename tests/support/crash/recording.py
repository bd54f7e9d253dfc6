"""A disk for tests that remembers every write and barrier, and tells which images a power cut could leave.

The model: writes since the last flush reach the disk in any subset, and any write may be torn at 512-byte sectors. A
change of the file's length counts as a write. What was flushed is there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer

SECTOR: Final = 512
MARK: Final = 0xA5
"""What free space holds before it is written: a table that names unwritten space shows this, not innocent zeros."""


class Write(NamedTuple):
    offset: int
    data: bytes


class RecordingFile:
    """A BlockFile in memory. `log` has the writes in order; None stands for a flush."""

    def __init__(self, path: Path, content: bytes = b"") -> None:
        self._path = path
        self.content = bytearray(content)
        self.durable = bytes(content)
        self.pending: list[Write] = []
        self.log: list[Write | None] = []

    @property
    def path(self) -> Path:
        return self._path

    def size(self) -> int:
        return len(self.content)

    def read_at(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length])

    def read_into(self, offset: int, view: memoryview) -> int:
        data = self.read_at(offset, len(view))
        view[: len(data)] = data
        return len(data)

    def write_at(self, offset: int, data: Buffer) -> None:
        write = Write(offset, bytes(data))
        _apply(self.content, write)
        self.pending.append(write)
        self.log.append(write)

    def truncate(self, size: int) -> None:
        if size < len(self.content):
            raise NotImplementedError("the engine never shortens a file that it writes in place")
        self.write_at(len(self.content), bytes(size - len(self.content)))

    def flush(self) -> None:
        self.durable = bytes(self.content)
        self.pending.clear()
        self.log.append(None)

    def begin_flush(self, offset: int, length: int) -> None:
        pass

    def drop_behind(self, offset: int, length: int) -> None:
        pass

    def discard_range(self, offset: int, length: int) -> bool:
        if length:
            self.write_at(offset, bytes(min(length, max(0, self.size() - offset))))
        return True

    def next_data(self, offset: int) -> int:
        return offset

    def next_hole(self, offset: int) -> int:
        return max(offset, self.size())

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        pass

    def images_after_crash(self, *, limit: int = 200, seed: int = 1) -> Iterator[bytes]:
        """Yield images that a power cut now could leave: all subsets while they are few, else a seeded sample."""
        pieces = [piece for write in self.pending for piece in _sectors(write)]
        length = max(len(self.durable), *(piece.offset + len(piece.data) for piece in pieces), 0) if pieces else 0
        if 1 << len(pieces) <= limit:
            masks: Iterator[tuple[bool, ...]] = itertools.product((False, True), repeat=len(pieces))
        else:
            chooser = random.Random(seed)
            masks = (tuple(chooser.random() < 0.5 for _ in pieces) for _ in range(limit))
        for mask in masks:
            image = bytearray(self.durable)
            # The length may have reached the disk before the data did: what is then not written holds old rubbish.
            image.extend(bytes([MARK]) * max(0, length - len(image)))
            for piece, there in zip(pieces, mask, strict=True):
                if there:
                    _apply(image, piece)
            yield bytes(image)


class RecordingDisk:
    """An opener over files in memory; one opener serves one chain. `files` has them by name."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.files = {name: RecordingFile(Path(name), content) for name, content in contents.items()}

    def __call__(self, path: Path, writable: bool) -> BlockFile:
        return self.files[path.name]


def _apply(image: bytearray, write: Write) -> None:
    end = write.offset + len(write.data)
    if end > len(image):
        image.extend(bytes(end - len(image)))
    image[write.offset : end] = write.data


def _sectors(write: Write) -> Iterator[Write]:
    """Cut a write where it may be torn."""
    start = 0
    while start < len(write.data):
        stop = min(len(write.data), start + SECTOR - (write.offset + start) % SECTOR)
        yield Write(write.offset + start, write.data[start:stop])
        start = stop
