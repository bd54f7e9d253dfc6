"""Reading a streamOptimized image from a pipe: grain records in their order, checked against the tables.

A stream with a footer, or with its tables at the end, is read by its markers. The data is complete only if the
tables, which come last, name the very records that came before; so that is compared before the stream has ended well.
Markers of any kind but a grain's give the sectors that follow them, so that unknown ones are ignored, and sectors of
zeros between records are padding.

QEMU's streams have their tables in front and no markers but the grains'. Here the tables lead: what they name must
come, wherever it is, so a stream that stops early is seen to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.storage.pipes import PipeReader
from qemu_vmdk_snap.units import MIB, SECTOR_SIZE, byte_sectors, round_up, sector_bytes
from qemu_vmdk_snap.vmdk.descriptor import MAX_BYTES, Descriptor
from qemu_vmdk_snap.vmdk.foreign import kind_of
from qemu_vmdk_snap.vmdk.sparse.header import (
    GD_AT_END,
    MAGIC,
    MAX_GD_ENTRIES,
    HeaderFlag,
    SparseExtentHeader,
    check_header,
)
from qemu_vmdk_snap.vmdk.stream.extent import max_record
from qemu_vmdk_snap.vmdk.stream.footer import (
    GRAIN_RECORD,
    MARKER,
    MARKER_EOS,
    MARKER_FOOTER,
    MARKER_GD,
    MARKER_GT,
    after_end,
    check_footer,
    check_grain,
)
from qemu_vmdk_snap.vmdk.stream.named import FrontTables, TablesBehind

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
    """Parses a stream: the header and the descriptor at once, then the grains by `records`."""

    def __init__(self, pipe: PipeReader) -> None:
        """Read the header and the descriptor.

        Raises:
            FormatError: they are invalid.
            Unsupported: it is a sparse extent, but not a compressed stream with markers.
        """
        self._pipe = pipe
        self.notes: list[str] = []
        """Faults that do not prevent reading, one line each; complete when `records` has ended."""
        path = pipe.path
        self.header = _read_header(pipe)
        base, size = sector_bytes(self.header.descriptor_offset), sector_bytes(self.header.descriptor_size)
        if not base or size > MAX_BYTES or base + size > sector_bytes(self.header.overhead):
            at = self.header.offset_of("descriptor_offset")
            rule = "must place the descriptor in front of the grains"
            raise FormatError(path, at, "descriptor_offset", self.header.descriptor_offset, rule)
        pipe.skip(base - pipe.position)
        text = pipe.read(size)
        if len(text) < size:
            raise FormatError(path, base, "descriptor", len(text), f"must have {size} bytes: the stream ends early")
        self.descriptor = Descriptor.parse(text, path=path, base=base)
        self.capacity = sector_bytes(self.descriptor.sectors)
        self.grain_bytes = sector_bytes(self.header.grain_size)
        if self.header.gd_offset != GD_AT_END:
            self._check_capacity(self.header, 0)

    def records(self) -> Iterator[GrainRecord]:
        """Yield the grains, whose offsets ascend.

        Raises:
            FormatError: a record is invalid, the grains are not in order, the stream ends too early, or its tables and
                its records differ.
        """
        overhead = sector_bytes(self.header.overhead)
        directory_bytes = self.header.gd_entries * 4
        if self.header.gd_offset != GD_AT_END and sector_bytes(self.header.gd_offset) + directory_bytes <= overhead:
            yield from self._named_records()
        else:
            self._pipe.skip(overhead - self._pipe.position)
            yield from self._marked_records()

    def _named_records(self) -> Iterator[GrainRecord]:
        """Yield what tables in front name."""
        pipe, unit = self._pipe, self.grain_bytes
        tables = FrontTables(pipe, self.header, -(-self.capacity // unit))
        for grain, sector in tables.grains():
            start = sector_bytes(sector)
            if start < pipe.position:
                rule = f"must follow what comes before it, which ends at byte {pipe.position:#x}"
                raise FormatError(pipe.path, start, f"record of grain {grain}", sector, rule)
            pipe.skip(start - pipe.position)
            head = pipe.read(GRAIN_RECORD.size)
            if len(head) < GRAIN_RECORD.size:
                rule = f"must be at byte {start:#x}: the stream ends early"
                raise FormatError(pipe.path, pipe.position, f"record of grain {grain}", None, rule)
            value, size = GRAIN_RECORD.unpack(head)
            if value != grain * self.header.grain_size:
                rule = (
                    f"must be {grain * self.header.grain_size}: a grain table names the record as that of grain {grain}"
                )
                raise FormatError(pipe.path, start, "sector of the grain", value, rule)
            yield GrainRecord(grain * unit, self._data(b"", size, start), start + GRAIN_RECORD.size)
        self._drain(pipe.position)

    def _marked_records(self) -> Iterator[GrainRecord]:
        """Yield what comes, up to the end-of-stream marker."""
        pipe, last = self._pipe, -1
        behind = TablesBehind(pipe.path, self.header, self.descriptor.sectors)
        while True:
            start = pipe.position
            sector = pipe.read(SECTOR_SIZE)
            if len(sector) < SECTOR_SIZE:
                self._end(behind, start)
                return
            value, size, kind = MARKER.unpack_from(sector)
            if not size:
                if value == 0 and kind == MARKER_EOS:
                    if behind.complete:
                        behind.compare()
                        self._drain(pipe.position)
                        return
                    continue  # padding
                self._take_metadata(behind, kind, value, start)
                continue
            offset = value * SECTOR_SIZE
            if offset <= last or offset % self.grain_bytes or offset >= self.capacity:
                rule = (
                    f"must ascend by grains, below {self.capacity // SECTOR_SIZE}: in a pipe nothing else can be read"
                )
                raise FormatError(pipe.path, start, "sector of the grain", value, rule)
            last = offset
            behind.note_record(offset // self.grain_bytes, start)
            data = self._data(sector[GRAIN_RECORD.size :], size, start)
            yield GrainRecord(offset, data, start + GRAIN_RECORD.size)

    def _take_metadata(self, behind: TablesBehind, kind: int, value: int, start: int) -> None:
        """Read what follows a marker that is not a grain's."""
        pipe, at = self._pipe, self._pipe.position
        if kind == MARKER_GT and value == self.header.gt_sectors:
            behind.take_table(at, pipe.read(sector_bytes(value)))
        elif kind == MARKER_GD and value <= byte_sectors(MAX_GD_ENTRIES * 4):
            behind.take_directory(at, pipe.read(sector_bytes(value)))
        elif kind == MARKER_FOOTER and value:
            raw = pipe.read(SECTOR_SIZE)
            if len(raw) < SECTOR_SIZE:
                raise FormatError(pipe.path, at, "footer", len(raw), "must have 512 bytes: the stream ends early")
            footer = SparseExtentHeader.parse(raw, path=pipe.path, base=at)
            check_footer(footer, pipe.path, at, at + SECTOR_SIZE)
            self._check_same(footer, at)
            behind.take_footer(footer, at)
            pipe.skip(sector_bytes(value) - SECTOR_SIZE)
        else:
            pipe.skip(sector_bytes(min(value, _ANY_SIZE)))
        if pipe.position < at + sector_bytes(min(value, _ANY_SIZE)):
            rule = f"must be followed by {value} sectors: the stream ends early"
            raise FormatError(pipe.path, start, "marker", kind, rule)

    def _check_same(self, footer: SparseExtentHeader, at: int) -> None:
        self._check_capacity(footer, at)
        for field in ("grain_size", "gtes_per_gt"):
            mine, theirs = getattr(self.header, field), getattr(footer, field)
            if mine != theirs:
                rule = f"must be the {mine} of the header: a pipe has been read by that"
                raise FormatError(self._pipe.path, at + footer.offset_of(field), field, theirs, rule)
        for field in ("version", "flags", "capacity"):
            mine, theirs = getattr(self.header, field), getattr(footer, field)
            if mine != theirs:
                where = f"byte {footer.offset_of(field):#x}: {field} = {mine}"
                self.notes.append(f"{self._pipe.path}: {where}: the footer's {theirs} is used")

    def _check_capacity(self, header: SparseExtentHeader, at: int) -> None:
        if header.capacity < self.descriptor.sectors:
            rule = f"must be at least the {self.descriptor.sectors} sectors that the descriptor gives the extent"
            raise FormatError(self._pipe.path, at + header.offset_of("capacity"), "capacity", header.capacity, rule)

    def _data(self, begun: bytes, size: int, start: int) -> bytes:
        """Return the data of the record at byte `start`, of which `begun` was read with its head.

        What was begun in whole sectors is read in whole sectors.
        """
        if not 0 < size <= max_record(self.grain_bytes):
            rule = f"must be from 1 to {max_record(self.grain_bytes)} bytes"
            raise FormatError(self._pipe.path, start + 8, "length of the compressed grain", size, rule)
        data = begun[:size]
        if len(data) < size:
            end = GRAIN_RECORD.size + size
            data += self._pipe.read((round_up(end, SECTOR_SIZE) - SECTOR_SIZE) if begun else size)
        if len(data) < size:
            raise FormatError(
                self._pipe.path, start, "grain", len(data), f"must have {size} bytes: the stream ends early"
            )
        return data[:size]

    def _end(self, behind: TablesBehind, position: int) -> None:
        """Handle a pipe that has ended without an end-of-stream marker."""
        if not behind.complete or self.header.gd_offset == GD_AT_END:
            raise FormatError(self._pipe.path, position, "marker", None, "must be there: the stream ends early")
        behind.compare()
        self.notes.append(f"{self._pipe.path}: byte {position:#x}: no end-of-stream marker follows the tables")

    def _drain(self, position: int) -> None:
        """Read to the end of the pipe, so that its writer gets no error; note what is not zeros."""
        zeros = True
        while data := self._pipe.read(MIB):
            zeros = zeros and data.count(0) == len(data)
        if not zeros:
            self.notes.append(after_end(self._pipe.path, position, self._pipe.position - position))


def _read_header(pipe: PipeReader) -> SparseExtentHeader:
    head = pipe.read(SECTOR_SIZE)
    if head[:4] != MAGIC:
        known = kind_of(head)
        rule = "must be b'KDMV': a VMDK from a pipe is a streamOptimized one" + (f"; it is {known}" if known else "")
        raise FormatError(pipe.path, 0, "magic", head[:4], rule)
    header = SparseExtentHeader.parse(head, path=pipe.path)
    check_header(header, pipe.path, _ANY_SIZE)
    if not (header.compressed and header.flags & HeaderFlag.MARKERS):
        raise Unsupported(pipe.path, "only streamOptimized images with markers can be read from a pipe")
    check_grain(header, pipe.path)
    return header
