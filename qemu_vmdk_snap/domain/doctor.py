"""Is the host fit for it, and do a domain's chains, XML and registry agree? Everything here only looks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import dropin, xml
from qemu_vmdk_snap.domain.connect import find_domain, import_libvirt, libvirt_errors, open_connection
from qemu_vmdk_snap.domain.hooks import install as hooks
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.orphans import Orphan, domain_files, find_orphans
from qemu_vmdk_snap.domain.qemu.depth import max_links
from qemu_vmdk_snap.domain.state import inactive_xml, volume_resolver
from qemu_vmdk_snap.domain.xml.kept import kept_branches
from qemu_vmdk_snap.errors import VmdkSnapError
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    import libvirt

Verdict = Literal["good", "note", "bad"]
OLDEST_LIBVIRT: Final = (9, 0, 0)
OLDEST_QEMU: Final = (7, 2, 0)
MAX_PROBED_DEPTH: Final = 2
"""libvirt finds out the format of so many links by itself; deeper ones must be spelt out in the XML."""

_TOOLS: Final = {
    "qemu-system-x86_64": ("note", "guests of this kind, `guest boot` and `demo`: qemu-system-x86"),
    "qemu-img": ("note", "nothing here, but a second opinion on images: qemu-utils"),
    "virsh": ("note", "nothing here, but the examples and most administrators: libvirt-clients"),
    "nbdkit": ("note", "`serve`: nbdkit and nbdkit-plugin-python"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    subject: str
    verdict: Verdict
    """`note`: not as it could be, and in nobody's way."""
    text: str

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"subject": self.subject, "verdict": self.verdict, "text": self.text}


def check_host(uri: str | None = None, environ: dict[str, str] | os._Environ[str] = os.environ) -> Iterator[Check]:
    """Yield what there is to say about this machine's libvirt, QEMU, tools, hooks and folders."""
    yield from _check_libvirt(uri)
    yield from _check_tools()
    yield from _check_hooks(environ)


def check_domain(conn: libvirt.virConnect, domain_name: str) -> Iterator[Check]:
    """Yield what there is to say about the domain: its disks, its snapshots, what was left unfinished, orphans.

    Raises:
        DomainError: there is no such domain, or libvirt cannot tell.
    """
    domain = find_domain(conn, domain_name)
    name = domain.name()
    yield from _check_intent(conn, domain)
    with libvirt_errors(name, "read its XML and snapshots"):
        text = inactive_xml(domain)
        snapshots = [xml.parse_snapshot(s.getXMLDesc(0)) for s in domain.listAllSnapshots()]
        current = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
        limit = max_links(conn.getLibVersion())
    disks = [disk for disk in xml.list_disks(text, volume_resolver(conn, name)) if disk.path is not None]
    disks = [disk for disk in disks if disk.refusal is None or not disk.refusal.endswith("not vmdk")]
    chains: dict[str, list[Path]] = {}
    for disk in disks:
        yield _check_disk(disk, chains, limit)
    for snapshot in snapshots:
        yield _check_snapshot(snapshot, chains if snapshot.name == current else {})
    if snapshots and current is None:
        yield Check("snapshots", "note", "none of them is the current one")
    orphans = find_orphans(conn, domain)
    kept = {path.resolve(): snapshot for path, snapshot in kept_branches(text).items() if path.exists()}
    for orphan in orphans:
        yield _check_orphan(name, orphan, kept.get(orphan.path.resolve()))
    known = domain_files(conn, domain) | {orphan.path.resolve() for orphan in orphans}
    for path, kept_by in kept.items():
        if path not in known:  # deleting what it stood on has made it a disk by itself
            what = f"was kept by the revert to {kept_by!r} and stands on no file of the domain any more"
            yield Check(f"kept {path}", "note", f"{what}: delete the file, or use it as a disk of its own")


def _check_orphan(domain: str, orphan: Orphan, kept_by: str | None) -> Check:
    """Tell of an image that nobody names; `kept_by` is the snapshot that a revert went back to when it kept it."""
    holds = orphan.problem or ("holds nothing" if orphan.empty else f"holds {format_size(orphan.allocated)}")
    if kept_by is None:
        what = f"stands on {orphan.parent}, is named by no domain and no snapshot, and {holds}"
        return Check(f"orphan {orphan.path}", "bad", what)
    what = f"was kept by the revert to {kept_by!r}, stands on {orphan.parent} and {holds}"
    ways = f"`doctor {domain} --discard {orphan.path}` removes it, `doctor {domain} --adopt` makes it a snapshot"
    return Check(f"kept {orphan.path}", "bad" if orphan.problem else "note", f"{what}: {ways}")


def _check_libvirt(uri: str | None) -> Iterator[Check]:
    try:
        library = import_libvirt()
    except VmdkSnapError as error:
        yield Check("libvirt", "bad", str(error))
        return
    yield _check_version("libvirt library", library.getVersion(), OLDEST_LIBVIRT)
    try:
        import libvirt_qemu  # noqa: F401
    except ImportError:
        yield Check("libvirt_qemu", "bad", "its Python binding is missing: no snapshots of running domains")
    try:
        conn = open_connection(uri)
    except VmdkSnapError as error:
        yield Check("connection", "bad", str(error))
        return
    with libvirt_errors("-", "ask for versions"):
        yield Check("connection", "good", conn.getURI())
        yield _check_version("libvirt daemon", conn.getLibVersion(), OLDEST_LIBVIRT)
        yield _check_version("QEMU", conn.getVersion(), OLDEST_QEMU)
    store = IntentStore.of(conn)
    yield from _check_state(store)


def _check_version(subject: str, number: int, oldest: tuple[int, int, int]) -> Check:
    version = (number // 1_000_000, number // 1000 % 1000, number % 1000)
    text = ".".join(map(str, version))
    if version < oldest:
        return Check(subject, "note", f"{text} is older than {'.'.join(map(str, oldest))}, the oldest that was tried")
    return Check(subject, "good", text)


def _check_state(store: IntentStore) -> Iterator[Check]:
    folder = next((place for place in (store.folder, *store.folder.parents) if place.exists()), Path("/"))
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Check("state", "bad", f"{store.folder} cannot be written by this user: run it as root")
    elif folder == store.folder and folder.stat().st_uid not in (0, os.geteuid()):
        yield Check("state", "bad", f"{store.folder} belongs to another user, who could plant records there")
    else:
        yield Check("state", "good", str(store.folder))
    for uuid in store.uuids():
        if not store.busy(uuid):
            yield Check(
                "state", "bad", f"{store.path(uuid)}: an unfinished snapshot: `snapshot list {uuid}` settles it"
            )


def _check_tools() -> Iterator[Check]:
    for tool, (verdict, purpose) in _TOOLS.items():
        path = shutil.which(tool)
        if path is None:
            yield Check(tool, "bad" if verdict == "bad" else "note", f"is not installed; needed for {purpose}")
            continue
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
        yield Check(tool, "good", (said.strip().splitlines() or [path])[0])


def _check_hooks(environ: dict[str, str] | os._Environ[str]) -> Iterator[Check]:
    state = hooks.status()
    if not state.installed:
        yield Check("hook", "note", f"{state.path} {state.problem}")
    elif state.problem:
        yield Check("hook", "bad", f"{state.path} {state.problem}")
    else:
        stale = "" if state.current else ", not what this version would write: install it again"
        yield Check("hook", "good" if state.current else "note", f"{state.path} of version {state.version}{stale}")
    for policy in state.policies:
        yield Check(f"policy {policy.domain}", "bad" if policy.problem else "good", policy.problem or str(policy.path))
    for daemon in state.restart:
        yield Check("hook", "note", f"{daemon} is older than the hook: restart it, if it was the first in its folder")
    try:
        paths = dropin.executables(environ)
    except VmdkSnapError as error:
        yield Check("drop-ins", "bad", str(error))
    else:
        yield Check("drop-ins", "good", ", ".join(path.name for path in paths) or f"none in {dropin.folder(environ)}")


def _check_intent(conn: libvirt.virConnect, domain: libvirt.virDomain) -> Iterator[Check]:
    store = IntentStore.of(conn)
    uuid = domain.UUIDString()
    if not store.path(uuid).exists():
        return
    if store.busy(uuid):
        yield Check("snapshots", "note", "another command is changing them now")
    else:
        yield Check("snapshots", "bad", f"one was not finished: `snapshot list {domain.name()}` settles it")


def _check_disk(disk: xml.Disk, chains: dict[str, list[Path]], limit: int) -> Check:
    """Check one disk of the persistent XML; its chain goes to `chains`. `limit` is how many links libvirt starts."""
    subject = f"disk {disk.target}"
    assert disk.path is not None
    folders = sorted({path.parent for path in disk.backing})
    links, problem = _links(disk.path, folders)
    if links is None:
        return Check(subject, "bad", problem)
    chains[disk.target] = [link.path.resolve() for link in links]
    if len(links) > limit:
        reason = (
            f"has {len(links)} links: this libvirt starts no domain with more than {limit}: delete or prune snapshots"
        )
        return Check(subject, "bad", reason)
    if (disk.closed or disk.backing) and _resolved(disk.backing) != chains[disk.target][1 : len(disk.backing) + 1]:
        named = ", ".join(map(str, disk.backing))
        return Check(subject, "bad", f"its XML spells out {named or 'no parent'}, its files another chain")
    if disk.closed and len(disk.backing) != len(links) - 1:
        return Check(
            subject, "bad", f"its XML ends after {len(disk.backing)} parents, its files after {len(links) - 1}"
        )
    if not disk.closed and len(links) > MAX_PROBED_DEPTH:
        reason = (
            f"has {len(links)} links that the XML does not spell out: libvirt refuses to start it: `snapshot adopt`"
        )
        return Check(subject, "bad", reason)
    denied = [link.path for link in links if not os.access(link.path, os.R_OK)]
    if denied:
        return Check(subject, "bad", f"{denied[0]} may not be read by this user")
    owners = {(link.path.stat().st_uid, link.path.stat().st_gid) for link in links}
    if len(owners) > 1:
        return Check(subject, "note", f"chain of {len(links)}, sound, but its files belong to {len(owners)} owners")
    return Check(subject, "good", f"{disk.path}: chain of {len(links)}, sound; XML and files agree")


def _check_snapshot(snapshot: xml.SnapshotXml, chains: dict[str, list[Path]]) -> Check:
    """Check one snapshot; `chains` are the active ones where it is the current snapshot."""
    subject = f"snapshot {snapshot.name}"
    external = [disk for disk in snapshot.disks if disk.mode == "external" and disk.frozen is not None]
    for disk in external:
        assert disk.frozen is not None
        frozen = disk.frozen
        folders = sorted({path.parent for path in (*disk.backing, frozen)})
        links, problem = _links(frozen, folders)
        if links is None:
            return Check(subject, "bad", f"disk {disk.target}: {problem}")
        if disk.overlay is not None and not disk.overlay.exists():
            return Check(
                subject, "note", f"disk {disk.target}: its overlay {disk.overlay} is gone; the frozen file is there"
            )
        chain = chains.get(disk.target)
        if chain is not None and frozen.resolve() not in chain:
            return Check(subject, "bad", f"is the current one, but disk {disk.target} does not stand on its {frozen}")
    return Check(subject, "good", f"{len(external)} disks" if len(external) != 1 else "1 disk")


def _links(path: Path, folders: Sequence[Path]) -> tuple[tuple[engine.LinkFacts, ...] | None, str]:
    """Return the links of the chain, or None and why it does not hold together."""
    try:
        return engine.read_links(path, trusted_dirs=folders), ""
    except VmdkSnapError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename or path}: {error.strerror}"


def _resolved(paths: tuple[Path, ...]) -> list[Path]:
    return [path.resolve() for path in paths]
