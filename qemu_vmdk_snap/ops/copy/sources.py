"""What a conversion may read from beside one disk: several, one behind the other, and one that cannot all be read."""

from __future__ import annotations

import bisect
import errno
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self

from qemu_vmdk_snap.chain.disk import Disk
from qemu_vmdk_snap.chain.look import notes
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import KIB, SECTOR_SIZE
from qemu_vmdk_snap.vmdk.runs import Row

_LOST: Final = (errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EBADMSG)
"""What a disk says of what it cannot read; anything else is about the system."""

_STEPS: Final = (64 * KIB, SECTOR_SIZE)
"""How closely a stretch that cannot be read is looked at: first so, then so."""


class JoinedDisk:
    """Several disks, one behind the other, as one; somebody else closes them."""

    def __init__(self, disks: Sequence[Disk]) -> None:
        self._disks = disks
        self._starts = [0, *itertools.accumulate(disk.capacity for disk in disks)]
        self.path: Path = disks[0].path
        self.capacity = self._starts[-1]

    def rows(self, offset: int = 0, length: int | None = None) -> Iterator[Row]:
        """Yield the runs of the range in order, without gaps."""
        end = self.capacity if length is None else offset + length
        for disk, start in zip(self._disks, self._starts, strict=False):
            first, last = max(offset, start), min(end, start + disk.capacity)
            if first < last:
                for row in disk.rows(first - start, last - first):
                    yield row._replace(offset=row.offset + start)

    def read_row(self, row: Row, skip: int, length: int) -> bytes:
        """Return `length` bytes from byte `skip` of `row`."""
        disk, inner = self._of(row)
        return disk.read_row(inner, skip, length)

    def read_row_into(self, row: Row, skip: int, view: memoryview) -> None:
        """Fill `view` from byte `skip` of `row`."""
        disk, inner = self._of(row)
        disk.read_row_into(inner, skip, view)

    def file_of(self, row: Row) -> BlockFile | None:
        """Return the file that stores `row` as it is."""
        disk, inner = self._of(row)
        return disk.file_of(inner)

    def _of(self, row: Row) -> tuple[Disk, Row]:
        number = bisect.bisect_right(self._starts, row.offset) - 1
        return self._disks[number], row._replace(offset=row.offset - self._starts[number])

    def __enter__(self) -> Self:
        """Return the disk itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave the disks open."""


class SalvagedDisk:
    """A disk whose unreadable sectors read as zeros; each stretch of them is said (`chain.notes`)."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.path: Path = disk.path
        self.capacity = disk.capacity

    def rows(self, offset: int = 0, length: int | None = None) -> Iterator[Row]:
        """Yield the runs of the range."""
        return self._disk.rows(offset, length)

    def read_row(self, row: Row, skip: int, length: int) -> bytes:
        """Return `length` bytes from byte `skip` of `row`, zeros for what cannot be read."""
        return self._read(row, skip, length, _STEPS)

    def read_row_into(self, row: Row, skip: int, view: memoryview) -> None:
        """Fill `view` from byte `skip` of `row`."""
        view[:] = self.read_row(row, skip, len(view))

    def file_of(self, row: Row) -> BlockFile | None:
        """Return None: the kernel would stop at the first error."""
        return None

    def _read(self, row: Row, skip: int, length: int, steps: Sequence[int]) -> bytes:
        try:
            return self._disk.read_row(row, skip, length)
        except OSError as error:
            if error.errno not in _LOST:
                raise
            if not steps:
                notes.say([f"{self.path}: {length} bytes at {row.offset + skip} cannot be read: zeros in their place"])
                return bytes(length)
        step = steps[0]
        return b"".join(
            self._read(row, at, min(step, skip + length - at), steps[1:]) for at in range(skip, skip + length, step)
        )

    def __enter__(self) -> Self:
        """Return the disk itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave the disk open."""
