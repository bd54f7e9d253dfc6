"""Unlinking the tops that a revert discards, if they are in no snapshot, not in use, and not needed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap import confined, open_link, open_posix, own_files
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.needs.needed import Given, Needed, real_file
from qemu_vmdk_snap.errors import VmdkSnapError

if TYPE_CHECKING:
    import libvirt

    from qemu_vmdk_snap.domain.journal.record import Intent


def unlink_discarded(
    conn: libvirt.virConnect,
    domain: libvirt.virDomain,
    intent: Intent,
    *,
    orphans: Sequence[Path] = (),
    notes: list[str] | None = None,
) -> tuple[Path, ...]:
    """Unlink what the revert discards; return what is deleted. Why a file is kept goes to `notes`.

    `orphans` are files that the user gives up: they may lose what they need.
    """
    gone: list[Path] = []
    if not intent.discard:
        return ()
    folders = sorted({path.parent for path in xml.files_in(intent.new_xml)})
    inodes = dict(zip(intent.discard, intent.discard_inodes, strict=False))
    for path in map(Path, intent.discard):
        try:
            if path.stat().st_ino != inodes.get(str(path), path.stat().st_ino):
                continue  # another file than the one to discard
            _unlink_one(conn, domain, path, folders, Given(tuple(orphans)))
        except (VmdkSnapError, OSError) as error:
            if notes is not None and not isinstance(error, FileNotFoundError):
                notes.append(f"{path} is kept: {error}")
        else:
            gone.append(path)
    return tuple(gone)


def _unlink_one(
    conn: libvirt.virConnect, domain: libvirt.virDomain, path: Path, folders: Sequence[Path], orphans: Given
) -> None:
    with contextlib.ExitStack() as held:
        link = open_link(path, opener=open_posix, writable=True, resolver=confined([*folders, path.parent]))
        held.callback(link.close)
        files = own_files(link)
        needed = Needed.read(conn, domain, folders=[path.parent])
        needed.require_unneeded(path, files, needed.in_use(domain.UUIDString()), orphans=orphans)
        for file in files:
            real_file(file).unlink()  # a symbolic link to it belongs to the user, and stays
