"""A raw image as the expected content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap import HOLE, RawDisk
from qemu_vmdk_snap.units import SECTOR_SIZE


def is_raw(path: Path | str) -> bool:
    """Return whether the file is taken as a raw image: whole sectors, and no record, which is JSON."""
    with Path(path).open("rb") as file:
        head = file.read(1)
        return head != b"{" and file.seek(0, 2) > 0 and file.tell() % SECTOR_SIZE == 0


class RawReference:
    """The content of a raw image, read as it is asked for."""

    def __init__(self, path: Path | str) -> None:
        """Open it, locked as QEMU locks it.

        Raises:
            OSError, LockBusy: it cannot be read, or is open for writing.
        """
        self._disk = RawDisk(path)
        self.capacity = self._disk.capacity

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from byte `offset` on."""
        return b"".join(self._disk.read_row(row, 0, row.length) for row in self._disk.rows(offset, length))

    def stored(self, end: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what the file has not left out as a hole, in whole sectors, up to byte `end`."""
        for row in self._disk.rows(0, min(end, self.capacity)):
            if row.kind != HOLE:
                start = row.offset // SECTOR_SIZE * SECTOR_SIZE
                yield start, -(-(row.offset + row.length - start) // SECTOR_SIZE) * SECTOR_SIZE

    def close(self) -> None:
        """Let go of the file."""
        self._disk.__exit__(None, None, None)


def differing_sectors(one: bytes, two: bytes) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the stretches of sectors in which two pieces of the same length differ."""
    start = -1
    for at in range(0, len(one), SECTOR_SIZE):
        same = one[at : at + SECTOR_SIZE] == two[at : at + SECTOR_SIZE]
        if not same and start < 0:
            start = at
        if same and start >= 0:
            yield start, at - start
            start = -1
    if start >= 0:
        yield start, len(one) - start
