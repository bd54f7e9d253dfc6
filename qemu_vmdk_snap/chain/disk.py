"""The source of whole-disk operations: a VMDK chain, or a raw file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.light import Protocol, Self
from qemu_vmdk_snap.storage.blockfile import BlockFile, PosixFile
from qemu_vmdk_snap.storage.locks import lock_image
from qemu_vmdk_snap.units import SECTOR_SIZE, round_up
from qemu_vmdk_snap.vmdk.runs import DATA, HOLE, Row


class Disk(Protocol):
    """A disk as a guest sees it, and where its bytes are."""

    @property
    def path(self) -> Path:
        """The image that was opened."""

    @property
    def capacity(self) -> int:
        """Guest bytes."""

    def rows(self, offset: int = 0, length: int | None = None) -> Iterator[Row]:
        """Yield the runs of the range in order, without gaps."""

    def read_row(self, row: Row, skip: int, length: int) -> bytes:
        """Return `length` bytes from byte `skip` of `row`."""

    def read_row_into(self, row: Row, skip: int, view: memoryview) -> None:
        """Fill `view` from byte `skip` of `row`, without allocating a buffer."""

    def file_of(self, row: Row) -> BlockFile | None:
        """Return the file that stores `row` as it is, for the kernel to copy from; None where there is none."""

    def __enter__(self) -> Self:
        """Return the disk itself."""

    def __exit__(self, *exc: object) -> None:
        """Cbecome invalid."""


class RawDisk:
    """A raw image, or a block device: guest byte n is byte n of it; a last sector that is not whole is filled up.

    Threads: any number may call every method but `__exit__` at once.
    """

    def __init__(self, path: Path | str, *, lock: bool = True, allow_devices: bool = False) -> None:
        """Open `path` for reading, locked as QEMU locks it unless `lock` is False.

        `allow_devices` lets it be a block device.

        Raises:
            OSError: it cannot be opened.
            Unsupported: it is a block device, and these are not allowed.
            LockBusy: another process writes it.
        """
        self.path = path = Path(path)
        if not allow_devices and path.is_block_device():
            raise Unsupported(path, "is a block device: opened only where that is allowed (--allow-devices)")
        self._file = PosixFile.open(path, devices=allow_devices)
        try:
            if lock:
                lock_image(self._file.fileno(), path, writable=False)
            self._size = self._file.size()
        except BaseException:
            self._file.close()
            raise
        self.capacity = round_up(self._size, SECTOR_SIZE)

    def rows(self, offset: int = 0, length: int | None = None) -> Iterator[Row]:
        """Yield the data and the holes of the file."""
        end = self.capacity if length is None else offset + length
        if offset < 0 or end > self.capacity:
            raise InvalidRequest(
                self.path, f"{end - offset} bytes at {offset} are not inside the disk of {self.capacity} bytes"
            )
        while offset < end:
            data = min(end, self._file.next_data(offset)) if offset < self._size else end
            if data > offset:
                yield Row(offset, data - offset, HOLE, -1, 0)
            if data < end:
                hole = min(end, self._file.next_hole(data))
                hole = end if hole >= self._size else hole
                yield Row(data, hole - data, DATA, 0, data)
                data = hole
            offset = data

    def read_row(self, row: Row, skip: int, length: int) -> bytes:
        """Return `length` bytes from byte `skip` of `row`."""
        data = b"" if row.kind == HOLE else self._file.read_at(row.offset + skip, length)
        return data + bytes(length - len(data))

    def read_row_into(self, row: Row, skip: int, view: memoryview) -> None:
        """Fill `view` from byte `skip` of `row`."""
        done = 0 if row.kind == HOLE else self._file.read_into(row.offset + skip, view)
        if done < len(view):
            view[done:] = bytes(len(view) - done)

    def file_of(self, row: Row) -> BlockFile | None:
        """Return the file where `row` has data."""
        return self._file if row.kind == DATA else None

    def __enter__(self) -> Self:
        """Return the disk itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the file and release the lock."""
        self._file.close()
