"""The compressed extent (streamOptimized): deflated grains between markers, written once and then only read.

    | header | descriptor | grain record | pad | ... | GT marker | GT | ... | GD marker | GD | footer marker | footer |
    end-of-stream marker |

A grain record is its sector on the guest's disk (u64), the length of its data (u32) and a zlib stream, which may be
longer than the grain. A header whose gdOffset is all ones was written before the tables: the footer counts.

Source: VMware Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse Extents".
"""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk.extent import ExtentSpec, Place
from qemu_vmdk_snap.vmdk.grain.extent import Copy, GrainExtent
from qemu_vmdk_snap.vmdk.grain.tables import Entries, GrainTables, read_directory
from qemu_vmdk_snap.vmdk.runs import COMPRESSED, DATA, Int64s, Kinds
from qemu_vmdk_snap.vmdk.sparse.header import GD_AT_END, HeaderFlag, SparseExtentHeader
from qemu_vmdk_snap.vmdk.stream.compression import inflated
from qemu_vmdk_snap.vmdk.stream.footer import GRAIN_RECORD, check_grain, read_footer


def open_stream(spec: ExtentSpec, file: BlockFile, header: SparseExtentHeader) -> StreamExtent:
    """Open a compressed extent; `header` is what its first sector holds.

    Raises:
        FormatError: neither header nor footer leads to the tables.
        Unsupported: write access.
    """
    if spec.writable:
        raise Unsupported(spec.path, "streamOptimized images are written once, from start to end: convert it to write")
    notes: list[str] = []
    check_grain(header, spec.path)
    if header.gd_offset == GD_AT_END:
        header = read_footer(file, spec.path, header, notes)
    if header.capacity < spec.line.sectors:
        rule = f"must be at least the {spec.line.sectors} sectors that the descriptor gives the extent"
        raise FormatError(spec.path, header.offset_of("capacity"), "capacity", header.capacity, rule)
    extent = StreamExtent(file, spec.path, header, sector_bytes(spec.line.sectors))
    for line in notes:
        extent.notes.add(line, line)
    return extent


class StreamExtent(GrainExtent):
    """One open compressed extent."""

    compressed = True

    def __init__(self, file: BlockFile, path: Path, header: SparseExtentHeader, capacity: int) -> None:
        self.header = header
        directory = read_directory(file, sector_bytes(header.gd_offset), header.gd_entries)
        tables = GrainTables(file, path, directory, entries_per_table=header.gtes_per_gt)
        super().__init__(
            file,
            path,
            [Copy(tables, sector_bytes(header.gd_offset))],
            capacity=capacity,
            grain_bytes=sector_bytes(header.grain_size),
            has_zeroed=bool(header.flags & HeaderFlag.ZEROED_GRAINS),
        )
        self._markers = bool(header.flags & HeaderFlag.MARKERS)

    @property
    def has_markers(self) -> bool:
        """Whether each grain's record has the sector of the disk that it belongs to."""
        return self._markers

    def lookup(self, offset: int) -> Place:
        """Return where the byte at `offset` is; the record of its grain where it is stored."""
        place = super().lookup(offset)
        if place.kind != DATA:
            return place
        return Place(COMPRESSED, place.file_offset - offset % self._grain_bytes, place.length)

    def _decoded(self, first: int, entries: Entries) -> tuple[Kinds, Int64s]:
        kinds, file_offsets = super()._decoded(first, entries)
        self._note_cut_record(file_offsets[kinds == DATA])
        return np.where(kinds == DATA, np.uint8(COMPRESSED), kinds), file_offsets

    def _note_short(self, first: int, kinds: Kinds, file_offsets: Int64s) -> None:
        """Do nothing: a record is as long as it says, not as long as a grain."""

    def _note_cut_record(self, places: Int64s) -> None:
        """Note if the last of these records extends past the end of the file; reading it is refused."""
        if not self._markers or not len(places):
            return
        place = int(places.max())
        head = self._file.read_at(place, GRAIN_RECORD.size)
        length = GRAIN_RECORD.unpack(head.ljust(GRAIN_RECORD.size, b"\0"))[1]
        missing = place + GRAIN_RECORD.size + length - self._file_size
        if missing > 0:
            line = (
                f"{self._path}: byte {place:#x}: grain record of {length} bytes: {missing} bytes of it are past the "
                f"end of the file of {self._file_size} bytes: it was cut short, and the grain cannot be read"
            )
            self.notes.add("record", line, case=place)

    def read_grain(self, file_offset: int) -> bytes:
        """Return the inflated grain whose record is at `file_offset`, filled up with zeros. Safe from any thread.

        Raises:
            FormatError: the record or its data is damaged.
        """
        unit = self._grain_bytes
        start, length = file_offset, 2 * unit
        if self._markers:
            head = self._file.read_at(file_offset, GRAIN_RECORD.size)
            length = GRAIN_RECORD.unpack(head.ljust(GRAIN_RECORD.size, b"\0"))[1]
            start += GRAIN_RECORD.size
            if not 0 < length <= max_record(unit):
                rule = f"must be from 1 to {max_record(unit)} bytes"
                raise FormatError(self._path, file_offset + 8, "length of the compressed grain", length, rule)
        data = inflated(self._file.read_at(start, length), unit, self._path, start)
        return data if len(data) == unit else data + bytes(unit - len(data))


def max_record(grain_bytes: int) -> int:
    """Return the most bytes that a grain's data may take: QEMU's limit, and room for any deflate of a tiny grain."""
    return 2 * grain_bytes + SECTOR_SIZE
