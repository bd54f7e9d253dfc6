"""Make the file of an image as small as its data: without leaked grains and grains that contain only zeros.

The extent is written again beside the old one and replaces it in one step; until then nothing has changed. The content,
the CID and the parent stay, so that everything above reads the same. It needs space for the new file; on a file system
with reflinks it needs nearly none.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.chain.chain import Chain
from qemu_vmdk_snap.chain.change import open_for_change
from qemu_vmdk_snap.chain.needs.dependents import Census, require_one_name, search_folders
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.chain.windows import ROW_GRAINS, extent_windows
from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.ops.copy.transfer import STEP, View
from qemu_vmdk_snap.ops.journal.recover import settle
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.attributes import copy_attributes
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener, open_posix
from qemu_vmdk_snap.storage.durable import replacing
from qemu_vmdk_snap.units import sector_bytes
from qemu_vmdk_snap.vmdk.cowd.extent import CowdExtent
from qemu_vmdk_snap.vmdk.cowd.layout import lay_out_anew
from qemu_vmdk_snap.vmdk.cowd.writer import BulkCowd
from qemu_vmdk_snap.vmdk.extent import PlacedExtent
from qemu_vmdk_snap.vmdk.grain.bulk import BulkSparse
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

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `image compact --output=json` shows it."""
        return {"filename": str(self.path), "before": self.before, "after": self.after}


def compact(
    path: Path | str,
    *,
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    on_progress: OnProgress = ignore,
) -> CompactReport:
    """Drop unneeded grains of the image. An extent that would not become smaller is not changed.

    A grain of zeros is dropped where the parent reads zeros too, or where the kind can mark it as zeros.

    Raises:
        Unsupported: the kind of the image has no grains to drop.
        LockBusy: another process has the image open, or writes one of its parents.
        CidMismatch, CorruptChain, FormatError, OSError: the chain cannot be opened.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    find = resolver or confined(trusted_dirs)
    settle(path.parent, opener=opener, resolver=find)
    with open_for_change(path, depths=[0], resolver=find, opener=opener) as chain:
        top = chain.links[0]
        before = sum(file.size() for file in top.files)
        pairs = [(placed, _compactable(path, placed)) for placed in top.extents if placed.extent.file is not None]
        files = [file.path for file in top.files]
        require_one_name(path, files, Census.of(search_folders(files, find)))
        after = before
        meter = Meter(OPERATION, chain.capacity, on_progress)
        for placed, extent in pairs:
            after -= _rewrite(chain, placed, extent, meter)
        return CompactReport(path, before, after)


def _compactable(path: Path, placed: PlacedExtent) -> Compactable:
    extent = placed.extent
    if isinstance(extent, CowdExtent):
        return extent
    if not isinstance(extent, SparseExtent) or extent.header.gtes_per_gt != GTES_PER_GT:
        raise Unsupported(path, "only images of sparse extents can be compacted")
    return extent


def _rewrite(chain: Chain, placed: PlacedExtent, extent: Compactable, meter: Meter) -> int:
    """Write the extent again and replace the old one, if it is smaller; return by how many bytes."""
    old = extent.file
    path, descriptor = Path(os.path.realpath(old.path)), old.fileno()
    with replacing(path) as new:
        _fill(chain, placed, extent, new, meter)
        saved = old.size() - new.size()
        if saved <= 0:
            new.give_up()
            return 0
        if descriptor is not None:
            copy_attributes(descriptor, new.fileno())
    # A process that has opened the old file and waits for its lock finds it empty: what is written to a deleted file
    # would be lost, and QEMU does not open the name again.
    if descriptor is not None and os.fstat(descriptor).st_nlink == 0:
        old.truncate(0)
    return saved


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
    """Write an extent like the old one without its grains; return its writer, and whether it can mark zeros."""
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
    """Yield the stretches of whole grains of a stored run, and whether they contain only zeros."""
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
