"""Make the disk of an image larger, or cut off an empty end, in place: no data moves.

A sparse extent that needs more tables gets new directories, with the new tables, after the end of its file; the old
tables stay where they are and the new directories name them too. The first sector of the header switches over.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.chain.chain import open_chain
from qemu_vmdk_snap.chain.change import open_link_for_change
from qemu_vmdk_snap.chain.identity import with_fresh_cid
from qemu_vmdk_snap.chain.link import Link
from qemu_vmdk_snap.chain.needs.dependents import (
    Census,
    require_nobody_new,
    require_one_name,
    require_unneeded,
    search_folders,
)
from qemu_vmdk_snap.chain.needs.own import own_files
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.chain.windows import windows
from qemu_vmdk_snap.errors import FormatError, InvalidRequest, Unsupported
from qemu_vmdk_snap.light import dataclass, replace
from qemu_vmdk_snap.ops.journal.guard import guarded_operation
from qemu_vmdk_snap.ops.journal.recover import settle
from qemu_vmdk_snap.ops.journal.relink import DescriptorChange
from qemu_vmdk_snap.ops.progress import OnProgress, Progress, ignore
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener, open_posix
from qemu_vmdk_snap.storage.opening import open_locked
from qemu_vmdk_snap.storage.record import Operation, from_text, to_text
from qemu_vmdk_snap.units import SECTOR_SIZE, Sector, byte_sectors, round_up, sector_bytes
from qemu_vmdk_snap.vmdk.cowd.extent import CowdExtent
from qemu_vmdk_snap.vmdk.cowd.header import COWD_MAGIC, HEADER_BYTES, CowdHeader
from qemu_vmdk_snap.vmdk.cowd.layout import MAX_FILE_SECTORS as MAX_COWD_SECTORS
from qemu_vmdk_snap.vmdk.descriptor import Descriptor
from qemu_vmdk_snap.vmdk.runs import DATA, HOLE
from qemu_vmdk_snap.vmdk.sparse.extent import MAX_FILE_SECTORS, SparseExtent
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader, check_header

OPERATION: Final = "resize"
MAX_SPLIT_SECTORS: Final = 4194304
"""No extent of a split disk is larger: 2 GiB, as QEMU makes them."""
_FLAT_TYPES: Final = ("FLAT", "VMFS")


@dataclass(frozen=True, slots=True)
class ResizeReport:
    """What a resize did; sizes in bytes."""

    path: Path
    before: int
    after: int

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `image resize --output=json` shows it."""
        return {"filename": str(self.path), "before": self.before, "virtual-size": self.after}


def resize(
    path: Path | str,
    size: int,
    *,
    shrink: bool = False,
    orphans: Sequence[Path | str] = (),
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    on_progress: OnProgress = ignore,
) -> ResizeReport:
    """Make the disk `size` bytes large (rounded up to a sector); what is added reads as zeros. It gets a new CID.

    `shrink` allows a smaller size, where no link of the chain stores anything in what is cut off.

    An overlay may become larger than its parent. An image that something else needs is not resized; `orphans` are files
    that the user gives up.

    Raises:
        InvalidRequest: the disk would shrink, or its last extent is not its own.
        StillNeeded: something else needs the image, or may need it.
        Unsupported: the kind of the image, or of its last extent, cannot grow so far.
        LockBusy: another process has the image open.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    find = resolver or confined(trusted_dirs)
    settle(path.parent, opener=opener, resolver=find)
    with contextlib.ExitStack() as stack:
        link = open_link_for_change(path, resolver=find, opener=opener, stack=stack)
        before, sectors = link.capacity, byte_sectors(size)
        if sectors < link.descriptor.sectors:
            _check_shrinks(link, size, shrink, find, opener)
        if sectors != link.descriptor.sectors:
            files = own_files(link)
            census = Census.of(search_folders(files, find))
            given_up = [Path(one) for one in orphans]
            require_unneeded(path, files, census, orphans=given_up)
            require_one_name(path, files, census, orphans=given_up)
            _set_sectors(link, sectors, lambda: require_nobody_new(path, files, census))
        on_progress(Progress(OPERATION, sector_bytes(sectors), sector_bytes(sectors)))
        return ResizeReport(path, before, sector_bytes(sectors))


def _check_shrinks(link: Link, size: int, allowed: bool, resolver: Resolver, opener: FileOpener) -> None:
    """Refuse to cut off what is stored, or more than the last extent has."""
    path, before, new = link.path, link.capacity, round_up(size, SECTOR_SIZE)
    if not allowed:
        raise InvalidRequest(path, f"would shrink from {before} to {size} bytes (--shrink, where the end is empty)")
    last = link.extents[-1]
    if new <= last.start:
        raise InvalidRequest(path, f"cannot shrink to {size} bytes: its last extent begins at {last.start}")
    if not isinstance(last.extent, SparseExtent):
        line = link.descriptor.extents[-1]
        raise Unsupported(path, f"byte {line.at:#x}: an extent of type {line.type} cannot shrink: convert the image")
    _refuse_stored(link, new, before)
    if link.hint is not None:
        with open_chain(resolver(path, link.hint, "parent"), resolver=resolver, opener=opener) as below:
            for row in below.rows(min(new, below.capacity), max(0, min(before, below.capacity) - new)):
                if row.kind >= DATA:
                    raise InvalidRequest(path, f"cannot shrink to {size} bytes: its parent stores data at {row.offset}")


def _refuse_stored(link: Link, new: int, before: int) -> None:
    for start, stop in windows([link.extents], new, before):
        for row in link.resolve(start, stop).rows():
            if row.kind != HOLE:
                raise InvalidRequest(link.path, f"cannot shrink to {new} bytes: something is stored at {row.offset}")


def _set_sectors(link: Link, sectors: int, still: Callable[[], None]) -> None:
    lines = link.descriptor.extents
    last = lines[-1]
    extent_sectors = last.sectors + sectors - link.descriptor.sectors
    if len(lines) > 1 and extent_sectors > MAX_SPLIT_SECTORS:
        feature = f"byte {last.at:#x}: the last extent cannot grow to {extent_sectors} sectors: convert the image"
        raise Unsupported(link.path, feature)
    extent = link.extents[-1].extent
    file = extent.file
    tables = isinstance(extent, SparseExtent | CowdExtent)
    if file is None or not (tables or last.type in _FLAT_TYPES):
        raise Unsupported(link.path, f"byte {last.at:#x}: an extent of type {last.type} cannot grow")
    changed = with_fresh_cid(
        _with_geometry(with_extent_sectors(link.descriptor, len(lines) - 1, extent_sectors), sectors)
    )
    change = DescriptorChange.plan(link, changed)
    details = {
        "change": change.as_detail(),
        "file": file.path,
        "size": file.size(),
        "header": to_text(file.read_at(0, HEADER_BYTES)) if tables else None,
        "sectors": extent_sectors,
        "offset": last.offset,
        "old_sectors": last.sectors,
    }
    if isinstance(extent, SparseExtent | CowdExtent):
        _plan_tables(extent.header, file, extent_sectors, file.size())  # refuses before anything is recorded
    record = guarded_operation(OPERATION, link.path, [file.path], details)
    with record.hold:
        record.begin_if(still)
        _grow_file(file, record)
        change.apply(link)
        record.end()


def finish_resize(record: Operation, opener: FileOpener) -> None:
    """Finish a resize that another process began."""
    change = DescriptorChange.from_detail(record.details["change"])
    file = open_locked(record.details["file"], opener, writable=True)
    try:
        _grow_file(file, record)
    finally:
        file.close()
    change.redo(opener)


def _grow_file(file: BlockFile, record: Operation) -> None:
    """Make the extent's file fit; this can be repeated."""
    details = record.details
    if details["header"] is None:
        start = sector_bytes(details["offset"])
        file.truncate(max(file.size(), start + sector_bytes(details["sectors"])))
        file.flush()
        return
    raw = from_text(details["header"])
    old: SparseExtentHeader | CowdHeader
    if raw.startswith(COWD_MAGIC):
        old = CowdHeader.parse(raw, path=file.path)
    else:
        old = SparseExtentHeader.parse(raw[:SECTOR_SIZE], path=file.path)
    plan = _plan_tables(old, file, details["sectors"], int(details["size"]))
    _zero_tail(file, old, details["old_sectors"])
    for sector, directory in plan.directories:
        file.write_at(sector_bytes(sector), directory)
    if plan.end > file.size():
        file.truncate(plan.end)
    file.flush()  # barrier: the directories and the zeros of the tables are durable before the header names them
    file.write_at(0, plan.header.serialise()[:SECTOR_SIZE])
    file.flush()


@dataclass(frozen=True, slots=True)
class _TablesPlan:
    header: SparseExtentHeader | CowdHeader
    directories: list[tuple[int, bytes]]
    """(sector, directory); the new tables follow each."""
    end: int


def _plan_tables(old: SparseExtentHeader | CowdHeader, file: BlockFile, sectors: int, size: int) -> _TablesPlan:
    """Return the change that makes an extent whose file had `size` bytes `sectors` large."""
    if isinstance(old, CowdHeader):
        return _plan_cowd(old, file, sectors, size)
    return _plan_sparse(old, file, sectors, size)


def _plan_cowd(old: CowdHeader, file: BlockFile, sectors: int, size: int) -> _TablesPlan:
    header = replace(old, capacity=sectors)
    added = header.tables - old.tables
    if not added:
        return _TablesPlan(header, [], size)
    sector = max(old.free_sector, byte_sectors(size))
    gd_sectors = byte_sectors(header.tables * 4)
    end = sector + gd_sectors + added * old.gt_sectors
    if end + sectors > MAX_COWD_SECTORS:
        raise Unsupported(file.path, f"a vmfsSparse extent cannot hold {sectors} sectors: its file ends below 2 TiB")
    new = range(sector + gd_sectors, end, old.gt_sectors)
    kept = file.read_at(sector_bytes(old.gd_offset), old.tables * 4)
    directory = (kept + struct.pack(f"<{added}I", *new)).ljust(sector_bytes(gd_sectors), b"\0")
    header = replace(header, gd_offset=sector, gd_entries=header.tables, free_sector=end)
    return _TablesPlan(header, [(sector, directory)], sector_bytes(end))


def _plan_sparse(old: SparseExtentHeader, file: BlockFile, sectors: int, size: int) -> _TablesPlan:
    header = replace(old, capacity=sectors)
    check_header(replace(header, gd_offset=1, rgd_offset=0), file.path, 1 << 62)  # only the limits of the counts
    added = header.gd_entries - old.gd_entries
    if added <= 0:
        return _TablesPlan(header, [], size)
    sector = byte_sectors(round_up(size, sector_bytes(old.grain_size)))
    gd_sectors = byte_sectors(header.gd_entries * 4)
    directories: list[tuple[int, bytes]] = []
    places = []
    for offset in [old.rgd_offset, old.gd_offset] if old.redundant else [old.gd_offset]:
        first = sector + gd_sectors
        new = range(first, first + added * header.gt_sectors, header.gt_sectors)
        kept = file.read_at(sector_bytes(offset), old.gd_entries * 4)
        directories.append((sector, (kept + struct.pack(f"<{added}I", *new)).ljust(sector_bytes(gd_sectors), b"\0")))
        places.append(sector)
        sector = Sector(first + added * header.gt_sectors)
    if sector > MAX_FILE_SECTORS:
        raise Unsupported(file.path, f"the tables do not fit: an extent file holds at most {MAX_FILE_SECTORS} sectors")
    header = replace(header, gd_offset=places[-1], rgd_offset=places[0] if old.redundant else old.rgd_offset)
    return _TablesPlan(header, directories, round_up(sector_bytes(sector), sector_bytes(old.grain_size)))


def _zero_tail(file: BlockFile, header: SparseExtentHeader | CowdHeader, sectors: int) -> None:
    """Clear the last grain past the old end of the disk: some writers leave garbage there."""
    inside = sectors % header.grain_size
    if not inside:
        return
    table, index = divmod(sectors // header.grain_size, header.gtes_per_gt)
    entry = sector_bytes(_read_u32(file, sector_bytes(header.gd_offset) + 4 * table)) + 4 * index
    grain = _read_u32(file, entry)
    if grain > 1:
        file.write_at(sector_bytes(grain + inside), bytes(sector_bytes(header.grain_size - inside)))


def _read_u32(file: BlockFile, at: int) -> int:
    return int.from_bytes(file.read_at(at, 4), "little")


def with_extent_sectors(descriptor: Descriptor, number: int, sectors: int) -> Descriptor:
    """Return `descriptor` with another size of the extent `number`; nothing else of its line changes."""
    line = descriptor.extents[number]
    start = line.at - descriptor.base
    found = re.compile(rb"[ \t]*\w+[ \t]+(\d+)").match(descriptor.raw, start)
    if not found:
        raise FormatError(descriptor.path, line.at, "extent", line.sectors, "must give sectors as a decimal number")
    raw = descriptor.raw[: found.start(1)] + str(sectors).encode() + descriptor.raw[found.end(1) :]
    return Descriptor.parse(raw, path=descriptor.path, base=descriptor.base)


def _with_geometry(descriptor: Descriptor, sectors: int) -> Descriptor:
    names = ("ddb.geometry.cylinders", "ddb.geometry.heads", "ddb.geometry.sectors")
    cylinders, heads, track = (descriptor.get(name) or "" for name in names)
    if not (cylinders.isdigit() and heads.isdigit() and track.isdigit() and int(heads) and int(track)):
        return descriptor
    return descriptor.with_values({names[0]: str(min(sectors // (int(heads) * int(track)), 65535))})
