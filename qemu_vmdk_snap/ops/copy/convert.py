"""Copy what a guest sees on a disk into a new image."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.chain.chain import WritableChain, open_chain
from qemu_vmdk_snap.chain.disk import Disk
from qemu_vmdk_snap.errors import InvalidRequest, Unsupported
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.ops.copy.limited import LimitedWriter, Pace
from qemu_vmdk_snap.ops.copy.pipes import BulkPipe, rows_with_grains
from qemu_vmdk_snap.ops.copy.zeros import may_share, nonzero_parts
from qemu_vmdk_snap.ops.make.allocate import held_empty, preallocate, replace_empty
from qemu_vmdk_snap.ops.make.create import ImageOptions, create_overlay, open_new_image, open_new_stream
from qemu_vmdk_snap.ops.make.layout import extent_files, kind_for
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer
from qemu_vmdk_snap.storage.durable import NewFiles, publish, temporary_name, working_in
from qemu_vmdk_snap.storage.pipes import PipeWriter
from qemu_vmdk_snap.units import KIB, MIB
from qemu_vmdk_snap.vmdk.grain.bulk import BulkFlat, BulkWriter
from qemu_vmdk_snap.vmdk.runs import DATA, ZERO, Row

DEFAULT_SPARSE: Final = 4 * KIB
"""qemu-img's: shorter stretches of zeros are stored."""

_STEP: Final = 4 * MIB
_SCAN_STEP: Final = MIB  # the buffer stays in the processor's cache


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
    sparse_size: int | None = 0,
    durable: bool = True,
    rate_limit: int = 0,
    preallocation: str = "off",
    over_empty: bool = False,
    on_progress: OnProgress = ignore,
) -> ConvertReport:
    """Make `path` an image (`output_format` vmdk or raw) in which a guest reads what it reads from `source`.

    Runs that the source does not store are not stored in the copy. `sparse_size` > 0 also looks into stored runs and
    leaves out what is zeros, in units of so many bytes; None does so in units of 4096 bytes, unless the file system
    lets the copy share the blocks of the source, and nothing has to be read. With `backing` the copy is an overlay that
    stores what differs from it. At most `rate_limit` bytes a second are stored; 0 is no limit. `preallocation` of a raw
    image is off, falloc or full. The new image appears when it is complete; after a failure, or a callback that raises,
    no file is left. `over_empty` lets it replace an empty file that nothing needs.

    Raises:
        FileExistsError: the name exists; that file is not changed.
        InvalidRequest: the options do not fit together.
        StillNeeded: something needs the empty file.
    """
    path = Path(path)
    if backing is not None:
        if output_format != "vmdk":
            raise InvalidRequest(path, f"a {output_format} image cannot have a backing image")
        return _convert_onto(source, path, Path(backing), options, durable, over_empty, on_progress)
    with NewFiles(durable=durable) as files:
        if over_empty:
            replace_empty(files, path)
        if output_format == "raw":
            file = files.add(path)
            writer: BulkWriter = BulkFlat(file, source.capacity)
            preallocate(file, source.capacity, preallocation)
        else:
            writer = open_new_image(files, path, source.capacity, options or ImageOptions())
        if rate_limit:
            writer = LimitedWriter(writer, Pace(rate_limit))
        stored = _copy_rows(source, writer, _Sparse(sparse_size, path.parent), on_progress)
        writer.finish()
    return ConvertReport(path, source.capacity, stored)


def convert_to_pipe(
    source: Disk,
    pipe: PipeWriter,
    *,
    output_format: str = "vmdk",
    options: ImageOptions | None = None,
    sparse_size: int | None = 0,
    rate_limit: int = 0,
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
    if rate_limit:
        writer = LimitedWriter(writer, Pace(rate_limit))
    stored = _copy_rows(source, writer, _Sparse(sparse_size, None), on_progress)
    writer.finish()
    return ConvertReport(pipe.path, source.capacity, stored)


class _Sparse:
    """Which zeros of stored runs are left out: those of the units asked for, and of files that must be read anyway."""

    def __init__(self, unit: int | None, folder: Path | None) -> None:
        self._unit, self._folder = unit, folder
        self._units: dict[int, int] = {}

    def unit_for(self, file: BlockFile | None) -> int:
        """Return the unit for runs that `file` stores as they are, or None inflates; 0 looks for none."""
        if self._unit is not None or file is None:
            return DEFAULT_SPARSE if self._unit is None else self._unit
        if id(file) not in self._units:
            shares = self._folder is not None and may_share(file, self._folder)
            self._units[id(file)] = 0 if shares else DEFAULT_SPARSE
        return self._units[id(file)]


def _copy_rows(source: Disk, writer: BulkWriter, sparse: _Sparse, on_progress: OnProgress) -> int:
    stored = 0
    meter = Meter("convert", source.capacity, on_progress)
    buffer = bytearray(_SCAN_STEP)
    for row, grain in rows_with_grains(source):
        if grain is not None:
            stored += _store(grain, row.offset, writer, sparse.unit_for(None))
        elif row.kind >= DATA:
            file = source.file_of(row)
            unit = sparse.unit_for(file)
            if file is not None and not unit:
                writer.put(row.offset, row.length, file, row.file_offset, meter.step)
                stored += row.length
            else:
                stored += _copy_buffered(source, row, writer, unit, meter, buffer)
        meter.reach(row.offset + row.length)
    return stored


def _copy_buffered(source: Disk, row: Row, writer: BulkWriter, unit: int, meter: Meter, buffer: bytearray) -> int:
    """Copy a run through `buffer`, which is used again and again: new memory would cost more than the copying."""
    stored = 0
    for skip in range(0, row.length, len(buffer)):
        view = memoryview(buffer)[: min(len(buffer), row.length - skip)]
        source.read_row_into(row, skip, view)
        stored += _store(view, row.offset + skip, writer, unit)
        meter.step(len(view))
    return stored


def _store(data: Buffer, offset: int, writer: BulkWriter, unit: int) -> int:
    stored = 0
    view = memoryview(data)
    for start, end in nonzero_parts(data, offset, unit):
        writer.put_bytes(offset + start, view[start:end])
        stored += end - start
    return stored


def _convert_onto(
    source: Disk,
    path: Path,
    backing: Path,
    options: ImageOptions | None,
    durable: bool,
    over_empty: bool,
    on_progress: OnProgress,
) -> ConvertReport:
    """Store in an overlay what differs from its base; under a temporary name until it is complete."""
    temporary = temporary_name(path)
    stored = 0
    meter = Meter("convert", source.capacity, on_progress)
    unfinished: list[Path] = []
    with working_in(path.parent), contextlib.ExitStack() as stack:
        empty = held_empty(path, stack) if over_empty else None
        if empty is None and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        try:
            create_overlay(
                temporary,
                backing,
                size=source.capacity,
                options=options,
                durable=False,
                mode=0o666 if empty is None else empty.mode,
                name=path.name,
            )
            unfinished = extent_files(temporary)
            with open_chain(temporary, writable=True, trusted_dirs=[backing.resolve().parent]) as target:
                for row in source.rows():
                    stored += _store_differences(source, row, target)
                    meter.reach(row.offset + row.length)
            publish(temporary, path, parts=unfinished, durable=durable, empty=empty)
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
