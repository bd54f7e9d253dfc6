"""Copy what a guest sees on a disk into a new image."""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from qemu_vmdk_snap.chain.chain import WritableChain, open_chain
from qemu_vmdk_snap.chain.disk import Disk
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.ops.copy.pipes import BulkPipe, rows_with_grains
from qemu_vmdk_snap.ops.make.create import ImageOptions, create_overlay, open_new_image, open_new_stream
from qemu_vmdk_snap.ops.make.layout import extent_files, kind_for
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.durable import NewFiles, publish, temporary_name, working_in
from qemu_vmdk_snap.storage.pipes import PipeWriter
from qemu_vmdk_snap.units import MIB
from qemu_vmdk_snap.vmdk.grain.bulk import BulkFlat, BulkWriter
from qemu_vmdk_snap.vmdk.runs import DATA, ZERO, Row

_STEP: Final = 4 * MIB


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did; sizes in bytes."""

    path: Path
    capacity: int
    data: int
    """Guest bytes that were stored; the rest reads as zeros, or is the backing image's."""

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `image convert --output=json` shows it."""
        return {"filename": str(self.path), "virtual-size": self.capacity, "data-bytes": self.data}


def convert(
    source: Disk,
    path: Path | str,
    *,
    output_format: str = "vmdk",
    options: ImageOptions | None = None,
    backing: Path | str | None = None,
    sparse_size: int = 0,
    durable: bool = True,
    on_progress: OnProgress = ignore,
) -> ConvertReport:
    """Make `path` an image (`output_format` vmdk or raw) in which a guest reads what it reads from `source`.

    Runs that the source does not store are not stored in the copy. `sparse_size` > 0 also looks into stored runs and
    leaves out zeros, in units of so many bytes. With `backing` the copy is an overlay that stores what differs
    from it. The new image appears when it is complete; after a failure, or a callback that raises, no file is left.

    Raises:
        FileExistsError: the name exists; that file is not changed.
        InvalidRequest: the options do not fit together.
    """
    path = Path(path)
    if backing is not None:
        if output_format != "vmdk":
            raise InvalidRequest(path, f"a {output_format} image cannot have a backing image")
        return _convert_onto(source, path, Path(backing), options, durable, on_progress)
    with NewFiles(durable=durable) as files:
        if output_format == "raw":
            writer: BulkWriter = BulkFlat(files.add(path), source.capacity)
        else:
            writer = open_new_image(files, path, source.capacity, options or ImageOptions())
        stored = _copy_rows(source, writer, sparse_size, on_progress)
        writer.finish()
    return ConvertReport(path, source.capacity, stored)


def convert_to_pipe(
    source: Disk,
    pipe: PipeWriter,
    *,
    output_format: str = "vmdk",
    options: ImageOptions | None = None,
    sparse_size: int = 0,
    on_progress: OnProgress = ignore,
) -> ConvertReport:
    """Write what a guest reads from `source` to a pipe: as a raw image, or as a streamOptimized one.

    Raises:
        Unsupported: the options name another kind: its tables could only be written at the end.
        BrokenPipeError: the reader closed the pipe.
    """
    if output_format == "raw":
        writer: BulkWriter = BulkPipe(pipe, source.capacity)
    elif options is not None and kind_for(pipe.path, options).stream:
        writer = open_new_stream(pipe.write, pipe.path, source.capacity, options)
    else:
        raise Unsupported(pipe.path, "only raw and streamOptimized images can be written to a pipe")
    stored = _copy_rows(source, writer, sparse_size, on_progress)
    writer.finish()
    return ConvertReport(pipe.path, source.capacity, stored)


def _copy_rows(source: Disk, writer: BulkWriter, sparse_size: int, on_progress: OnProgress) -> int:
    stored = 0
    meter = Meter("convert", source.capacity, on_progress)
    for row, grain in rows_with_grains(source):
        if grain is not None:
            stored += _store(grain, row.offset, writer, sparse_size)
        elif row.kind >= DATA:
            file = source.file_of(row)
            if file is not None and not sparse_size:
                writer.put(row.offset, row.length, file, row.file_offset, meter.step)
                stored += row.length
            else:
                stored += _copy_buffered(source, row, writer, sparse_size, meter)
        meter.reach(row.offset + row.length)
    return stored


def _copy_buffered(source: Disk, row: Row, writer: BulkWriter, sparse_size: int, meter: Meter) -> int:
    stored = 0
    for skip in range(0, row.length, _STEP):
        data = source.read_row(row, skip, min(_STEP, row.length - skip))
        stored += _store(data, row.offset + skip, writer, sparse_size)
        meter.step(len(data))
    return stored


def _store(data: bytes, offset: int, writer: BulkWriter, sparse_size: int) -> int:
    stored = 0
    for start, end in _nonzero_parts(data, offset, sparse_size):
        writer.put_bytes(offset + start, memoryview(data)[start:end])
        stored += end - start
    return stored


def _nonzero_parts(data: bytes, offset: int, unit: int) -> list[tuple[int, int]]:
    """Return the parts of `data` (which is at guest `offset`) that remain when units of zeros are left out."""
    if not unit:
        return [(0, len(data))]
    # Units count from the start of the disk, so that they fall on the same places however the source is cut into runs.
    lead = min(-offset % unit, len(data))
    whole = (len(data) - lead) // unit
    edges = [0, *([lead] if lead else []), *(lead + unit * (i + 1) for i in range(whole))]
    if edges[-1] != len(data):
        edges.append(len(data))
    parts: list[tuple[int, int]] = []
    array = np.frombuffer(data, np.uint8)
    for start, end in itertools.pairwise(edges):
        if array[start:end].any():
            if parts and parts[-1][1] == start:
                parts[-1] = (parts[-1][0], end)
            else:
                parts.append((start, end))
    return parts


def _convert_onto(
    source: Disk, path: Path, backing: Path, options: ImageOptions | None, durable: bool, on_progress: OnProgress
) -> ConvertReport:
    """Store in an overlay what differs from its base; under a temporary name until it is complete."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = temporary_name(path)
    stored = 0
    meter = Meter("convert", source.capacity, on_progress)
    unfinished: list[Path] = []
    with working_in(path.parent):
        try:
            create_overlay(temporary, backing, size=source.capacity, options=options, durable=False, name=path.name)
            unfinished = extent_files(temporary)
            with open_chain(temporary, writable=True, trusted_dirs=[backing.resolve().parent]) as target:
                for row in source.rows():
                    stored += _store_differences(source, row, target)
                    meter.reach(row.offset + row.length)
            publish(temporary, path, parts=unfinished, durable=durable)
            unfinished = []
        finally:
            for file in [temporary, *unfinished]:
                file.unlink(missing_ok=True)
    return ConvertReport(path, source.capacity, stored)


def _store_differences(source: Disk, row: Row, target: WritableChain) -> int:
    stored = 0
    for skip in range(0, row.length, _STEP):
        length = min(_STEP, row.length - skip)
        offset = row.offset + skip
        if row.kind <= ZERO and all(run.kind <= ZERO for run in target.rows(offset, length)):
            continue
        data = source.read_row(row, skip, length)
        unit = target.links[0].grain_bytes
        for start in range(0, length, unit):
            piece = data[start : start + unit]
            if piece != target.read_at(offset + start, len(piece)):
                target.write_at(offset + start, piece)
                stored += len(piece)
    return stored
