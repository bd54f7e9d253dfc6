"""Remove any image from a tree: its children move to its parent, and everything reads the same."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from qemu_vmdk_snap.chain.change import open_for_change
from qemu_vmdk_snap.chain.needs.dependents import (
    Census,
    children_of,
    require_fit,
    require_nobody_new,
    search_folders,
)
from qemu_vmdk_snap.chain.needs.own import own_files
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.errors import CorruptChain, InvalidRequest
from qemu_vmdk_snap.light import dataclass
from qemu_vmdk_snap.ops.edit.move import open_move, run_moves
from qemu_vmdk_snap.ops.journal.recover import settle
from qemu_vmdk_snap.ops.journal.relink import changing_child_of
from qemu_vmdk_snap.ops.progress import OnProgress, ignore
from qemu_vmdk_snap.storage.blockfile import FileOpener, open_posix

OPERATION = "remove"


@dataclass(frozen=True, slots=True)
class RemoveReport:
    """What a removal did."""

    path: Path
    parent: Path | None
    """What backs the children now; None where they became bases."""
    moved: tuple[Path, ...]
    """The children."""

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `image remove --output=json` shows it."""
        return {
            "filename": str(self.path),
            "parent": None if self.parent is None else str(self.parent),
            "moved": [str(path) for path in self.moved],
        }


def remove(
    path: Path | str,
    *,
    children: Sequence[Path | str] = (),
    orphans: Sequence[Path | str] = (),
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    on_progress: OnProgress = ignore,
) -> RemoveReport:
    """Delete the image; what each child reads from it is first copied into the child, which then gets its parent.

    Children are those in `children`, and those in the folder of the image and in the folders that `resolver` allows.
    Nothing is merged into the parent, so it and its other children read the same. (To merge downwards, which
    copies only once, see `commit`.) `orphans` are files that need the image and are given up: they are not changed, and
    become invalid.

    If a callback cancels it, the image still exists, and the parent of every child is the image or already its parent.

    Raises:
        StillNeeded: a file that cannot be moved needs the image or one of its extents, or may need it.
        InvalidRequest: `path` is a symbolic link, or an extent is not the image's own.
        LockBusy: another process has the image or a child open.
        Unsupported: the kind of a child does not allow writing.
        CorruptChain: one of `children` is not backed by the image; or a chain cannot be followed.
        CidMismatch, FormatError, OSError: a chain cannot be opened, or a child does not fit.
    """
    path = Path(path)
    if path.is_symlink():
        raise InvalidRequest(path, f"is a symbolic link to {path.resolve()}: name the image itself")
    find = resolver or confined(trusted_dirs)
    settle(path.parent, opener=opener, resolver=find)
    given = [Path(child) for child in children]
    with contextlib.ExitStack() as stack:
        # Opened for writing: nobody else may be using it. It stays open to the end, so that no writer can open it.
        chain = stack.enter_context(open_for_change(path, depths=[0], resolver=find, opener=opener))
        image = chain.links[0]
        parent = chain.links[1].path if chain.depth > 1 else None
        doomed = own_files(image)
        census = Census.of(search_folders([path, *doomed, *given], find))
        found = children_of(path, doomed, census, named=given, orphans=[Path(one) for one in orphans])
        require_fit(path, image.cid, found)
        for child in given:
            if child.resolve() not in {one.path.resolve() for one in found}:
                raise CorruptChain(child, f"is not backed by {path}")
        image.share()  # the children read what it holds
        with changing_child_of(path):
            moves = [open_move(one.path, parent, find, opener, stack) for one in found]
        run_moves(OPERATION, path, moves, doomed, on_progress, lambda: require_nobody_new(path, doomed, census))
    return RemoveReport(path, parent, tuple(one.path for one in found))
