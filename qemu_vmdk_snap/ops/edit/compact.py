"""Make the file of an image as small as its data: without leaked grains, and without grains that hold but zeros.

The extent is written anew beside the old one and takes its name in one step; until then nothing has changed. The
content, the CID and the parent stay, so that everything above keeps reading what it read. It needs space for the new
file; on a file system with reflinks it needs nearly none.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from qemu_vmdk_snap.chain.chain import Chain, open_links
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.chain.windows import ROW_GRAINS, extent_windows
from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.ops.copy.transfer import STEP, View
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener, PosixFile, open_posix
from qemu_vmdk_snap.storage.durable import sync_folder
from qemu_vmdk_snap.storage.intent import Intent, make_intent
from qemu_vmdk_snap.units import sector_bytes
from qemu_vmdk_snap.vmdk.bulk import BulkSparse
from qemu_vmdk_snap.vmdk.cowd.extent import CowdExtent
from qemu_vmdk_snap.vmdk.cowd.layout import lay_out_anew
from qemu_vmdk_snap.vmdk.cowd.writer import BulkCowd
from qemu_vmdk_snap.vmdk.extent import PlacedExtent
from qemu_vmdk_snap.vmdk.runs import DATA, ZERO, Row
from qemu_vmdk_snap.vmdk.sparse.extent import SparseExtent
from qemu_vmdk_snap.vmdk.sparse.header import GTES_PER_GT, HeaderFlag
from qemu_vmdk_snap.vmdk.sparse.layout import plan_sparse, write_sparse

OPERATION: Final = "compact"

Compactable = SparseExtent | CowdExtent


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What compacting did; sizes of the image's files in bytes."""

    path: Path
    before: int
    after: int


def compact(
    path: Path | str,
    *,
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    on_progress: OnProgress = ignore,
) -> CompactReport:
    """Drop what the image stores for nothing. An extent that would not become smaller is left as it is.

    A grain of zeros goes where the parent reads zeros too, or where the kind can mark it as zeros.

    Raises:
        Unsupported: the image is of a kind that has no grains to drop.
        LockBusy: another process has the image open, or writes one of its parents.
        CidMismatch, CorruptChain, FormatError, OSError: the chain cannot be opened.
    """
    from qemu_vmdk_snap.ops.journal.recover import settle

    path = Path(path)
    settle(path.parent, opener=opener)
    find = resolver or confined()
    with open_links(path, writable_depths=[0], resolver=find, opener=opener) as chain:
        top = chain.links[0]
        before = sum(file.size() for file in top.files)
        pairs = [(placed, _compactable(path, placed)) for placed in top.extents if placed.extent.file is not None]
        temporaries = {extent.file.path: _temporary(extent.file.path) for _, extent in pairs}
        details = {"temporaries": [str(temporary.resolve()) for temporary in temporaries.values()]}
        intent = make_intent(OPERATION, path, list(temporaries), details)
        intent.begin()
        after = before
        try:
            meter = Meter(OPERATION, chain.capacity, on_progress)
            for placed, extent in pairs:
                after -= _rewrite(chain, placed, extent, temporaries[extent.file.path], meter)
        finally:
            _discard(details["temporaries"])
            intent.end()
        return CompactReport(path, before, after)


def undo_compact(intent: Intent, opener: FileOpener) -> None:
    """Take back a compacting that somebody else began: what has its name already is complete."""
    _discard(intent.details["temporaries"])


def _compactable(path: Path, placed: PlacedExtent) -> Compactable:
    extent = placed.extent
    if isinstance(extent, CowdExtent):
        return extent
    if not isinstance(extent, SparseExtent) or extent.header.gtes_per_gt != GTES_PER_GT:
        raise Unsupported(path, "only images of sparse extents can be compacted")
    return extent


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.compact.tmp")


def _discard(paths: list[str]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


def _rewrite(chain: Chain, placed: PlacedExtent, extent: Compactable, temporary: Path, meter: Meter) -> int:
    """Write the extent anew and let it take the old one's place, if it is smaller; return by how many bytes."""
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    new = PosixFile(fd, temporary)
    old = extent.file
    try:
        _fill(chain, placed, extent, new, meter)
        saved = old.size() - new.size()
        if saved <= 0:
            return 0
        _take_attributes(old, fd)
        os.fsync(fd)  # barrier: the file is complete on disk before it takes the name
        temporary.replace(old.path)
        sync_folder(temporary.parent)
        return saved
    finally:
        new.close()


def _fill(chain: Chain, placed: PlacedExtent, extent: Compactable, new: BlockFile, meter: Meter) -> None:
    file = extent.file
    writer, zeroed = _new_extent(extent, new)
    below = View(chain, 1)
    for row in _rows(extent):
        if row.kind == ZERO:
            if not below.is_zero(placed.start + row.offset, row.length):
                writer.mark_zeros(row.offset, row.length)
        elif row.kind == DATA:
            for part, zeros in _grains_of(extent, row):
                if not zeros:
                    writer.put(part.offset, part.length, file, part.file_offset, meter.step)
                elif below.is_zero(placed.start + part.offset, part.length):
                    continue
                elif zeroed:
                    writer.mark_zeros(part.offset, part.length)
                else:
                    writer.put(part.offset, part.length, file, part.file_offset, meter.step)
        meter.reach(placed.start + row.offset + row.length)
    writer.finish()


def _new_extent(extent: Compactable, new: BlockFile) -> tuple[BulkSparse, bool]:
    """Write an extent like the old one without its grains; return what fills it, and whether it can mark zeros."""
    if isinstance(extent, CowdExtent):
        cowd = lay_out_anew(extent.header, extent.file.path)
        cowd.create(new)
        return BulkCowd(new, cowd), False
    header = extent.header
    size = sector_bytes(header.descriptor_size)
    place = sector_bytes(header.descriptor_offset)
    raw = extent.file.read_at(place, size).rstrip(b"\0") if place else None
    zeroed = bool(header.flags & HeaderFlag.ZEROED_GRAINS)
    layout = plan_sparse(header.capacity, grain_sectors=header.grain_size, zeroed_grains=zeroed, descriptor=raw)
    write_sparse(new, layout, raw)
    return BulkSparse(new, layout), zeroed


def _rows(extent: Compactable) -> Iterator[Row]:
    for start, stop in extent_windows(extent, ROW_GRAINS):
        yield from extent.resolve(start, stop).rows()


def _grains_of(extent: Compactable, row: Row) -> Iterator[tuple[Row, bool]]:
    """Yield the stretches of whole grains of a stored run, and whether they hold zeros alone."""
    unit, file = extent.grain_bytes, extent.file
    pending: tuple[Row, bool] | None = None
    step = max(STEP, unit)
    for skip in range(0, row.length, step):
        length = min(step, row.length - skip)
        data = file.read_at(row.file_offset + skip, length)
        data += bytes(-len(data) % unit)
        zeros = np.frombuffer(data, np.uint8).reshape(-1, unit).max(axis=1) == 0
        edges = [0, *(np.flatnonzero(np.diff(zeros)) + 1).tolist(), len(zeros)]
        for first, last in itertools.pairwise(edges):
            start, stop = skip + first * unit, min(row.length, skip + last * unit)
            part = Row(row.offset + start, stop - start, DATA, row.source, row.file_offset + start)
            if pending is not None and pending[1] == bool(zeros[first]):
                pending = pending[0]._replace(length=pending[0].length + part.length), pending[1]
                continue
            if pending is not None:
                yield pending
            pending = part, bool(zeros[first])
    if pending is not None:
        yield pending


def _take_attributes(old: BlockFile, fd: int) -> None:
    """Give the new file the owner, the mode and the extended attributes (labels, access lists) of the old one."""
    source = old.fileno()
    if source is None:
        return
    facts = os.fstat(source)
    with contextlib.suppress(PermissionError):
        os.fchown(fd, facts.st_uid, facts.st_gid)
    os.fchmod(fd, facts.st_mode & 0o7777)
    with contextlib.suppress(OSError):
        for name in os.listxattr(source):
            with contextlib.suppress(OSError):
                os.setxattr(fd, name, os.getxattr(source, name))
