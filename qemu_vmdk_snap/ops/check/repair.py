"""Repair what a check finds, once everything that is replaced is durable in an undo file.

A repair that does not end is undone with that file (`ops.check.undo` has its layout); the user can do the same
later. A repair, and undoing one, is an operation with a record: if it is killed at any point, `recover` undoes it,
from the beginning, as often as needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.errors import CorruptChain, Unsupported
from qemu_vmdk_snap.light import dataclass, replace
from qemu_vmdk_snap.ops.check.check import CheckReport, check_image
from qemu_vmdk_snap.ops.check.opening import open_file_for_change
from qemu_vmdk_snap.ops.check.relink import plan_relinks
from qemu_vmdk_snap.ops.check.repair_plan import Copied, ExtentPlan, ExtentRepair
from qemu_vmdk_snap.ops.check.shape import shape_of
from qemu_vmdk_snap.ops.check.undo import UndoFile, write_undo
from qemu_vmdk_snap.ops.journal.guard import check_unwritten, folders_of, guarded_operation
from qemu_vmdk_snap.ops.progress import OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import BlockFile, FileOpener, open_posix
from qemu_vmdk_snap.storage.durable import sync_folder
from qemu_vmdk_snap.storage.record import Operation, pending_in, taking_over
from qemu_vmdk_snap.units import MIB, SECTOR_SIZE, byte_sectors
from qemu_vmdk_snap.vmdk.cowd.header import COWD_MAGIC, read_cowd_header
from qemu_vmdk_snap.vmdk.descriptor import MAX_BYTES, Descriptor, is_descriptor
from qemu_vmdk_snap.vmdk.grain.tables import zero_range
from qemu_vmdk_snap.vmdk.sparse.header import (
    MAGIC,
    NEWLINE_PROBE,
    HeaderFlag,
    SparseExtentHeader,
    check_header,
    refuse_moved,
)

OPERATION: Final = "repair"
_STEP: Final = 4 * MIB


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair did."""

    before: CheckReport
    after: CheckReport
    undo: Path | None
    """The undo file; None where nothing was to be done."""
    relinked: tuple[Path, ...] = ()
    """The links whose parentCID was made the CID of their parent, the top first."""

    @property
    def corruptions_fixed(self) -> int:
        """How many corruptions were repaired."""
        return max(0, self.before.corruptions - self.after.corruptions)

    @property
    def leaks_fixed(self) -> int:
        """How many leaked grains were freed."""
        return max(0, self.before.leaks - self.after.leaks)

    def as_dict(self) -> dict[str, object]:
        """Return the keys that `image check -r --output=json` adds to those of the check."""
        answer: dict[str, object] = {"corruptions-fixed": self.corruptions_fixed, "leaks-fixed": self.leaks_fixed}
        if self.undo is not None:
            answer["undo-file"] = str(self.undo)
        if self.relinked:
            answer["relinked"] = [str(link) for link in self.relinked]
        return answer


def repair(
    path: Path | str,
    *,
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    leaks_only: bool = False,
    relink_cids: bool = False,
    undo: Path | str | None = None,
    opener: FileOpener = open_posix,
    on_progress: OnProgress = ignore,
) -> RepairReport:
    """Repair the tables of the image, and return what a check says before and after.

    `leaks_only` frees leaked space and changes nothing else; it does nothing while there are corruptions. (Entries
    that one copy of the tables lacks are added in any case.) `relink_cids` also makes the parentCID of each link of the
    chain the CID of its parent: only the user can know that the parents are unchanged. `undo` is where the undo
    file goes: by default beside the image, NAME.undo.

    Raises:
        FileExistsError: the undo file is there already; nothing was changed.
        FormatError, Unsupported: the image cannot be read so far that it could be repaired.
        LockBusy: another process has the image open.
    """
    from qemu_vmdk_snap.ops.journal.recover import settle

    path, find = Path(path), resolver or confined(trusted_dirs)
    settle(path.parent, opener=opener)
    before = check_image(path, resolver=find, opener=opener, on_progress=on_progress)
    # Space that only one copy of the tables names is in use: missing entries are added first.
    repairing = before.repairable > 0 if leaks_only else before.corruptions + before.repairable > 0
    if (leaks_only and (before.corruptions or not before.leaks)) or not (repairing or before.leaks):
        return RepairReport(before, before, None)
    relinked: tuple[Path, ...] = ()
    with contextlib.ExitStack() as stack:
        plans = [_plan(file, repairing=repairing) for file in _files(path, find, opener, stack)]
        if relink_cids:
            relinked = plan_relinks(plans, find, opener, stack)
        if not any(plan.changes for plan in plans):
            return RepairReport(before, before, None)
        record = Path(undo) if undo is not None else path.with_name(path.name + ".undo")
        _carry_out(path, plans, record)
    after = check_image(path, resolver=find, opener=opener, on_progress=on_progress)
    return RepairReport(before, after, record, relinked)


def _carry_out(path: Path, plans: list[ExtentPlan], record: Path) -> None:
    write_undo(record, plans)
    operation = guarded_operation(OPERATION, path, [plan.file.path for plan in plans], {"undo": record})
    with operation.hold:
        try:
            operation.begin()
        except BaseException:
            record.unlink()  # nothing has changed, and the next repair needs the name
            raise
        for plan in plans:
            _apply(plan)
        operation.end()


def take_back(undo: Path | str, *, trusted_dirs: Sequence[Path | str] = (), opener: FileOpener = open_posix) -> None:
    """Undo a repair: restore everything that it replaced from its undo file.

    Everything is checked, and every image locked, before the first write. Images outside the undo file's folder are
    written only in `trusted_dirs`. If it is killed at any point, it can be called again, and `recover` finishes it.

    Raises:
        CorruptChain: the undo file is damaged or another user's, an image is not the one that was repaired or was
            written since, or another operation on one has begun and not ended. Nothing was changed.
        LockBusy: another process has one of the images open.
        OSError: the undo file or an image cannot be opened.
    """
    with (
        UndoFile.open(Path(undo)) as record,
        record.opened(opener, trusted_dirs) as files,
        contextlib.ExitStack() as stack,
    ):
        images = [file.path for file in files]
        operation = _begun(record, images, [*trusted_dirs, record.path.parent], stack)
        if operation is None:
            record.check_unwritten(files)
            operation = guarded_operation(OPERATION, images[0], images, {"undo": record.path})
            stack.enter_context(operation.hold)
            operation.begin()
        else:
            check_unwritten(operation)
            record.check_cids(files)
        record.restore(files)
        operation.end()


def _begun(
    undo: UndoFile, images: Sequence[Path], allowed: Sequence[Path | str], stack: contextlib.ExitStack
) -> Operation | None:
    """Return the unfinished repair with this undo file, or the unfinished undoing of it; `stack` holds its lock.

    Raises:
        CorruptChain: another operation on one of the images is not finished, or the record cannot be followed.
        LockBusy: it is still running.
    """
    found: Operation | None = None
    seen: set[Path] = set()
    for folder in sorted({image.parent for image in images}):
        for pending in pending_in(folder, allowed=allowed):
            if pending.path in seen or not any(pending.involves(image) for image in images):
                continue
            seen.add(pending.path)
            operation = stack.enter_context(taking_over(pending, allowed=allowed))
            if operation is None:
                continue
            if operation.name != OPERATION or not _is_same(operation.details.get("undo"), undo.path):
                reason = f"an interrupted {operation.name} is not finished: run `recover {folder}` first"
                raise CorruptChain(operation.image, reason)
            found = operation
    return found


def _is_same(one: object, undo: Path) -> bool:
    with contextlib.suppress(OSError):
        return isinstance(one, Path) and one.samefile(undo)
    return False


def finish_repair(operation: Operation, opener: FileOpener) -> None:
    """Undo a repair that another process began; it can then be repeated.

    If the undo file is gone, everything was undone: it is removed last, before the record.

    Raises:
        CorruptChain: the undo file does not fit the images of the record, or one of them was written since.
    """
    undo = operation.details.get("undo")
    if not isinstance(undo, Path):
        raise CorruptChain(operation.path, "the operation record names no undo file: `recover --abandon` gives it up")
    if not os.path.lexists(undo):
        return
    with UndoFile.open(undo) as record, record.opened(opener, folders_of(operation)) as files:
        for file in files:
            if not operation.involves(file.path):
                raise CorruptChain(operation.path, f"does not name {file.path}, which {undo} would change")
        record.check_cids(files)
        record.restore(files)
    undo.unlink()
    sync_folder(undo.parent)


def _plan(file: BlockFile, *, repairing: bool) -> ExtentPlan:
    """Return the changes to one file: a descriptor, or an extent."""
    raw = file.read_at(0, SECTOR_SIZE)
    if raw[:4] == COWD_MAGIC:
        return _plan_cowd(file, repairing=repairing)
    if raw[:4] != MAGIC:
        return ExtentPlan(file, end=file.size())
    header = SparseExtentHeader.parse(raw, path=file.path)
    repaired = replace(header, unclean_shutdown=0)
    if header.flags & HeaderFlag.NEWLINE_TEST:
        repaired = replace(repaired, newline_probe=NEWLINE_PROBE)
    check_header(repaired, file.path, file.size(), tolerant=True)
    refuse_moved(repaired, file)
    if header.compressed or header.flags & HeaderFlag.MARKERS:
        raise Unsupported(file.path, "streamOptimized extents cannot be repaired: convert what can be read")
    plan = ExtentRepair(file, shape_of(repaired)).plan(repairing=repairing)
    repaired = replace(repaired, gd_offset=plan.gd_offset, rgd_offset=plan.rgd_offset or repaired.rgd_offset)
    if repairing and repaired != header:
        plan.header = repaired.serialise()
    return plan


def _plan_cowd(file: BlockFile, *, repairing: bool) -> ExtentPlan:
    header = read_cowd_header(file, file.path)
    plan = ExtentRepair(file, shape_of(header)).plan(repairing=repairing)
    used = byte_sectors(plan.end)
    if used != header.free_sector:
        plan.header = replace(header, free_sector=used).serialise()
    return plan


def _files(path: Path, resolver: Resolver, opener: FileOpener, stack: contextlib.ExitStack) -> Iterator[BlockFile]:
    file = open_file_for_change(path, opener)
    stack.callback(file.close)
    yield file
    if not is_descriptor(file.read_at(0, SECTOR_SIZE)):
        return
    for line in Descriptor.parse(file.read_at(0, MAX_BYTES), path=path).extents:
        if line.file is not None and line.type in ("SPARSE", "VMFSSPARSE"):
            extent = open_file_for_change(resolver(path, line.file, "extent"), opener)
            stack.callback(extent.close)
            yield extent


def _apply(plan: ExtentPlan) -> None:
    file = plan.file
    for copied in plan.copies:
        _copy(file, copied)
    for at, length in plan.blanks:
        zero_range(file, at, length)
        if at + length > file.size():
            file.truncate(at + length)
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
