"""Overlays on a domain's files that no domain and no snapshot names: found, and removed where that is safe.

A killed tool, a snapshot whose metadata alone was deleted, a copy made by hand: they leave images that are backed by a
file of the domain, and are named by no domain and no snapshot. Such an image may contain the only copy of data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain.journal.overlays import is_empty
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.needs.needed import Given, Needed, real_file, same_file
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt


@dataclass(frozen=True, slots=True)
class Orphan:
    """An image that is backed by a file of the domain, and that no domain and no snapshot names."""

    path: Path
    parent: Path
    allocated: int
    """The size of its files on disk, in bytes."""
    empty: bool
    """Whether it is empty, so that it reads as its parent."""
    problem: str | None
    """Why it cannot be read, in one line."""


def find_orphans(conn: libvirt.virConnect, domain: libvirt.virDomain, needed: Needed | None = None) -> list[Orphan]:
    """Return the orphans of the domain's files, wherever they are; parents come before what is backed by them.

    Raises:
        DomainError: libvirt cannot list what is named.
        StillNeeded: a folder cannot be listed.
    """
    needed = needed or Needed.read(conn, domain)
    mine = needed.files_of(needed.of_domain(domain.UUIDString()))
    known = {engine.identity_if_known(path) for path in [*needed.files_of(needed.holders), *_about_to_be_made(conn)]}
    folders = {path.parent for path in mine}
    found: list[Orphan] = []
    level = mine
    while level:  # an orphan may be backed by an orphan
        upper: dict[Path, Path] = {}
        for parent in level:
            for one in needed.census.dependents([parent]):
                if one.how == "parent" and one.identity not in known and not one.path.name.startswith("."):
                    known.add(one.identity)
                    upper[one.path] = parent
        found += [_describe(path, parent, folders | {path.parent}) for path, parent in sorted(upper.items())]
        level = sorted(upper)
    return found


def remove_orphan(
    conn: libvirt.virConnect,
    domain: libvirt.virDomain,
    path: Path,
    *,
    with_data: bool = False,
    orphans: Sequence[Path] = (),
) -> None:
    """Delete an orphan that is not needed and not in use; one that contains data only `with_data`.

    `orphans` are files that need it and are given up.

    Raises:
        DomainError: it is not an orphan (any more), another one is backed by it, or it contains data.
        StillNeeded: something else needs it, or may.
        LockBusy: it is in use.
        VmdkSnapError, OSError: it cannot be read, or not be removed.
    """
    name, given_up = domain.name(), Given(tuple(orphans))
    with IntentStore.of(conn).locked(domain.UUIDString(), name):
        needed = Needed.read(conn, domain, folders=[path.parent])
        there = find_orphans(conn, domain, needed)
        found = [orphan for orphan in there if same_file(orphan.path, path)]
        if not found:
            raise DomainError(name, f"{path} is not an orphan of it")
        above = [orphan.path for orphan in there if same_file(orphan.parent, path) and not given_up.has(orphan.path)]
        if above:
            raise DomainError(name, f"{path} is the parent of {above[0]}: remove that first")
        folders = sorted({path.parent, real_file(path).parent, found[0].parent.parent})
        with engine.open_chain(path, writable=True, trusted_dirs=folders, check_cids=False) as chain:
            # Checked again under the lock: it may have been written to until now.
            if not with_data and not is_empty(chain.links[0]):
                raise DomainError(name, f"{path} contains data: it is removed only if it is named (--discard)")
            files = engine.own_files(chain.links[0])
            needed.require_unneeded(path, files, needed.holders, orphans=given_up)
            for file in files:
                real_file(file).unlink()


def _about_to_be_made(conn: libvirt.virConnect) -> set[Path]:
    """Return the overlays of snapshots that are being created or are unfinished."""
    store = IntentStore.of(conn)
    paths: set[Path] = set()
    for uuid in store.uuids():
        with contextlib.suppress(VmdkSnapError):  # doctor reports the record, or the folder
            intent = store.read(uuid)
            paths |= {Path(overlay.path).resolve() for overlay in intent.overlays} if intent else set()
    return paths


def _describe(path: Path, parent: Path, folders: Collection[Path]) -> Orphan:
    allocated = path.stat().st_blocks * 512
    try:
        with engine.open_chain(path, trusted_dirs=sorted(folders), lock=False) as chain:
            allocated = sum(file.path.stat().st_blocks * 512 for file in chain.links[0].files)
            return Orphan(path, parent, allocated, is_empty(chain.links[0]), None)
    except VmdkSnapError as error:
        return Orphan(path, parent, allocated, False, str(error))
    except OSError as error:
        return Orphan(path, parent, allocated, False, f"{error.filename or path}: {error.strerror}")
