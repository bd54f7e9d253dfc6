"""Finding the footer of a stream in a file: the header that its writer completes at the end.

    ... | GD marker | GD | footer marker | footer | end-of-stream marker | what a transfer or a store has added

Its place is 1024 bytes before the end. Where something follows, or where another stream has been appended, whose footer
is at the end and names tables that are not in this one, the markers are followed from the start.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from qemu_vmdk_snap.errors import FormatError, Unsupported
from qemu_vmdk_snap.light import Final, NamedTuple
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import KIB, MIB, SECTOR_SIZE, byte_sectors, round_up, sector_bytes
from qemu_vmdk_snap.vmdk.sparse.header import GD_AT_END, MAGIC, SparseExtentHeader, check_header

MARKER: Final = struct.Struct("<QII")
"""value, size, type; size != 0 makes it a grain record, whose data begins where the type is."""

GRAIN_RECORD: Final = struct.Struct("<QI")
MARKER_EOS, MARKER_GT, MARKER_GD, MARKER_FOOTER = range(4)
MAX_GRAIN_SECTORS: Final = (16 * MIB) // SECTOR_SIZE
_FOOTER_SEARCH: Final = 64 * KIB
_STEP: Final = MIB


class _Footer(NamedTuple):
    at: int
    """Byte of the file where it begins."""
    header: SparseExtentHeader


def check_grain(header: SparseExtentHeader, path: Path) -> None:
    """Refuse grains that are too large to be held in memory a few at a time; all known writers have 64 KiB."""
    if header.grain_size > MAX_GRAIN_SECTORS:
        feature = f"byte 0x14: grain_size = {header.grain_size}: compressed grains above 16 MiB are not supported"
        raise Unsupported(path, feature)


def check_footer(footer: SparseExtentHeader, path: Path, at: int, file_size: int) -> None:
    """Check the footer at byte `at` of a stream.

    Raises:
        FormatError: it names no grain directory, or an invalid one.
        Unsupported: its grains are too large.
    """
    check_header(footer, path, file_size)
    check_grain(footer, path)
    if footer.gd_offset == GD_AT_END:
        rule = "must give the place of the grain directory"
        raise FormatError(path, at + footer.offset_of("gd_offset"), "gd_offset", footer.gd_offset, rule)


def read_footer(file: BlockFile, path: Path, header: SparseExtentHeader, notes: list[str]) -> SparseExtentHeader:
    """Return the header in the footer of a stream.

    Differences from `header`, and other faults, are added to `notes`.

    Raises:
        FormatError: there is none that fits: the stream was cut short, or is not a stream.
        Unsupported: its grains are too large.
    """
    size = file.size()
    found = _last_footer(file, path, header, size) or _first_footer(file, path, header, size)
    check_footer(found.header, path, found.at, size)
    _note_end(file, path, found.at + SECTOR_SIZE, size, notes)
    for column in SparseExtentHeader.columns():
        mine, theirs = getattr(header, column.name), getattr(found.header, column.name)
        if column.name in ("version", "flags", "capacity", "grain_size", "gtes_per_gt") and mine != theirs:
            notes.append(f"{path}: byte {column.offset:#x}: {column.name} = {mine}: the footer's {theirs} is used")
    return found.header


def _last_footer(file: BlockFile, path: Path, header: SparseExtentHeader, size: int) -> _Footer | None:
    """Return the footer in the last 64 KiB if there is one that can be this stream's."""
    start = max(0, size - size % SECTOR_SIZE - _FOOTER_SEARCH)
    tail = file.read_at(start, size - start)
    for at in range(len(tail) - len(tail) % SECTOR_SIZE - SECTOR_SIZE, SECTOR_SIZE - 1, -SECTOR_SIZE):
        _, length, kind = MARKER.unpack_from(tail, at - SECTOR_SIZE)
        if tail[at : at + 4] == MAGIC and length == 0 and kind == MARKER_FOOTER:
            footer = SparseExtentHeader.parse(tail[at : at + SECTOR_SIZE], path=path, base=start + at)
            return _Footer(start + at, footer) if _ends_here(footer, header, start + at) else None
    return None


def _ends_here(footer: SparseExtentHeader, header: SparseExtentHeader, at: int) -> bool:
    """Return whether a footer at byte `at` names a directory just before itself.

    One of another stream, appended to this one, gives a place that is off by the length of this one: by more than its
    overhead. Other faults of the place are found by `check_footer`.
    """
    if footer.gd_offset == GD_AT_END or footer.gd_entries * 4 > at:
        return True
    end = sector_bytes(footer.gd_offset + byte_sectors(footer.gd_entries * 4))
    return at - SECTOR_SIZE - end < max(SECTOR_SIZE, sector_bytes(header.overhead))


def _first_footer(file: BlockFile, path: Path, header: SparseExtentHeader, size: int) -> _Footer:
    """Return the footer to which the markers lead from the front."""
    for at, value, length, kind in walk(file, sector_bytes(header.overhead), size):
        if length == 0 and kind == MARKER_FOOTER and value:
            footer = SparseExtentHeader.parse(file.read_at(at + SECTOR_SIZE, SECTOR_SIZE), path=path, base=at)
            return _Footer(at + SECTOR_SIZE, footer)
    rule = "needs a footer at the end that gives its place: the stream was cut short, or lost its end"
    raise FormatError(path, header.offset_of("gd_offset"), "gd_offset", header.gd_offset, rule)


def walk(file: BlockFile, at: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (byte of the file, value, size, type) of each marker from byte `at` on; sectors of zeros are ignored."""
    while at + SECTOR_SIZE <= size:
        value, length, kind = MARKER.unpack(file.read_at(at, MARKER.size))
        if not (value or length or kind):
            # The rest of a damaged sector may contain data: it is where the zeros end.
            at = max(at + SECTOR_SIZE, _after_zeros(file, at, size))
            continue
        yield at, value, length, kind
        at += round_up(GRAIN_RECORD.size + length, SECTOR_SIZE) if length else SECTOR_SIZE + sector_bytes(value)


def _after_zeros(file: BlockFile, at: int, size: int) -> int:
    """Return the first sector from byte `at` on that is not zeros, or the end of the file."""
    while (at := file.next_data(at)) < size:
        at -= at % SECTOR_SIZE
        block = file.read_at(at, _STEP)
        zeros = len(block) - len(block.lstrip(b"\0"))
        if zeros < len(block):
            return at + zeros - zeros % SECTOR_SIZE
        at += len(block)
    return size


def _note_end(file: BlockFile, path: Path, at: int, size: int, notes: list[str]) -> None:
    """Note what is missing after the footer, which ends at byte `at`, or follows the end-of-stream marker."""
    marker = file.read_at(at, SECTOR_SIZE)
    if len(marker) < SECTOR_SIZE or any(marker):
        notes.append(f"{path}: byte {at:#x}: no end-of-stream marker follows the footer")
    elif _after_zeros(file, at, size) < size:
        notes.append(after_end(path, at + SECTOR_SIZE, size - at - SECTOR_SIZE))


def after_end(path: Path, at: int, length: int) -> str:
    """Return the note on `length` bytes that follow the end of the stream at byte `at`."""
    return f"{path}: byte {at:#x}: {length} bytes that follow the end of the stream are ignored"
