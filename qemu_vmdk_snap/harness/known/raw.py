"""A raw image as the expected content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qemu_vmdk_snap import HOLE, FormatError, InvalidRequest, RawDisk
from qemu_vmdk_snap.units import SECTOR_SIZE

_VMDK: Final = (b"KDMV", b"COWD", b"\xbe\xba\xfe\xca", b"# Disk DescriptorFile")


def is_raw(path: Path | str) -> bool:
    """Return whether the file is taken as a raw image: it has bytes, and they are not JSON, as a record is.

    Raises:
        OSError: it cannot be read.
        InvalidRequest: it is a VMDK image.
    """
    with Path(path).open("rb") as file:
        head = file.read(SECTOR_SIZE)
        length = file.seek(0, 2)
    if head.startswith(_VMDK):
        raise InvalidRequest(
            path, "is a VMDK image, not a raw one: `qemu-vmdk-snap image convert -O raw` makes one of it"
        )
    return bool(head) and not head.startswith(b"{") and not (head.startswith(b"[") and length % SECTOR_SIZE)


class RawReference:
    """The content of a raw image, read as it is asked for."""

    def __init__(self, path: Path | str) -> None:
        """Open it, locked as QEMU locks it.

        Raises:
            OSError, LockBusy: it cannot be read, or is open for writing.
        """
        self._path = Path(path)
        self._disk = RawDisk(path)
        self.capacity = self._disk.capacity

    def check_length(self, capacity: int) -> None:
        """Check that the file is not cut inside a sector; it may be inside the last one of a disk of `capacity` bytes.

        Raises:
            FormatError: it is cut.
        """
        length = self._path.stat().st_size
        if length % SECTOR_SIZE and self.capacity != capacity:
            raise FormatError(self._path, length, "length", length, f"a raw image has the {capacity} bytes of the disk")

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
