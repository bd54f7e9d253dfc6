"""Checks the kinds of extent that have one copy of their tables, through the runs that their reader finds.

Checked: what the reader refuses, stored runs that share bytes of the file, and compressed grains that do not inflate
or have another sector in their record.
"""

from __future__ import annotations

from collections.abc import Callable

from qemu_vmdk_snap.chain.windows import extent_windows
from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.ops.check.findings import Findings, GrainCounts
from qemu_vmdk_snap.storage.blockfile import BlockFile
from qemu_vmdk_snap.units import SECTOR_SIZE
from qemu_vmdk_snap.vmdk.extent import Extent
from qemu_vmdk_snap.vmdk.runs import COMPRESSED, DATA, Int64s, RunTable
from qemu_vmdk_snap.vmdk.stream.extent import StreamExtent
from qemu_vmdk_snap.vmdk.stream.footer import GRAIN_RECORD


def audit_runs(extent: Extent, file: BlockFile, findings: Findings, on_bytes: Callable[[int], None]) -> GrainCounts:
    """Add what is wrong with the extent to `findings`; `on_bytes` is called with the number of bytes of each window."""
    unit = extent.grain_bytes
    grains = unit < extent.capacity
    counts = GrainCounts(total=-(-extent.capacity // unit) if grains else 0)
    places: list[tuple[Int64s, Int64s]] = []
    for start, stop in extent_windows(extent):
        try:
            table = extent.resolve(start, stop)
        except FormatError as error:
            findings.broken(error)
        else:
            if grains:
                places.append(_stored(table, unit, counts))
            _inflate(extent, table, file, findings)
        on_bytes(stop - start)
    _find_shared(places, file, findings)
    return counts


def _stored(table: RunTable, unit: int, counts: GrainCounts) -> tuple[Int64s, Int64s]:
    """Return where in the file stored runs begin and end; a compressed grain counts as its first byte."""
    stored = table.kinds >= DATA
    compressed = table.kinds[stored] == COMPRESSED
    lengths, starts = table.lengths[stored], table.file_offsets[stored]
    counts.allocated += int((-(-lengths // unit)).sum())
    counts.compressed += int(compressed.sum())
    counts.fragmented += int((starts[1:] != (starts + lengths)[:-1]).sum()) if not compressed.any() else 0
    return starts, starts + np.where(compressed, 1, lengths)


def _inflate(extent: Extent, table: RunTable, file: BlockFile, findings: Findings) -> None:
    for offset, at in zip(
        table.starts[table.kinds == COMPRESSED].tolist(),
        table.file_offsets[table.kinds == COMPRESSED].tolist(),
        strict=True,
    ):
        try:
            extent.read_grain(at)
        except FormatError as error:
            findings.broken(error)
            continue
        if isinstance(extent, StreamExtent) and extent.has_markers:
            lba = GRAIN_RECORD.unpack(file.read_at(at, GRAIN_RECORD.size))[0]
            if lba != offset // SECTOR_SIZE:
                rule = f"must be sector {offset // SECTOR_SIZE}, whose grain table entry leads here"
                findings.corrupt(file.path, at, "sector of the compressed grain", lba, rule)


def _find_shared(places: list[tuple[Int64s, Int64s]], file: BlockFile, findings: Findings) -> None:
    if not places:
        return
    starts, ends = (np.concatenate(columns) for columns in zip(*places, strict=True))
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    shared = np.flatnonzero(starts[1:] < reach[:-1]) + 1
    rule = "must not be named by two grain table entries"
    items = ((int(starts[i]), int(starts[i]) // SECTOR_SIZE, rule) for i in shared)
    findings.corrupt_many(file.path, "shared grain", items, len(shared))
