"""The files of an unfinished operation: locked, checked to be empty, and unlinked only if nothing can be lost."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import HOLE, Link, confined, open_link, open_posix
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.journal.record import Intent, Overlay
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt


def unlink_overlays(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> tuple[Path, ...]:
    """Unlink what the killed command made; return what had to stay."""
    left = []
    folders = chain_folders(intent)
    for overlay in intent.overlays:
        path = Path(overlay.path)
        if not os.path.lexists(path):
            continue
        ours = _identity(path) == overlay.identity
        if not ours and (overlay.identity is None or _identity(path)[1] == overlay.identity[1]):
            # It died before it recorded which files it made, or the machine was restarted, and device numbers changed.
            ours = _parent_of(path, folders) == Path(overlay.frozen) and not _is_named(conn, domain, path)
        if not ours:
            left.append(path)
            continue
        try:
            with contextlib.ExitStack() as held:
                hold_empty(overlay, folders, held)
                path.unlink()
        except (VmdkSnapError, OSError):
            left.append(path)
    return tuple(left)


def unlink_made(overlay: Overlay) -> None:
    """Unlink the overlay that this process made, unless another file has its name now."""
    path = Path(overlay.path)
    if os.path.lexists(path) and _identity(path) == overlay.identity:
        path.unlink()


def chain_folders(intent: Intent) -> list[Path]:
    """Return the folders of the snapshot's chains: nothing else is opened, whatever parents the files name."""
    return sorted({path.parent for path in xml.files_in(intent.new_xml)})


def hold_empty(overlay: Overlay, folders: Sequence[Path], held: contextlib.ExitStack) -> None:
    """Lock the overlay against every other user until `held` closes.

    Raises:
        DomainError: it has been written to.
        LockBusy: a guest, or another program, has it open.
    """
    if not hold_link(overlay, folders, held):
        raise DomainError(overlay.target, f"overlay {overlay.path} contains data: it was not deleted")


def hold_link(overlay: Overlay, folders: Sequence[Path], held: contextlib.ExitStack) -> bool:
    """Lock the overlay, not its parents, and return whether it is empty."""
    link = open_link(Path(overlay.path), opener=open_posix, writable=True, resolver=confined(folders))
    held.callback(link.close)
    return is_empty(link)


def all_empty(intent: Intent) -> bool:
    """Return whether nothing has been written to the overlays, which nobody has open."""
    for overlay in intent.overlays:
        with contextlib.ExitStack() as held:
            if not hold_link(overlay, chain_folders(intent), held):
                return False
    return True


def is_empty(link: Link) -> bool:
    """Return whether the image stores nothing of its own."""
    return all(bool((table.kinds == HOLE).all()) for table in link.tables())


def _is_named(conn: libvirt.virConnect, domain: libvirt.virDomain, path: Path) -> bool:
    # Imported by name, as that module imports the records.
    needed = importlib.import_module("qemu_vmdk_snap.domain.needs.needed")
    return bool(needed.is_named(conn, domain, path))


def _parent_of(path: Path, folders: Sequence[Path]) -> Path | None:
    try:
        with engine.open_chain(path, trusted_dirs=folders, lock=False, check_cids=False) as chain:
            return chain.links[1].path if chain.depth > 1 else None
    except (VmdkSnapError, OSError):
        return None


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
