"""Overlays on a domain's files that nobody names: found, and removed where that is safe.

A killed tool, a snapshot whose metadata was deleted alone, a copy made by hand: they leave images that stand on a file
of the domain, and are named by no domain and no snapshot. Such an image may hold the only copy of somebody's data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.state import inactive_xml, volume_resolver
from qemu_vmdk_snap.errors import DomainError, InvalidRequest, VmdkSnapError

if TYPE_CHECKING:
    import libvirt


@dataclass(frozen=True, slots=True)
class Orphan:
    """An image that stands on a file of the domain, and that nobody names."""

    path: Path
    parent: Path
    allocated: int
    """Bytes that its files take up."""
    empty: bool
    """Whether it holds nothing: it shows what its parent shows."""
    problem: str | None
    """Why it cannot be read, in one line."""


def domain_files(conn: libvirt.virConnect, domain: libvirt.virDomain) -> set[Path]:
    """Return every file that the domain and its snapshots name, and the files below them; links resolved."""
    return _with_parents(_named(conn, domain))


def find_orphans(conn: libvirt.virConnect, domain: libvirt.virDomain) -> list[Orphan]:
    """Return the orphans in the folders of the domain's files, by name; parents come before what stands on them.

    Raises:
        DomainError: libvirt cannot tell what is named.
    """
    mine = domain_files(conn, domain)
    known: set[Path] = set(mine)
    with libvirt_errors(domain.name(), "see what other domains name"):
        for other in conn.listAllDomains():
            known |= _with_parents(_named(conn, other))
    known |= _about_to_be_made(conn)
    folders = {path.parent for path in mine}
    found: list[Orphan] = []
    candidates = sorted(_parents(folders, known).items())
    grew = True
    while grew:  # an orphan may stand on an orphan
        grew = False
        for path, parent in candidates:
            if parent.resolve() in mine and path.resolve() not in mine:
                mine.add(path.resolve())
                found.append(_describe(path, parent, folders))
                grew = True
    return found


def remove_orphan(conn: libvirt.virConnect, domain: libvirt.virDomain, path: Path, *, with_data: bool = False) -> None:
    """Delete an orphan that nothing stands on and nobody uses; one that holds data only `with_data`.

    Raises:
        DomainError: it is no orphan (any more), something stands on it, or it holds data.
        LockBusy: somebody uses it.
        VmdkSnapError, OSError: it cannot be read, or not be removed.
    """
    name = domain.name()
    with IntentStore.of(conn).locked(domain.UUIDString(), name):
        orphans = find_orphans(conn, domain)
        found = [orphan for orphan in orphans if orphan.path.resolve() == path.resolve()]
        if not found:
            raise DomainError(name, f"{path} is no orphan of it")
        above = [orphan.path for orphan in orphans if orphan.parent.resolve() == path.resolve()]
        if above:
            raise DomainError(name, f"{path} is the parent of {above[0]}: remove that first")
        folders = sorted({path.parent, found[0].parent.parent})
        with engine.open_chain(path, writable=True, trusted_dirs=folders, check_cids=False) as chain:
            # Looked at again under the lock: until now somebody may have written to it.
            if not with_data and not _is_empty(chain):
                raise DomainError(name, f"{path} holds data: it is not removed unless it is named for that")
            for file in chain.links[0].files:
                file.path.unlink()


def _named(conn: libvirt.virConnect, domain: libvirt.virDomain) -> set[Path]:
    """Return the files that the domain's XML, live and persistent, and its snapshots name."""
    name = domain.name()
    volume_path = volume_resolver(conn, name)
    with libvirt_errors(name, "read what it names"):
        texts = [domain.XMLDesc(0), inactive_xml(domain)]
        texts += [snapshot.getXMLDesc(0) for snapshot in domain.listAllSnapshots()]
    named = set().union(*(xml.files_in(text) for text in texts))
    for text in texts[:2]:
        named |= {disk.path for disk in xml.list_disks(text, volume_path) if disk.path is not None}
    return named


def _with_parents(named: Iterable[Path]) -> set[Path]:
    """Return the files and what stands below them, whatever folder that is in: they are only looked at."""
    known: set[Path] = set()
    for path in named:
        known.add(path.resolve())
        with contextlib.suppress(VmdkSnapError, OSError):
            facts = engine.read_facts(path)
            while not facts.is_base and facts.hint is not None:
                parent = engine.confined([Path("/")])(facts.path, facts.hint, "parent").resolve()
                if parent in known:
                    break
                known.add(parent)
                facts = engine.read_facts(parent)
    return known


def _about_to_be_made(conn: libvirt.virConnect) -> set[Path]:
    """Return the overlays of snapshots that are under way, or wait to be settled."""
    store = IntentStore.of(conn)
    paths: set[Path] = set()
    for uuid in store.uuids():
        with contextlib.suppress(DomainError, InvalidRequest):  # doctor reports the record, or the folder
            intent = store.read(uuid)
            paths |= {Path(overlay.path).resolve() for overlay in intent.overlays} if intent else set()
    return paths


def _parents(folders: Collection[Path], known: Collection[Path]) -> dict[Path, Path]:
    """Return image -> parent of everything in the folders that has one, and is not known."""
    find = engine.confined(sorted(folders))
    found = {}
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.startswith(".") or not path.is_file() or path.resolve() in known:
                continue
            with contextlib.suppress(VmdkSnapError, OSError):
                facts = engine.read_facts(path, find)
                if not facts.is_base and facts.hint is not None:
                    found[path] = find(path, facts.hint, "parent")
    return found


def _describe(path: Path, parent: Path, folders: Collection[Path]) -> Orphan:
    allocated = path.stat().st_blocks * 512
    try:
        with engine.open_chain(path, trusted_dirs=sorted(folders), lock=False) as chain:
            allocated = sum(file.path.stat().st_blocks * 512 for file in chain.links[0].files)
            return Orphan(path, parent, allocated, _is_empty(chain), None)
    except VmdkSnapError as error:
        return Orphan(path, parent, allocated, False, str(error))
    except OSError as error:
        return Orphan(path, parent, allocated, False, f"{error.filename or path}: {error.strerror}")


def _is_empty(chain: engine.Chain) -> bool:
    return all(run.depth > 0 or run.kind is engine.RunKind.HOLE for run in chain.map())
