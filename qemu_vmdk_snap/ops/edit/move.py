"""Changing the parent of images without changing what they read: common to rebase, flatten and remove.

For each image: what it would see differently through the new parent is copied into it, durably; then one change of its
descriptor moves it. It reads the same before, after and between, so after a crash the operation simply continues.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu_vmdk_snap import log
from qemu_vmdk_snap.chain.chain import Chain, open_chain, open_links
from qemu_vmdk_snap.chain.change import open_for_change
from qemu_vmdk_snap.chain.identity import on_parent
from qemu_vmdk_snap.chain.link import Link
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.chain.windows import windows
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.ops.copy.transfer import STEP, LinkWriter, View
from qemu_vmdk_snap.ops.edit.trim import trim_link
from qemu_vmdk_snap.ops.journal.guard import check_unwritten, folders_of, guarded_operation
from qemu_vmdk_snap.ops.journal.relink import DescriptorChange
from qemu_vmdk_snap.ops.progress import Meter, OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import FileOpener
from qemu_vmdk_snap.storage.durable import sync_folder
from qemu_vmdk_snap.storage.locks import keep_from_writers
from qemu_vmdk_snap.storage.opening import open_locked
from qemu_vmdk_snap.storage.record import Operation
from qemu_vmdk_snap.vmdk.runs import DATA, HOLE, NO_SOURCE, ZERO, Row, RunTable

if TYPE_CHECKING:
    import numpy.typing as npt

_log = log.of(__name__)


@dataclass(slots=True)
class Move:
    """One image that gets another parent; its chain is open, the image itself for writing."""

    chain: Chain
    target: Chain | None
    """The chain of the new parent; None makes the image a base."""
    change: DescriptorChange

    @property
    def links(self) -> list[Link]:
        """Every link that is read."""
        return [*self.chain.links, *(self.target.links if self.target is not None else ())]


def open_move(
    path: Path,
    parent: Path | None,
    resolver: Resolver,
    opener: FileOpener,
    stack: contextlib.ExitStack,
    *,
    begun: bool = False,
) -> Move:
    """Open what is needed to make `parent` the parent of `path`; `begun` if its operation record exists already.

    Raises:
        InvalidRequest: `parent` itself is backed by `path`.
    """
    if path.is_symlink():
        path = path.resolve()
    target = None
    if parent is not None:
        with open_chain(parent, resolver=resolver, opener=opener, lock=False) as look:
            if any(link.path.resolve() == path.resolve() for link in look.links):
                raise InvalidRequest(path, f"cannot have {parent} as its parent, which is backed by it")
        target = stack.enter_context(open_chain(parent, resolver=resolver, opener=opener))
    if begun:
        chain = stack.enter_context(open_links(path, writable_depths=[0], resolver=resolver, opener=opener))
    else:
        chain = stack.enter_context(open_for_change(path, depths=[0], resolver=resolver, opener=opener))
    link = chain.links[0]
    changed = on_parent(link.descriptor, path, parent, None if target is None else target.links[0].descriptor)
    return Move(chain, target, DescriptorChange.plan(link, changed))


def run_moves(
    operation: str,
    image: Path,
    moves: Sequence[Move],
    delete: Iterable[Path],
    on_progress: OnProgress,
    still: Callable[[], None] = lambda: None,
) -> None:
    """Move every image, then delete the files; durable after each step, and recorded so that it can be finished.

    `still` is called when the record exists: if it raises, the operation ends before anything has changed.
    """
    unlinked = list(delete)
    details = {
        "changes": [move.change.as_detail() for move in moves],
        "targets": [None if move.target is None else move.target.path for move in moves],
        "links": sorted({link.path for move in moves for link in move.links}),
        "delete": unlinked,
    }
    record = guarded_operation(operation, image, [*(move.change.path for move in moves), *unlinked], details)
    with record.hold:
        record.begin_if(still)
        for move in moves:
            try:
                copy_differences(move.chain, move.target, on_progress)
            except BaseException:
                trim_link(move.chain.links[0])  # everything reads the same as before: nothing is left to finish
                record.end()
                raise
            move.change.apply(move.chain.links[0])
            _log.info("%s: its parent is now %s", move.change.path, None if move.target is None else move.target.path)
        delete_files(unlinked)
        record.end()


def relink_copied(
    operation: str,
    moved: DescriptorChange,
    link: Link,
    parent: Path | None,
    gone: Link,
    delete: Sequence[Path],
    still: Callable[[], None] = lambda: None,
) -> None:
    """Put an open link that has everything already on another parent, then delete the files of the one that is gone.

    For who copied by himself, durably, while the image was in use. Recorded as `run_moves` does, so that it is finished
    by whoever comes after a crash.
    """
    details = {
        "changes": [moved.as_detail()],
        "targets": [parent],
        "links": sorted({path for path in (link.path, gone.path, parent) if path is not None}),
        "delete": list(delete),
    }
    record = guarded_operation(operation, Path(gone.path), [moved.path, *delete], details)
    with record.hold:
        record.begin_if(still)
        moved.apply(link)
        _log.info("%s: its parent is now %s", moved.path, parent)
        delete_files(delete)
        record.end()


def finish_moves(record: Operation, opener: FileOpener) -> None:
    """Finish moves that another process began."""
    details = record.details
    resolver = confined(folders_of(record))
    with holding(details["delete"], opener):
        check_unwritten(record)  # they cannot be written any more
        _finish_each(details, resolver, opener)
        delete_files(details["delete"])


def _finish_each(details: Mapping[str, Any], resolver: Resolver, opener: FileOpener) -> None:
    for detail, target in zip(details["changes"], details["targets"], strict=True):
        change = DescriptorChange.from_detail(detail)
        if change.is_pending(opener):
            with contextlib.ExitStack() as stack:
                move = open_move(change.path, target, resolver, opener, stack, begun=True)
                trim_link(move.chain.links[0])
                copy_differences(move.chain, move.target, ignore)
        change.redo(opener)


@contextlib.contextmanager
def holding(paths: Iterable[Path], opener: FileOpener) -> Iterator[None]:
    """Lock the files that are about to be deleted against writers; those that are gone already are ignored.

    Raises:
        LockBusy: another process has one of them open.
    """
    with contextlib.ExitStack() as stack:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                file = open_locked(path, opener, writable=True)
                stack.callback(file.close)
                descriptor = file.fileno()
                if descriptor is not None:
                    keep_from_writers(descriptor)
        yield


def delete_files(paths: Iterable[Path]) -> None:
    """Delete files, durably; one that is gone already is not an error. Symbolic links are not followed."""
    folders = set()
    for path in paths:
        path.unlink(missing_ok=True)
        _log.info("%s: deleted", path)
        folders.add(path.parent)
    for folder in folders:
        sync_folder(folder)


def copy_differences(chain: Chain, target: Chain | None, on_progress: OnProgress) -> None:
    """Store in the top of `chain`, durably, what it reads from its parent and would not read from `target`."""
    top, total = chain.links[0], chain.capacity
    old = View(chain, 1)
    new = View(chain, chain.depth) if target is None else View(target, 0, total)
    meter = Meter("rebase", total, on_progress)
    writer = LinkWriter(top, old, meter.step, later=new)
    places = _Places()
    old_places, new_places = places.of(chain), places.of(target)
    links = [*chain.links, *(target.links if target is not None else [])]
    for start, stop in windows([link.extents for link in links], 0, total):
        before, after = _whole(chain, 1, start, stop), _whole(target, 0, start, stop)
        plain, doubtful = _differing(top.resolve(start, stop), before, old_places, after, new_places)
        writer.put_rows(plain, old)
        for row in doubtful:
            _put_if_different(writer, row, old, new, top)
            meter.step(row.length)
        meter.reach(stop)
    writer.finish()


def _whole(chain: Chain | None, depth: int, start: int, stop: int) -> RunTable:
    if chain is None or depth >= chain.depth:
        return RunTable.single(start, stop, HOLE)
    return chain.resolve(start, stop, depth)


class _Places:
    """Numbers the files of several chains; a file always has the same number."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def of(self, chain: Chain | None) -> npt.NDArray[np.int64]:
        """Return the number of the file of each source; the last one (`NO_SOURCE`) is not a file's."""
        found = [] if chain is None else [self._number(source.placed.extent.file) for source in chain.sources]
        return np.array([*found, -1], np.int64)

    def _number(self, file: object) -> int:
        descriptor = getattr(file, "fileno", lambda: None)()
        key: object = getattr(file, "path", None)
        if descriptor is not None:
            facts = os.fstat(descriptor)
            key = (facts.st_dev, facts.st_ino)
        return self._numbers.setdefault(key, len(self._numbers))


def _differing(
    top: RunTable,
    old: RunTable,
    old_places: npt.NDArray[np.int64],
    new: RunTable,
    new_places: npt.NDArray[np.int64],
) -> tuple[list[Row], list[Row]]:
    """Return the rows of `old` under holes of `top` that differ from `new`, and those whose bytes must be compared."""
    starts = np.unique(np.concatenate([top.starts, old.starts, new.starts]))
    i = np.searchsorted(old.starts, starts, "right") - 1
    j = np.searchsorted(new.starts, starts, "right") - 1
    seen = top.kinds[np.searchsorted(top.starts, starts, "right") - 1] == HOLE
    old_kinds, new_kinds = old.kinds[i], new.kinds[j]
    old_at = old.file_offsets[i] + np.where(old_kinds == DATA, starts - old.starts[i], 0)
    new_at = new.file_offsets[j] + np.where(new_kinds == DATA, starts - new.starts[j], 0)
    same_place = (
        (old_kinds == new_kinds) & (old_at == new_at) & (old_places[old.sources[i]] == new_places[new.sources[j]])
    )
    zeros, new_zeros = old_kinds <= ZERO, new_kinds <= ZERO
    differs = seen & ~np.where(zeros | new_zeros, zeros & new_zeros, same_place)
    kinds = np.where(zeros, ZERO, old_kinds)
    sources = np.where(zeros, NO_SOURCE, old.sources[i])

    def rows(wanted: npt.NDArray[np.bool_]) -> list[Row]:
        table = RunTable(starts, np.where(wanted, kinds, HOLE).astype(np.uint8), sources, old_at, old.end)
        return [row for row in table.coalesced().rows() if row.kind != HOLE]

    return rows(differs & new_zeros), rows(differs & ~new_zeros)


def _put_if_different(writer: LinkWriter, row: Row, old: View, new: View, top: Link) -> None:
    unit = top.grain_bytes if top.grain_bytes <= STEP else STEP
    end = row.offset + row.length
    start = row.offset
    while start < end:
        stop = min(end, start - start % STEP + STEP)
        mine = bytes(stop - start) if row.kind == ZERO else old.read_row(row, start - row.offset, stop - start)
        theirs = new.read(start, stop - start)
        if mine != theirs:
            for first, last in _grains(start, stop, unit):
                piece = mine[first - start : last - start]
                if piece == theirs[first - start : last - start]:
                    continue
                if row.kind == ZERO:
                    writer.put_zeros(first, last - first)
                else:
                    writer.put_bytes(first, piece)
        start = stop


def _grains(start: int, stop: int, unit: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        end = min(stop, start - start % unit + unit)
        yield start, end
        start = end
