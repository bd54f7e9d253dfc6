"""Reading a streamOptimized image from a pipe: grain records in their order, without the tables at its end.

Markers of any kind but a grain's give the sectors that follow them, so that unknown ones are passed over. Streams that
were made in place (QEMU's: tables in front, no markers but the grains') end where the pipe ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.storage.pipes import PipeReader
from qemu_vmdk_snap.units import SECTOR_SIZE, round_up, sector_bytes
from qemu_vmdk_snap.vmdk.descriptor import MAX_BYTES, Descriptor
from qemu_vmdk_snap.vmdk.sparse.header import GD_AT_END, HeaderFlag, SparseExtentHeader, check_header
from qemu_vmdk_snap.vmdk.stream.extent import GRAIN_RECORD, MARKER, MARKER_EOS, check_grain, max_record

_ANY_SIZE: Final = 1 << 62


class GrainRecord(NamedTuple):
    """One stored grain."""

    offset: int
    """Guest byte where the grain begins."""
    data: bytes
    """Deflated."""
    position: int
    """Byte of the stream where `data` begins."""


class StreamReader:
    """Takes a stream apart: the header and the descriptor at once, then the grains by `records`."""

    def __init__(self, pipe: PipeReader) -> None:
        """Read the header and the descriptor.

        Raises:
            FormatError: they cannot be.
            Unsupported: it is a sparse extent, but no compressed stream with markers.
        """
        self._pipe = pipe
        path = pipe.path
        self.header = SparseExtentHeader.parse(pipe.read(SECTOR_SIZE), path=path)
        check_header(self.header, path, _ANY_SIZE)
        if not (self.header.compressed and self.header.flags & HeaderFlag.MARKERS):
            raise Unsupported(path, "only streamOptimized images with markers can be read from a pipe")
        check_grain(self.header, path)
        base, size = sector_bytes(self.header.descriptor_offset), sector_bytes(self.header.descriptor_size)
        if not base or size > MAX_BYTES or base + size > sector_bytes(self.header.overhead):
            at = self.header.offset_of("descriptor_offset")
            rule = "must place the descriptor in front of the grains"
            raise FormatError(path, at, "descriptor_offset", self.header.descriptor_offset, rule)
        pipe.skip(base - SECTOR_SIZE)
        text = pipe.read(size)
        if len(text) < size:
            raise FormatError(path, base, "descriptor", len(text), f"must have {size} bytes: the stream ends early")
        self.descriptor = Descriptor.parse(text, path=path, base=base)
        pipe.skip(sector_bytes(self.header.overhead) - pipe.position)
        self.capacity = sector_bytes(self.descriptor.sectors)
        self.grain_bytes = sector_bytes(self.header.grain_size)

    def records(self) -> Iterator[GrainRecord]:
        """Yield the grains, whose offsets ascend.

        Raises:
            FormatError: a record cannot be, the grains are not in order, or the stream ends too early.
        """
        pipe, last = self._pipe, -1
        while True:
            start = pipe.position
            sector = pipe.read(SECTOR_SIZE)
            if len(sector) < SECTOR_SIZE:
                self._check_end(start)
                return
            value, size, kind = MARKER.unpack_from(sector)
            if not size:
                if kind == MARKER_EOS:
                    return
                pipe.skip(sector_bytes(min(value, _ANY_SIZE)))
                continue
            offset = value * SECTOR_SIZE
            if offset <= last or offset % self.grain_bytes or offset >= self.capacity:
                rule = (
                    f"must ascend by grains, below {self.capacity // SECTOR_SIZE}: in a pipe nothing else can be read"
                )
                raise FormatError(pipe.path, start, "sector of the grain", value, rule)
            last = offset
            yield GrainRecord(offset, self._data(sector, size, start), start + GRAIN_RECORD.size)

    def _data(self, sector: bytes, size: int, start: int) -> bytes:
        if size > max_record(self.grain_bytes):
            rule = f"must be at most {max_record(self.grain_bytes)} bytes"
            raise FormatError(self._pipe.path, start + 8, "length of the compressed grain", size, rule)
        end = GRAIN_RECORD.size + size
        data = sector[GRAIN_RECORD.size : end]
        if end > SECTOR_SIZE:
            data += self._pipe.read(round_up(end, SECTOR_SIZE) - SECTOR_SIZE)
        if len(data) < size:
            raise FormatError(
                self._pipe.path, start, "grain", len(data), f"must have {size} bytes: the stream ends early"
            )
        return data[:size]

    def _check_end(self, position: int) -> None:
        if self.header.gd_offset == GD_AT_END:
            raise FormatError(self._pipe.path, position, "marker", None, "must be there: the stream ends early")
