"""Writing a streamOptimized image from start to end, without seeking: to a file or a pipe.

    | header | descriptor | pad | grain records of one table | GT marker | GT | grain records ... | GD marker | GD |
    footer marker | footer | end-of-stream marker |

Version 3 with markers and a footer, as ESXi's import demands. Grains are deflated on all cores, a bounded number ahead
of what has been written. A grain of zeros is not stored.

Source: VMware Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse Extents".
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.light import replace
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer
from qemu_vmdk_snap.units import MIB, SECTOR_SIZE, byte_sectors, round_up, sector_bytes
from qemu_vmdk_snap.vmdk.sparse.header import (
    COMPRESS_DEFLATE,
    GD_AT_END,
    GTES_PER_GT,
    MAGIC,
    NEWLINE_PROBE,
    HeaderFlag,
    SparseExtentHeader,
)
from qemu_vmdk_snap.vmdk.sparse.layout import DESCRIPTOR_SECTORS
from qemu_vmdk_snap.vmdk.stream.compression import deflated
from qemu_vmdk_snap.vmdk.stream.footer import GRAIN_RECORD, MARKER, MARKER_EOS, MARKER_FOOTER, MARKER_GD, MARKER_GT

_MAX_SECTOR: Final = (1 << 32) - 1
_STEP: Final = MIB
_AHEAD_BYTES: Final = 64 * MIB


class StreamWriter:
    """Takes the data of a disk by ascending offsets (bytes) and passes the image, piece by piece, to `write`."""

    def __init__(
        self,
        write: Callable[[bytes], object],
        sectors: int,
        descriptor: bytes,
        path: Path,
        *,
        grain_sectors: int = 128,
        threads: int | None = None,
        store_zeros: bool = False,
    ) -> None:
        """Write the header and the descriptor; `path` is for messages, `threads` defaults to one for each core.

        `store_zeros` keeps grains of zeros, which matter over a parent.
        """
        self._store_zeros = store_zeros
        self._write = write
        self._path = path
        self._capacity = sector_bytes(sectors)
        self._unit = sector_bytes(grain_sectors)
        self._grain = -1
        self._filling = bytearray()
        self._reached = 0
        self._position = 0
        count = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(count, "deflate")
        self._ahead = max(1, min(4 * count, _AHEAD_BYTES // self._unit))
        self._pending: deque[tuple[int, Future[bytes | bytearray]]] = deque()
        self._tables = -(-sectors // (grain_sectors * GTES_PER_GT))
        self._directory = np.zeros(self._tables, "<u4")
        self._table = 0
        self._entries = np.zeros(GTES_PER_GT, "<u4")
        room = max(DESCRIPTOR_SECTORS, byte_sectors(len(descriptor) + SECTOR_SIZE))
        overhead = round_up(1 + room, grain_sectors)
        self._header = _header(sectors, grain_sectors, room, overhead)
        head = self._header.serialise() + descriptor
        self._emit(head.ljust(sector_bytes(overhead), b"\0"))

    def write_run(self, guest_offset: int, data: Buffer) -> None:
        """Add `data` at `guest_offset`, which must not lie before the end of what was added.

        Raises:
            InvalidRequest: it does, or it is past the end of the disk.
            Unsupported: the image would need more than 2^32 sectors.
        """
        view = memoryview(data).cast("B")
        if guest_offset < self._reached or guest_offset + len(view) > self._capacity:
            raise InvalidRequest(self._path, f"{len(view)} bytes at {guest_offset} do not follow in the stream")
        self._reached = guest_offset + len(view)
        while len(view):
            grain, inside = divmod(guest_offset, self._unit)
            if grain != self._grain:
                self._close_grain()
                self._grain = grain
            piece = view[: self._unit - inside]
            self._filling += bytes(inside - len(self._filling))
            self._filling += piece
            view = view[len(piece) :]
            guest_offset += len(piece)

    def finish(self) -> None:
        """Write what is left: the last grains, the tables, the footer and the end-of-stream marker."""
        self._close_grain()
        while self._pending:
            self._write_next()
        self._store_table()
        directory = self._directory.tobytes()
        self._emit_marker(MARKER_GD, byte_sectors(len(directory)))
        gd_offset = self._position // SECTOR_SIZE
        self._emit(directory)
        self._emit_marker(MARKER_FOOTER, 1)
        self._emit(replace(self._header, gd_offset=gd_offset).serialise())
        self._emit_marker(MARKER_EOS, 0)
        self.close()

    def close(self) -> None:
        """End the threads; what was not finished stays unfinished."""
        self._pool.shutdown(cancel_futures=True)

    def _close_grain(self) -> None:
        if self._filling and (self._store_zeros or self._filling.count(0) != len(self._filling)):
            whole = bytes(self._filling).ljust(self._unit, b"\0")
            self._pending.append((self._grain, self._pool.submit(deflated, whole)))
            if len(self._pending) > self._ahead:
                self._write_next()
        self._filling = bytearray()

    def _write_next(self) -> None:
        grain, future = self._pending.popleft()
        data = future.result()
        table, index = divmod(grain, GTES_PER_GT)
        if table != self._table:
            self._store_table()
            self._table = table
        self._entries[index] = self._sector()
        lba = grain * (self._unit // SECTOR_SIZE)
        self._emit(GRAIN_RECORD.pack(lba, len(data)) + data)

    def _store_table(self) -> None:
        if self._entries.any():
            raw = self._entries.tobytes()
            self._emit_marker(MARKER_GT, byte_sectors(len(raw)))
            self._directory[self._table] = self._sector()
            self._emit(raw)
            self._entries = np.zeros(GTES_PER_GT, "<u4")

    def _sector(self) -> int:
        sector = self._position // SECTOR_SIZE
        if sector > _MAX_SECTOR:
            raise Unsupported(self._path, "the data does not fit: an extent file holds at most 2^32 sectors (2 TiB)")
        return sector

    def _emit_marker(self, kind: int, value: int) -> None:
        self._emit(MARKER.pack(value, 0, kind))

    def _emit(self, data: bytes) -> None:
        """Write `data`, padded to whole sectors."""
        padded = data.ljust(round_up(len(data), SECTOR_SIZE), b"\0")
        self._write(padded)
        self._position += len(padded)


def _header(sectors: int, grain_sectors: int, room: int, overhead: int) -> SparseExtentHeader:
    return SparseExtentHeader(
        magic=MAGIC,
        version=3,
        flags=HeaderFlag.NEWLINE_TEST | HeaderFlag.COMPRESSED | HeaderFlag.MARKERS,
        capacity=sectors,
        grain_size=grain_sectors,
        descriptor_offset=1,
        descriptor_size=room,
        gtes_per_gt=GTES_PER_GT,
        rgd_offset=0,
        gd_offset=GD_AT_END,
        overhead=overhead,
        unclean_shutdown=0,
        newline_probe=NEWLINE_PROBE,
        compression=COMPRESS_DEFLATE,
        reserved=bytes(433),
    )


class BulkStream:
    """Fills a streamOptimized image as the other bulk writers fill theirs."""

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer

    def put(
        self, offset: int, length: int, source: BlockFile, source_offset: int, on_step: Callable[[int], None]
    ) -> None:
        """Compress `length` bytes of `source` to `offset`; zeros past the end of the source."""
        for done in range(0, length, _STEP):
            step = min(_STEP, length - done)
            data = source.read_at(source_offset + done, step)
            self._writer.write_run(offset + done, data.ljust(step, b"\0"))
            on_step(step)

    def put_bytes(self, offset: int, data: Buffer) -> None:
        """Compress `data` to `offset`."""
        self._writer.write_run(offset, data)

    def finish(self) -> None:
        """Write the tables and the footer."""
        self._writer.finish()

    def close(self) -> None:
        """End the threads."""
        self._writer.close()
