"""Notes on the base of a new overlay: faults that prevent reading it, though it is not read now.

Overlays must be created fast, on images of any size: heads of files and the tables of plain sparse extents are
checked, without NumPy; the rarer kinds are opened.
"""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Iterator

from qemu_vmdk_snap.chain.resolver import Resolver, check_opened
from qemu_vmdk_snap.errors import VmdkSnapError
from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.storage.blockfile import BlockFile, PosixFile
from qemu_vmdk_snap.units import SECTOR_SIZE, sector_bytes
from qemu_vmdk_snap.vmdk import shortfall
from qemu_vmdk_snap.vmdk.descriptor import Descriptor, ExtentLine
from qemu_vmdk_snap.vmdk.noted import Notes
from qemu_vmdk_snap.vmdk.sparse.header import MAGIC, SparseExtentHeader, check_header

_FLAT: Final = ("FLAT", "VMFS")
_MAX_TABLES: Final = 8192
"""Of one extent: 256 GiB of grains of 64 KiB, a tenth of a second. `check` reads all."""


def base_notes(file: BlockFile, descriptor: Descriptor, embedded: bool, find: Resolver) -> list[str]:
    """Return what is wrong with the extents of the image in `file`, of each kind one line; `find` leads to them."""
    notes = Notes()
    for line in descriptor.extents:
        if not embedded and (line.file is None or line.access == "NOACCESS"):
            continue
        try:
            if embedded:
                notes.merge(_of_extent(line, file))
                continue
            extent = PosixFile.open(find(file.path, line.file or "", "extent"))
            try:
                check_opened(find, file.path, extent, "extent")
                notes.merge(_of_extent(line, extent))
            finally:
                extent.close()
        except VmdkSnapError as error:
            notes.add(error.code, str(error))
        except OSError as error:
            notes.add("system", f"{error.filename}: {error.strerror}")
    return list(notes)


def _of_extent(line: ExtentLine, file: BlockFile) -> Notes:
    if line.type in _FLAT:
        start = sector_bytes(line.offset) if line.type == "FLAT" else 0
        return shortfall.of_flat(file.path, file.size(), start, sector_bytes(line.sectors))
    head = file.read_at(0, SECTOR_SIZE)
    if head[:4] == MAGIC:
        header = SparseExtentHeader.parse(head, path=file.path)
        check_header(header, file.path, file.size(), tolerant=True)
        if not header.compressed:
            notes = shortfall.of_sparse(file.path, file.size(), header.overhead, header.offset_of("overhead"))
            for note in itertools.islice(_of_tables(file, header, sector_bytes(line.sectors)), 1):
                notes.add("entry", note)
            return notes
    return _of_rare_extent(line, file)


def _of_rare_extent(line: ExtentLine, file: BlockFile) -> Notes:
    from qemu_vmdk_snap.chain.look.over import look_over  # NumPy
    from qemu_vmdk_snap.vmdk.extent import ExtentSpec, open_extent

    extent = open_extent(ExtentSpec(line, file.path, file, writable=False))
    for refused in look_over(extent):
        extent.notes.add("refused", refused)
    return extent.notes


def _of_tables(file: BlockFile, header: SparseExtentHeader, capacity: int) -> Iterator[str]:
    """Yield what is wrong with the tables of a plain sparse extent of `capacity` bytes: what leads out of the file."""
    path, size = file.path, file.size()
    directory_at, table_bytes = sector_bytes(header.gd_offset), header.gtes_per_gt * 4
    if directory_at + header.gd_entries * 4 > size:
        yield f"{path}: byte {header.offset_of('gd_offset'):#x}: gd_offset = {header.gd_offset}: lies outside the file"
        return
    unit = sector_bytes(header.grain_size)
    for number, sector in enumerate(_entries(file.read_at(directory_at, min(header.gd_entries, _MAX_TABLES) * 4))):
        at = sector_bytes(sector)
        if at + table_bytes > size:
            where = f"byte {directory_at + 4 * number:#x}: grain directory entry {number} = {sector}"
            yield f"{path}: {where}: lies outside the file of {size} bytes"
            return
        if not sector or file.next_data(at) >= at + table_bytes:
            continue
        entries = _entries(file.read_at(at, table_bytes))
        highest = max(entries)
        place = sector_bytes(highest)
        if place + unit <= size:
            continue
        index = entries.index(highest)
        grain = number * header.gtes_per_gt + index
        needed = min(unit, capacity - grain * unit)
        if place >= size:
            where = f"byte {at + 4 * index:#x}: grain table entry {highest} of grain {grain}"
            yield f"{path}: {where}: lies outside the file of {size} bytes"
        elif place + needed > size:
            yield shortfall.of_grain(path, size, place, grain, place + needed - size)


def _entries(raw: bytes) -> array[int]:
    entries = array("I", raw)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries
