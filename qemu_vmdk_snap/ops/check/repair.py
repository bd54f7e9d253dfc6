"""Mend what a check finds, after everything that it replaces is durable in an undo file.

    undo file:  one line of JSON (which file, how long it was, which ranges follow), then the bytes of the ranges

A repair that does not end is taken back from that file; the user can do the same later.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qemu_vmdk_snap.chain.resolver import Resolver
from qemu_vmdk_snap.errors import CorruptChain, FormatError, Unsupported
from qemu_vmdk_snap.ops.check.check import CheckReport, check_image
from qemu_vmdk_snap.ops.check.repair_plan import Copied, ExtentPlan, ExtentRepair
from qemu_vmdk_snap.ops.check.shape import shape_of
from qemu_vmdk_snap.ops.journal.guard import guarded_operation
from qemu_vmdk_snap.ops.progress import OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener, open_posix
from qemu_vmdk_snap.storage.durable import new_file
from qemu_vmdk_snap.storage.locks import lock_image
from qemu_vmdk_snap.storage.record import Operation
from qemu_vmdk_snap.units import MIB, SECTOR_SIZE, byte_sectors, sector_bytes
from qemu_vmdk_snap.vmdk.cowd.header import COWD_MAGIC, read_cowd_header
from qemu_vmdk_snap.vmdk.descriptor import MAX_BYTES, NO_PARENT, Descriptor, is_descriptor
from qemu_vmdk_snap.vmdk.sparse.header import MAGIC, NEWLINE_PROBE, HeaderFlag, SparseExtentHeader, check_header

OPERATION: Final = "repair"
_STEP: Final = 4 * MIB


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair did."""

    before: CheckReport
    after: CheckReport
    undo: Path | None
    """The undo file; None where nothing was to be done."""


def repair(
    path: Path | str,
    *,
    resolver: Resolver,
    leaks_only: bool = False,
    relink_cids: bool = False,
    undo: Path | str | None = None,
    opener: FileOpener = open_posix,
    on_progress: OnProgress = ignore,
) -> RepairReport:
    """Mend the tables of the image, and tell what a check says before and after.

    `leaks_only` gives back leaked space and changes nothing else; it does nothing while there are corruptions.
    `relink_cids` also writes the parent's CID into the image: only the user can know that the parent holds what it did.
    `undo` is where the undo file goes: by default beside the image, NAME.undo.

    Raises:
        FileExistsError: the undo file is there already; nothing was changed.
        FormatError, Unsupported: the image cannot be read so far that it could be mended.
        LockBusy: another process has the image open.
    """
    from qemu_vmdk_snap.ops.journal.recover import settle

    path = Path(path)
    settle(path.parent, opener=opener)
    before = check_image(path, resolver=resolver, opener=opener, on_progress=on_progress)
    mend = not leaks_only and before.corruptions > 0
    if not mend and (before.corruptions or not before.leaks):
        return RepairReport(before, before, None)
    with contextlib.ExitStack() as stack:
        files = _files(path, resolver, opener, stack)
        plans = [_plan(file, mend=mend) for file in files]
        if relink_cids:
            plans[0].patches += _relinked(plans[0].file, resolver, opener)
        if not any(plan.changes for plan in plans):
            return RepairReport(before, before, None)
        record = Path(undo) if undo is not None else path.with_name(path.name + ".undo")
        _carry_out(path, plans, record)
    return RepairReport(before, check_image(path, resolver=resolver, opener=opener, on_progress=on_progress), record)


def _carry_out(path: Path, plans: list[ExtentPlan], record: Path) -> None:
    _write_undo(record, plans)
    operation = guarded_operation(OPERATION, path, [plan.file.path for plan in plans], {"undo": record})
    with operation.hold:
        operation.begin()
        for plan in plans:
            _apply(plan)
        operation.end()


def take_back(undo: Path | str, *, opener: FileOpener = open_posix) -> None:
    """Put everything back that a repair replaced, from its undo file.

    Raises:
        CorruptChain: the undo file cannot be read.
        LockBusy: another process has one of the files open.
    """
    undo = Path(undo)
    with undo.open("rb") as source:
        try:
            record = json.loads(source.readline(64 * MIB))
            files = [(Path(one["path"]), int(one["size"]), list(one["ranges"])) for one in record["files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptChain(undo, f"is no undo file: {error!r}") from error
        for path, size, ranges in files:
            file = _opened(path, opener)
            try:
                for offset, length in ranges:
                    for skip in range(0, length, _STEP):
                        file.write_at(offset + skip, source.read(min(_STEP, length - skip)))
                file.truncate(size)
                file.flush()
            finally:
                file.close()


def finish_repair(operation: Operation, opener: FileOpener) -> None:
    """Take back a repair that somebody else began: it can then be asked for again."""
    take_back(operation.details["undo"], opener=opener)
    Path(operation.details["undo"]).unlink(missing_ok=True)


def _opened(path: Path, opener: FileOpener) -> BlockFile:
    file = opener(path, True)
    descriptor = file.fileno()
    if descriptor is not None:
        try:
            lock_image(descriptor, path, writable=True)
        except BaseException:
            file.close()
            raise
    return file


def _plan(file: BlockFile, *, mend: bool) -> ExtentPlan:
    """Return what is to be written into one file: a descriptor, or an extent."""
    raw = file.read_at(0, SECTOR_SIZE)
    if raw[:4] == COWD_MAGIC:
        return _plan_cowd(file, mend=mend)
    if raw[:4] != MAGIC:
        return ExtentPlan(file, end=file.size())
    header = SparseExtentHeader.parse(raw, path=file.path)
    mended = replace(header, unclean_shutdown=0)
    if header.flags & HeaderFlag.NEWLINE_TEST:
        mended = replace(mended, newline_probe=NEWLINE_PROBE)
    check_header(mended, file.path, file.size(), tolerant=True)
    if header.compressed or header.flags & HeaderFlag.MARKERS:
        raise Unsupported(file.path, "streamOptimized extents cannot be repaired: convert what can be read")
    plan = ExtentRepair(file, shape_of(mended)).plan(mend=mend)
    mended = replace(mended, gd_offset=plan.gd_offset, rgd_offset=plan.rgd_offset or mended.rgd_offset)
    if mend and mended != header:
        plan.header = mended.serialise()
    return plan


def _plan_cowd(file: BlockFile, *, mend: bool) -> ExtentPlan:
    header = read_cowd_header(file, file.path)
    plan = ExtentRepair(file, shape_of(header)).plan(mend=mend)
    used = byte_sectors(plan.end)
    if used != header.free_sector:
        plan.header = replace(header, free_sector=used).serialise()
    return plan


def _files(path: Path, resolver: Resolver, opener: FileOpener, stack: contextlib.ExitStack) -> Iterator[BlockFile]:
    file = _opened(path, opener)
    stack.callback(file.close)
    yield file
    if not is_descriptor(file.read_at(0, SECTOR_SIZE)):
        return
    for line in Descriptor.parse(file.read_at(0, MAX_BYTES), path=path).extents:
        if line.file is not None and line.type in ("SPARSE", "VMFSSPARSE"):
            extent = _opened(resolver(path, line.file, "extent"), opener)
            stack.callback(extent.close)
            yield extent


def _relinked(file: BlockFile, resolver: Resolver, opener: FileOpener) -> list[tuple[int, bytes]]:
    """Return the write that makes parentCID the CID of the parent, if it is not."""
    mine = _descriptor(file)
    if mine.parent_cid == NO_PARENT or mine.parent_hint is None:
        return []
    below = opener(resolver(file.path, mine.parent_hint, "parent"), False)
    try:
        cid = _descriptor(below).cid
    finally:
        below.close()
    if cid == mine.parent_cid:
        return []
    changed = mine.with_values({"parentCID": f"{cid:08x}"}).raw
    return [(mine.base, changed + bytes(max(0, len(mine.raw) - len(changed))))]


def _descriptor(file: BlockFile) -> Descriptor:
    raw = file.read_at(0, SECTOR_SIZE)
    if raw[:4] != MAGIC:
        return Descriptor.parse(file.read_at(0, MAX_BYTES), path=file.path)
    header = SparseExtentHeader.parse(raw, path=file.path)
    if not header.descriptor_offset:
        raise FormatError(file.path, header.offset_of("descriptor_offset"), "descriptor_offset", 0, "must not be 0")
    base = sector_bytes(header.descriptor_offset)
    raw = file.read_at(base, min(MAX_BYTES, sector_bytes(header.descriptor_size)))
    return Descriptor.parse(raw, path=file.path, base=base)


def _write_undo(path: Path, plans: list[ExtentPlan]) -> None:
    files: list[dict[str, Any]] = []
    sources: list[tuple[BlockFile, int, int]] = []
    for plan in plans:
        size = plan.file.size()
        ranges = [(at, min(len(data), size - at)) for at, data in plan.patches] + plan.kept
        if plan.header is not None:
            ranges.append((0, len(plan.header)))
        ranges = [(at, min(length, size - at)) for at, length in ranges if at < size]
        files.append({"path": str(plan.file.path.resolve()), "size": size, "ranges": ranges})
        sources += [(plan.file, at, length) for at, length in ranges]
    with new_file(path, mode=0o600) as target:
        head = json.dumps({"version": 1, "files": files}).encode() + b"\n"
        target.write_at(0, head)
        position = len(head)
        for file, at, length in sources:
            for skip in range(0, length, _STEP):
                target.write_at(position, file.read_at(at + skip, min(_STEP, length - skip)))
                position += min(_STEP, length - skip)


def _apply(plan: ExtentPlan) -> None:
    file = plan.file
    for copied in plan.copies:
        _copy(file, copied)
    for at, data in plan.fresh:
        file.write_at(at, data)
    file.flush()  # barrier: grains and tables are durable where they are named next
    for at, data in plan.patches:
        file.write_at(at, data)
    file.flush()  # barrier: nothing names what is cut
    if plan.header is not None:
        file.write_at(0, plan.header)
    if plan.end != file.size():
        file.truncate(plan.end)
    file.flush()


def _copy(file: BlockFile, copied: Copied) -> None:
    for skip in range(0, copied.length, _STEP):
        data = file.read_at(copied.source + skip, min(_STEP, copied.length - skip))
        file.write_at(copied.target + skip, data + bytes(min(_STEP, copied.length - skip) - len(data)))
