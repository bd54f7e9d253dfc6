"""Make an overlay empty again, at the same path: its chain then shows what the parent holds.

The new overlay is made complete under a hidden name and renamed over the old one, so that whoever opens the path gets
the one or the other. Owner, mode, ACLs and security labels are those of the old one: the same program is to open it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.chain.children import find_children
from qemu_vmdk_snap.chain.links import LinkFacts, read_links
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import InvalidRequest, LockBusy, Unsupported
from qemu_vmdk_snap.ops.make.create import create_overlay
from qemu_vmdk_snap.storage.blockfile import PosixFile
from qemu_vmdk_snap.storage.durable import sync_folder
from qemu_vmdk_snap.storage.locks import lock_image

_EMBEDDED: Final = "monolithicsparse"
_DRAFT: Final = ".renewed"


@dataclass(frozen=True, slots=True)
class RenewReport:
    """What was renewed."""

    path: Path
    parent: Path
    dropped_bytes: int
    """What the old overlay took up on its file system."""


def renew_overlay(path: Path | str, *, trusted_dirs: Sequence[Path | str] = ()) -> RenewReport:
    """Replace the overlay `path` by an empty one of the same size on the same parent.

    When it fails, the overlay is as it was.

    No image tells of its children. They are looked for where they may be opened from without a further word: in the
    folders of the chain, and in `trusted_dirs` themselves (not below). One elsewhere is not known of; the new overlay
    has another CID, so whoever opens such a child gets CidMismatch, and never wrong bytes.

    Raises:
        InvalidRequest: it has no parent, or it is itself the parent of other images, which would lose their data.
        Unsupported: it does not consist of one file.
        LockBusy: a guest, or another program, has it open.
        CorruptChain, CidMismatch, FormatError: its chain does not hold together; see `read_links`.
        OSError: a file cannot be read or made.
    """
    path = Path(os.path.realpath(path))  # a link at the path stays one
    file = PosixFile.open(path, writable=True)
    try:
        lock_image(file.fileno(), path, writable=True)  # nobody else, from before the look to after the rename
        links = read_links(path, trusted_dirs=trusted_dirs)
        top = links[0]
        if top.is_base:
            raise InvalidRequest(path, "has no parent to go back to: it is no overlay")
        if top.create_type.lower() != _EMBEDDED or top.files != (path,):
            raise Unsupported(path, f"only an overlay in one file can be renewed, not one of type {top.create_type}")
        resolver = confined([path.parent, *trusted_dirs])
        children = find_children(path, top.cid, _folders(links, trusted_dirs), resolver)
        if children:
            raise InvalidRequest(path, f"is the parent of {children[0].path}, which would lose its data")
        _replace(path, links[1].path, top.hint, top.capacity, file)
        return RenewReport(path, links[1].path, os.fstat(file.fileno()).st_blocks * 512)
    finally:
        file.close()


def _folders(links: Sequence[LinkFacts], trusted_dirs: Sequence[Path | str]) -> set[Path]:
    folders = {link.path.resolve().parent for link in links} | {Path(folder) for folder in trusted_dirs}
    return {folder for folder in folders if folder.is_dir()}


def _replace(path: Path, parent: Path, hint: str | None, capacity: int, old: PosixFile) -> None:
    # A fixed name, since the lock keeps others out: what a killed run leaves is swept by the next, and cannot pile up.
    temporary = path.with_name(f".{path.name[:200]}{_DRAFT}")
    _sweep(temporary)
    try:
        # Made durable below, once, when its attributes are right too.
        create_overlay(temporary, parent, hint=hint, size=capacity, durable=False, mode=0o600, name=path.name)
        fd = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _copy_attributes(old.fileno(), fd)
            os.fsync(fd)  # barrier: a power cut must not leave the name with half a file
        finally:
            os.close(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sweep_drafts(folder: Path, about: Path | None = None) -> list[Path]:
    """Remove the overlays that killed runs of this user have not put in place, of the image `about` or of all.

    Return which. Whoever renews an image holds its lock meanwhile, so nothing of a living run is taken.
    """
    swept = []
    for draft in sorted(folder.glob(f".*{_DRAFT}")):
        image = draft.with_name(draft.name[1 : -len(_DRAFT)])
        if about is not None and image.name != about.name:
            continue
        with contextlib.suppress(OSError, LockBusy), contextlib.ExitStack() as stack:
            facts = draft.lstat()
            if stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid():
                file = PosixFile.open(image)
                stack.callback(file.close)
                lock_image(file.fileno(), image, writable=True)
                draft.unlink()
                swept.append(draft)
    return swept


def _sweep(temporary: Path) -> None:
    """Remove what a killed run has left: the new overlay, or the hidden file that was to become it."""
    with os.scandir(temporary.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith((temporary.name, f".{temporary.name}."))]
    for name in names:
        temporary.with_name(name).unlink(missing_ok=True)


def _copy_attributes(old: int, new: int) -> None:
    """Give the new file owner, mode, ACLs and labels of the old one."""
    was, now = os.fstat(old), os.fstat(new)
    if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        os.fchown(new, was.st_uid, was.st_gid)
    os.fchmod(new, stat.S_IMODE(was.st_mode))
    try:
        names = os.listxattr(old)
    except OSError:  # a file system without them
        return
    for name in names:
        value = os.getxattr(old, name)
        try:
            same = os.getxattr(new, name) == value
        except OSError:
            same = False
        if not same:
            os.setxattr(new, name, value)
