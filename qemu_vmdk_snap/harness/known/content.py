"""What a disk should read as, kept beside the image and independent of it: only what was written takes memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol, Self, runtime_checkable

from qemu_vmdk_snap import HOLE, InvalidRequest, RawDisk
from qemu_vmdk_snap.units import KIB, SECTOR_SIZE, parse_size, round_up

_CHUNK: Final = 64 * KIB

Size = int | str
"""Bytes: a number, or text as qemu-img takes it: `"64K"`."""


def in_bytes(size: Size) -> int:
    """Return the bytes that `size` names.

    Raises:
        InvalidRequest: it names none.
    """
    try:
        value = parse_size(size) if isinstance(size, str) else size
    except ValueError as error:
        raise InvalidRequest("size", str(error)) from None
    if value < 0:
        raise InvalidRequest("size", f"{value} bytes are less than none")
    return value


@runtime_checkable
class Known(Protocol):
    """An image whose content is known; a `KnownChain` is one."""

    @property
    def top(self) -> Path:
        """The image."""

    @property
    def model(self) -> Content:
        """What should be read from it."""


class Content:
    """The bytes of a disk of `capacity` bytes; what was never written is zeros."""

    def __init__(self, capacity: Size) -> None:
        """Begin with zeros; `capacity` is rounded up to a sector."""
        self.capacity = round_up(in_bytes(capacity), SECTOR_SIZE)
        self._chunks: dict[int, bytearray] = {}

    @classmethod
    def of_raw(cls, path: Path | str) -> Self:
        """Return the content of a raw image.

        Raises:
            OSError, LockBusy: it cannot be read, or is open for writing.
        """
        with RawDisk(path) as disk:
            content = cls(disk.capacity)
            for row in disk.rows():
                if row.kind != HOLE:
                    for skip in range(0, row.length, _CHUNK):
                        content.write(row.offset + skip, disk.read_row(row, skip, min(_CHUNK, row.length - skip)))
        return content

    def write(self, offset: Size, data: bytes) -> None:
        """Write `data` at byte `offset`.

        Raises:
            InvalidRequest: that is not inside the disk.
        """
        at = in_bytes(offset)
        self._check(at, len(data))
        done = 0
        while done < len(data):
            number, start = divmod(at + done, _CHUNK)
            chunk = self._chunks.setdefault(number, bytearray(_CHUNK))
            piece = data[done : done + _CHUNK - start]
            chunk[start : start + len(piece)] = piece
            done += len(piece)

    def read(self, offset: Size, length: Size) -> bytes:
        """Return `length` bytes from byte `offset` on.

        Raises:
            InvalidRequest: they are not inside the disk.
        """
        at, left = in_bytes(offset), in_bytes(length)
        self._check(at, left)
        pieces = []
        while left:
            number, start = divmod(at, _CHUNK)
            size = min(left, _CHUNK - start)
            chunk = self._chunks.get(number)
            pieces.append(bytes(size) if chunk is None else bytes(chunk[start : start + size]))
            at, left = at + size, left - size
        return b"".join(pieces)

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what was written, in whole chunks of 64 KiB, each as long as possible."""
        start = end = 0
        for number in sorted(self._chunks):
            if number * _CHUNK != end and end > start:
                yield start, end - start
            if number * _CHUNK != end or end == start:
                start = number * _CHUNK
            end = (number + 1) * _CHUNK
        if end > start:
            yield start, min(end, self.capacity) - start

    def copy(self) -> Content:
        """Return a content of its own that begins as this one is."""
        other = Content(self.capacity)
        other._chunks = {number: bytearray(chunk) for number, chunk in self._chunks.items()}
        return other

    def __eq__(self, other: object) -> bool:
        """Return whether a guest would read the same."""
        if not isinstance(other, Content) or other.capacity != self.capacity:
            return False
        zeros = bytes(_CHUNK)
        numbers = self._chunks.keys() | other._chunks.keys()
        return all(self._chunks.get(n, zeros) == other._chunks.get(n, zeros) for n in numbers)

    __hash__ = None  # type: ignore[assignment] # it changes

    def _check(self, offset: int, length: int) -> None:
        if offset + length > self.capacity:
            reason = f"bytes {offset} to {offset + length} are not inside the disk of {self.capacity} bytes"
            raise InvalidRequest("content", reason)
