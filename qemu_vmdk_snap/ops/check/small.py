"""The check of a small hosted sparse extent in which nothing is wrong, without NumPy.

It says how many grains are stored and where the file ends, or nothing: an extent with anything to report about it is
left to `tables`, which reports it. The rules are those of `tables`, or stricter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from qemu_vmdk_snap.light import NamedTuple
from qemu_vmdk_snap.ops.check.findings import GrainCounts
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE, byte_sectors, sector_bytes
from qemu_vmdk_snap.vmdk.sparse.header import HeaderFlag, SparseExtentHeader
from qemu_vmdk_snap.vmdk.sparse.small import MAX_TABLES, entries_of

_Stretch = tuple[int, int]
"""First sector, and the one after the last."""


class SmallAudit(NamedTuple):
    """What is known of an extent in which nothing is wrong."""

    counts: GrainCounts
    end: int
    """The byte after the last grain or table that is in use."""


def audit_small(file: BlockFile, header: SparseExtentHeader) -> SmallAudit | None:
    """Return the counts of an extent, or None where it is large, or there may be something to report."""
    if header.gd_entries > MAX_TABLES or header.compressed:
        return None
    copies = [_tables(file, header, place) for place in _places(header)]
    if any(tables is None for tables in copies):
        return None
    tables = [one for one in copies if one is not None]
    metadata = _metadata(header, tables)
    if metadata is None:
        return None
    grains = -(-header.capacity // header.grain_size)
    entries = [_entries(file, header, one, grains) for one in tables]
    if entries[0] is None or any(other != entries[0] for other in entries):
        return None
    lowest = 2 if header.flags & HeaderFlag.ZEROED_GRAINS else 1
    stored = [entry for entry in entries[0] if entry >= lowest]
    in_file = sorted(stored)
    last = file.size() // SECTOR_SIZE - header.grain_size
    if in_file and (in_file[0] < metadata[-1][1] or in_file[-1] > last):
        return None
    if any(after - before < header.grain_size for before, after in pairwise(in_file)):
        return None
    used = [*metadata, *((sector, sector + header.grain_size) for sector in in_file)]
    if any(to - start >= header.grain_size for start, to in _gaps(used, header.overhead, file.size() // SECTOR_SIZE)):
        return None
    jumps = sum(after != before + header.grain_size for before, after in pairwise(stored))
    return SmallAudit(GrainCounts(grains, len(stored), jumps), min(sector_bytes(used[-1][1]), file.size()))


def _places(header: SparseExtentHeader) -> list[int]:
    return [header.gd_offset, header.rgd_offset] if header.redundant else [header.gd_offset]


def _tables(file: BlockFile, header: SparseExtentHeader, place: int) -> list[int] | None:
    """Return where the tables of a directory are; None where one is missing, or outside the file."""
    found = list(entries_of(file.read_at(sector_bytes(place), 4 * header.gd_entries)))
    last = file.size() // SECTOR_SIZE - header.gt_sectors
    whole = len(found) == header.gd_entries and all(0 < sector <= last for sector in found)
    return found if whole else None


def _metadata(header: SparseExtentHeader, copies: Iterable[list[int]]) -> list[_Stretch] | None:
    """Return the stretches of the file that hold no grains, in order; None where two of them overlap."""
    text = header.descriptor_size if header.descriptor_offset else 0
    lengths = [(0, 1), (header.descriptor_offset, text)]
    lengths += [(place, byte_sectors(header.gd_entries * 4)) for place in _places(header)]
    lengths += [(sector, header.gt_sectors) for tables in copies for sector in tables]
    stretches = sorted((start, start + length) for start, length in lengths if length)
    return None if any(before[1] > after[0] for before, after in pairwise(stretches)) else stretches


def _entries(file: BlockFile, header: SparseExtentHeader, tables: list[int], grains: int) -> list[int] | None:
    """Return the entries of all grains; of a table that is a hole of the file they are 0."""
    found: list[int] = []
    for sector in tables:
        at, length = sector_bytes(sector), 4 * header.gtes_per_gt
        if file.next_data(at) >= at + length:
            found += [0] * header.gtes_per_gt
            continue
        raw = file.read_at(at, length)
        if len(raw) != length:
            return None
        found += entries_of(raw)
    return found[:grains]


def _gaps(used: list[_Stretch], floor: int, stop: int) -> Iterator[_Stretch]:
    """Yield what is between stretches that do not overlap, from sector `floor` on, and after the last one."""
    for (_, end), (start, _) in pairwise([*used, (stop, stop)]):
        yield max(end, min(floor, stop)), min(start, stop)
