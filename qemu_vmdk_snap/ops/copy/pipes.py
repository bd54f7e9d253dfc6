"""Disks read from a pipe, images written to one, and grains inflated in advance."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from qemu_vmdk_snap.chain.chain import Chain
from qemu_vmdk_snap.chain.disk import Disk, RawDisk
from qemu_vmdk_snap.chain.look import notes
from qemu_vmdk_snap.chain.look.opening import refuse_encrypted
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer
from qemu_vmdk_snap.storage.pipes import PipeReader, PipeWriter
from qemu_vmdk_snap.units import KIB, MIB
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT
from qemu_vmdk_snap.vmdk.runs import COMPRESSED, HOLE, NO_SOURCE, Row
from qemu_vmdk_snap.vmdk.stream.compression import inflated
from qemu_vmdk_snap.vmdk.stream.extent import StreamExtent
from qemu_vmdk_snap.vmdk.stream.reader import GrainRecord, StreamReader

if TYPE_CHECKING:
    from concurrent.futures import Future

_STEP: Final = 4 * MIB
_HOLE_UNIT: Final = 64 * KIB
_AHEAD_BYTES: Final = 64 * MIB

Job = Callable[[], bytes]


def _in_order(jobs: Iterable[tuple[Row, Job | None]], grain_bytes: int) -> Iterator[tuple[Row, bytes | None]]:
    """Yield each row with the result of its job; jobs run on all cores, a bounded number ahead."""
    from concurrent.futures import ThreadPoolExecutor  # takes as long as a small copy

    threads = len(os.sched_getaffinity(0))
    ahead = max(1, min(16 * threads, _AHEAD_BYTES // grain_bytes))
    pending: deque[tuple[Row, Future[bytes] | None]] = deque()
    with ThreadPoolExecutor(threads, "inflate") as pool:
        try:
            for row, job in jobs:
                pending.append((row, None if job is None else pool.submit(job)))
                if len(pending) > ahead:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(item: tuple[Row, Future[bytes] | None]) -> tuple[Row, bytes | None]:
    row, future = item
    return row, None if future is None else future.result()


def rows_with_grains(source: Disk) -> Iterator[tuple[Row, bytes | None]]:
    """Yield the rows of a disk in order, compressed ones with their bytes, which all cores inflate in advance."""
    if isinstance(source, StreamDisk):
        yield from source.rows_with_grains()
    elif isinstance(source, Chain) and (units := _compressed_units(source)):
        yield from _in_order(((row, _grain_job(source, row)) for row in source.rows()), max(units))
    else:
        for row in source.rows():
            yield row, None


def _compressed_units(chain: Chain) -> list[int]:
    extents = [placed.extent for link in chain.links for placed in link.extents]
    return [extent.grain_bytes for extent in extents if isinstance(extent, StreamExtent)]


def _grain_job(chain: Chain, row: Row) -> Job | None:
    if row.kind != COMPRESSED:
        return None
    placed = chain.sources[row.source].placed
    inside = (row.offset - placed.start) % placed.extent.grain_bytes

    def job() -> bytes:
        return placed.extent.read_grain(row.file_offset)[inside : inside + row.length]

    return job


class StreamDisk:
    """A streamOptimized image read from a pipe: a Disk whose rows can be read once, in order."""

    def __init__(self, pipe: PipeReader) -> None:
        """Read the stream's header.

        Raises:
            FormatError, Unsupported: it is not a streamOptimized image.
        """
        self._reader = StreamReader(pipe)
        refuse_encrypted(self._reader.descriptor)
        if self._reader.descriptor.parent_cid != NO_PARENT:
            raise Unsupported(pipe.path, "an image from a pipe cannot have a parent")
        if len(self._reader.descriptor.extents) != 1:
            raise Unsupported(pipe.path, "an image from a pipe must have one extent")
        self.path = pipe.path
        self.capacity = self._reader.capacity
        self._data: tuple[Row, bytes] | None = None

    def rows(self, offset: int = 0, length: int | None = None) -> Iterator[Row]:
        """Yield all runs; each must be read before the next is asked for."""
        if offset or length not in (None, self.capacity):
            raise InvalidRequest(self.path, "a pipe can only be read from its start to its end")
        for row, data in self.rows_with_grains():
            self._data = None if data is None else (row, data)
            yield row

    def rows_with_grains(self) -> Iterator[tuple[Row, bytes | None]]:
        """Yield all runs, stored ones with their bytes."""
        return _in_order(self._jobs(), self._reader.grain_bytes)

    def _jobs(self) -> Iterator[tuple[Row, Job | None]]:
        at = 0
        for record in self._reader.records():
            if record.offset > at:
                yield Row(at, record.offset - at, HOLE, NO_SOURCE, 0), None
            at = min(self.capacity, record.offset + self._reader.grain_bytes)
            yield Row(record.offset, at - record.offset, COMPRESSED, 0, record.position), self._job(record, at)
        if at < self.capacity:
            yield Row(at, self.capacity - at, HOLE, NO_SOURCE, 0), None

    def _job(self, record: GrainRecord, end: int) -> Job:
        unit, path = self._reader.grain_bytes, self.path

        def job() -> bytes:
            data = inflated(record.data, unit, path, record.position)
            return data.ljust(unit, b"\0")[: end - record.offset]

        return job

    def read_row(self, row: Row, skip: int, length: int) -> bytes:
        """Return `length` bytes from byte `skip` of `row`, the last one that `rows` gave."""
        if row.kind == HOLE:
            return bytes(length)
        if self._data is None or self._data[0] != row:
            raise InvalidRequest(self.path, "a pipe can only be read from its start to its end")
        return self._data[1][skip : skip + length]

    def read_row_into(self, row: Row, skip: int, view: memoryview) -> None:
        """Fill `view` with the bytes from byte `skip` of `row`, the last one that `rows` gave."""
        view[:] = self.read_row(row, skip, len(view))

    def file_of(self, row: Row) -> BlockFile | None:
        """Return None: nothing of it is in a file."""
        return None

    def __enter__(self) -> Self:
        """Return the disk itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave the pipe open; report the notes on the stream (`look.notes`)."""
        notes.say(self._reader.notes)


def spooled_raw(pipe: PipeReader, folder: Path) -> RawDisk:
    """Return a raw disk with everything read from a pipe, in an unnamed file in `folder`, as its size must be known."""
    import tempfile  # takes some ms, and most copies need no spool

    with tempfile.NamedTemporaryFile(dir=folder, prefix=".spool-") as file:
        while data := pipe.read(_STEP):
            for start in range(0, len(data), _HOLE_UNIT):
                piece = data[start : start + _HOLE_UNIT]
                if piece.count(0) != len(piece):
                    os.pwrite(file.fileno(), piece, pipe.position - len(data) + start)
        os.ftruncate(file.fileno(), pipe.position)
        return RawDisk(Path(file.name), lock=False)


class BulkPipe:
    """Writes a raw image to a pipe; ranges that are not written are zeros."""

    def __init__(self, pipe: PipeWriter, capacity: int) -> None:
        self._pipe = pipe
        self._capacity = capacity

    def put(
        self, offset: int, length: int, source: BlockFile, source_offset: int, on_step: Callable[[int], None]
    ) -> None:
        """Send `length` bytes of `source` as those at `offset`."""
        for done in range(0, length, _STEP):
            step = min(_STEP, length - done)
            self.put_bytes(offset + done, source.read_at(source_offset + done, step))
            on_step(step)
        self._pipe.zeros_to(offset + length)

    def put_bytes(self, offset: int, data: Buffer) -> None:
        """Send `data` as the bytes at `offset`."""
        self._pipe.zeros_to(offset)
        self._pipe.write(data)

    def finish(self) -> None:
        """Send zeros up to the end of the disk."""
        self._pipe.zeros_to(self._capacity)
