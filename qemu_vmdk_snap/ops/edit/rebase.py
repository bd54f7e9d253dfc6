"""Change the parent of an image, or remove it; the image reads the same (unless it is done unsafely)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from qemu_vmdk_snap.chain.change import open_link_for_change
from qemu_vmdk_snap.chain.identity import on_parent
from qemu_vmdk_snap.chain.link import open_link
from qemu_vmdk_snap.chain.links import is_backed_by
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.ops.edit.move import open_move, run_moves
from qemu_vmdk_snap.ops.journal.guard import guarded_operation
from qemu_vmdk_snap.ops.journal.recover import settle
from qemu_vmdk_snap.ops.journal.relink import DescriptorChange
from qemu_vmdk_snap.ops.progress import OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import FileOpener, open_posix
from qemu_vmdk_snap.storage.record import Operation

OPERATION = "rebase"


@dataclass(frozen=True, slots=True)
class RebaseReport:
    """What a rebase did."""

    path: Path
    parent: Path | None
    """None where it is a base now."""

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `image rebase --output=json` shows it."""
        parent = None if self.parent is None else str(self.parent)
        return {"filename": str(self.path), "backing-filename": parent}


def rebase(
    path: Path | str,
    parent: Path | str | None,
    *,
    unsafe: bool = False,
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    on_progress: OnProgress = ignore,
) -> RebaseReport:
    """Make `parent` the parent of the image; with None the image becomes a base that needs no other file (flatten).

    The image reads the same: what would read differently from the new parent is copied into it first. Its CID stays, so
    its children stay too. `unsafe` only writes the new parent and its CID into the descriptor: for a parent that was
    moved, or is known to have the same content; the old parent need not exist.

    If a callback cancels it, the image still has its old parent.

    Raises:
        InvalidRequest: the new parent is backed by the image itself.
        Unsupported: the kind of the image does not allow writing, or the descriptor has no room for the parent's name.
        LockBusy: another process has the image open, or writes one of the parents.
        CidMismatch, CorruptChain, FormatError, OSError: one of the chains cannot be opened.
    """
    path, parent = Path(path), None if parent is None else Path(parent)
    path = path.resolve() if path.is_symlink() else path
    find = resolver or confined([*trusted_dirs, *([] if parent is None else [parent.parent])])
    settle(path.parent, opener=opener, resolver=find)
    if unsafe:
        _relink(path, parent, find, opener)
    else:
        with contextlib.ExitStack() as stack:
            move = open_move(path, parent, find, opener, stack)
            run_moves(OPERATION, path, [move], [], on_progress)
    return RebaseReport(path, parent)


def _relink(path: Path, parent: Path | None, resolver: Resolver, opener: FileOpener) -> None:
    known = None
    with contextlib.ExitStack() as stack:
        if parent is not None:
            if parent.resolve() == path.resolve():
                raise InvalidRequest(path, "cannot be its own parent")
            if is_backed_by(parent, path, resolver):
                raise InvalidRequest(path, f"cannot have {parent} as its parent, which is backed by it")
            below = open_link(parent, opener=opener, writable=False, resolver=resolver)
            stack.callback(below.close)  # its CID cannot change before it is recorded
            known = below.descriptor
        link = open_link_for_change(path, resolver=resolver, opener=opener, stack=stack)
        change = DescriptorChange.plan(link, on_parent(link.descriptor, path, parent, known))
        record = guarded_operation("relink", path, [], {"change": change.as_detail()})
        with record.hold:
            record.begin()
            change.apply(link)
            record.end()


def finish_relink(record: Operation, opener: FileOpener) -> None:
    """Finish an unsafe rebase that another process began."""
    DescriptorChange.from_detail(record.details["change"]).redo(opener)
