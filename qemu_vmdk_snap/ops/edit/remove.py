"""Take any image out of a tree: its children move to its parent and read what they read; so does everything else."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_vmdk_snap.chain.chain import open_links
from qemu_vmdk_snap.chain.children import find_children
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.errors import CorruptChain, InvalidRequest
from qemu_vmdk_snap.ops.edit.move import open_move, run_moves
from qemu_vmdk_snap.ops.journal.relink import changing_child_of
from qemu_vmdk_snap.ops.progress import OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import FileOpener, open_posix

OPERATION = "remove"


@dataclass(frozen=True, slots=True)
class RemoveReport:
    """What a removal did."""

    path: Path
    parent: Path | None
    """What the children stand on now; None where they became bases."""
    moved: tuple[Path, ...]


def remove(
    path: Path | str,
    *,
    children: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    on_progress: OnProgress = ignore,
) -> RemoveReport:
    """Delete the image; each of its children first gets what it took from it, and then its parent.

    Children are those in `children`, and those in the folder of the image. Nothing is merged into the parent, so it and
    its other children read what they read. (To merge downwards, which copies only once, see `commit`.)

    Cancelled by a callback that raises, the image is still there, and every child is on it or already on its parent.

    Raises:
        InvalidRequest: `path` is a symbolic link, or a file beside it cannot be read and may be a child.
        LockBusy: another process has the image or a child open.
        Unsupported: a child is of a kind that takes no writes.
        CorruptChain: one of `children` does not stand on the image; or a chain cannot be followed.
        CidMismatch, FormatError, OSError: a chain cannot be opened.
    """
    from qemu_vmdk_snap.ops.journal.recover import settle

    path = Path(path)
    if path.is_symlink():
        raise InvalidRequest(path, f"is a symbolic link to {path.resolve()}: name the image itself")
    settle(path.parent, opener=opener)
    find = resolver or confined()
    given = [Path(child) for child in children]
    with contextlib.ExitStack() as stack:
        # Opened for writing: nobody else may be using it. It stays open to the end, so that nobody comes to write it.
        chain = stack.enter_context(open_links(path, writable_depths=[0], resolver=find, opener=opener))
        image = chain.links[0]
        parent = chain.links[1].path if chain.depth > 1 else None
        folders = {path.parent, *(one.parent for one in given)}
        found = [child.path for child in find_children(path, image.cid, folders, find)]
        for child in given:
            if child.resolve() not in {one.resolve() for one in found}:
                raise CorruptChain(child, f"is no child of {path}")
        image.share()  # the children read what it holds
        with changing_child_of(path):
            moves = [open_move(child, parent, find, opener, stack) for child in found]
        run_moves(OPERATION, path, moves, [file.path for file in image.files], on_progress)
    return RemoveReport(path, parent, tuple(found))
