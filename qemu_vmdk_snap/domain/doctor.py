"""Is the host fit for it, and do a domain's chains, XML and registry agree? Everything here only looks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import dropin, xml
from qemu_vmdk_snap.domain.connect import find_domain, import_libvirt, libvirt_errors, open_connection
from qemu_vmdk_snap.domain.hooks import install as hooks
from qemu_vmdk_snap.domain.hooks.owners import without_domain
from qemu_vmdk_snap.domain.journal.pending import all_unfinished, unfinished_of
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.needs.needed import NOTHING, Needed, place_in, same_file
from qemu_vmdk_snap.domain.needs.orphans import Orphan, find_orphans
from qemu_vmdk_snap.domain.qemu.depth import max_links
from qemu_vmdk_snap.domain.state import inactive_xml, volume_resolver
from qemu_vmdk_snap.domain.xml.kept import kept_branches
from qemu_vmdk_snap.errors import CidMismatch, InvalidRequest, StillNeeded, VmdkSnapError
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    import libvirt

Verdict = Literal["good", "note", "bad"]
OLDEST_LIBVIRT: Final = (9, 0, 0)
OLDEST_QEMU: Final = (7, 2, 0)
MAX_PROBED_DEPTH: Final = 2
"""libvirt finds out the format of so many links by itself; deeper ones must be spelt out in the XML."""

_LOOKED_AT: Final = ("is read-only", "is shared", "is transient")
"""Disks that take no part in a snapshot for these reasons are checked nevertheless."""

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


def check_host(uri: str | None = None, environ: Mapping[str, str] | None = None) -> Iterator[Check]:
    """Yield what there is to say about this machine's libvirt, QEMU, tools, hooks and folders."""
    yield from _check_libvirt(uri)
    yield from _check_tools()
    yield from _check_hooks(os.environ if environ is None else environ)


def check_domain(conn: libvirt.virConnect, domain_name: str) -> Iterator[Check]:
    """Yield what there is to say about the domain: its disks, its snapshots, what was left unfinished, orphans.

    Raises:
        DomainError: there is no such domain, or libvirt reports an error.
    """
    domain = find_domain(conn, domain_name)
    name = domain.name()
    yield from _check_intent(conn, domain)
    with libvirt_errors(name, "read its XML and snapshots"):
        text = inactive_xml(domain)
        snapshots = [xml.parse_snapshot(s.getXMLDesc(0)) for s in domain.listAllSnapshots()]
        current = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
        limit = max_links(conn.getLibVersion())
    chains: dict[str, list[Path]] = {}
    for disk in xml.list_disks(text, volume_resolver(conn, name)):
        yield _check_disk(disk, chains, limit)
    try:
        needed = Needed.read(conn, domain)
    except StillNeeded as error:
        yield Check("files", "bad", str(error))
        return
    for snapshot in snapshots:
        yield _check_snapshot(snapshot, chains if snapshot.name == current else {}, needed)
    if snapshots and current is None:
        yield Check("snapshots", "note", "none of them is the current one")
    yield from _check_tops(name, text, snapshots, needed, volume_resolver(conn, name))
    orphans = find_orphans(conn, domain, needed)
    yield from _check_needs(domain.UUIDString(), orphans, needed)
    kept = {path.resolve(): snapshot for path, snapshot in kept_branches(text).items() if path.exists()}
    for orphan in orphans:
        yield _check_orphan(name, orphan, kept.get(orphan.path.resolve()))
    known = [*needed.files_of(needed.of_domain(domain.UUIDString())), *(orphan.path for orphan in orphans)]
    for path, kept_by in kept.items():
        if place_in(known, path) is None:  # deleting what backed it has made it a disk by itself
            what = f"was kept by the revert to {kept_by!r} and is backed by no file of the domain any more"
            yield Check(f"kept {path}", "note", f"{what}: delete the file, or use it as a disk of its own")


def _check_tops(
    domain: str, text: str, snapshots: Sequence[xml.SnapshotXml], needed: Needed, volume_path: xml.VolumePath
) -> Iterator[Check]:
    """Yield the disks whose top something else reads: it changes with each write of the guest."""
    for disk in xml.list_disks(text, volume_path):
        if disk.path is None or disk.refusal is not None:
            continue
        frozen_by = [
            snapshot.name
            for snapshot in snapshots
            for one in snapshot.disks
            if one.mode == "external" and one.frozen is not None and same_file(one.frozen, disk.path)
        ]
        subject = f"disk {disk.target}"
        if frozen_by:
            what = (
                f"its top {disk.path} is what snapshot {frozen_by[0]!r} froze, and what the guest writes changes that"
            )
            yield Check(subject, "bad", f"{what}: `snapshot revert {domain} {frozen_by[0]}` puts an overlay on it")
            continue
        for one in needed.census.dependents([disk.path]):
            if one.how == "parent":
                what = f"its top {disk.path} backs {one.path}, and what the guest writes changes what that reads"
                yield Check(subject, "bad", f"{what}: `snapshot create {domain}` puts a new top on it")


def _check_needs(uuid: str, orphans: Sequence[Orphan], needed: Needed) -> Iterator[Check]:
    """Yield who else needs the domain's files, or may: as long as that is so, no command merges or deletes them."""
    files = needed.files_of(needed.of_domain(uuid))
    others = needed.of_others(uuid)
    handled = [*files, *needed.files_of(others), *(orphan.path for orphan in orphans)]
    said: set[str] = set()
    for file in files:
        for who, reason in [
            *needed.holding([file], others, NOTHING),
            *needed.around([file], handled, NOTHING),
        ]:
            line = f"{who} {reason}"
            if line not in said:
                said.add(line)
                yield Check(f"file {file}", "note", f"is needed: {line} (`--orphan FILE` gives a file up)")


def _check_orphan(domain: str, orphan: Orphan, kept_by: str | None) -> Check:
    """Tell of an image that nobody names; `kept_by` is the snapshot that a revert went back to when it kept it."""
    holds = orphan.problem or ("holds nothing" if orphan.empty else f"holds {format_size(orphan.allocated)}")
    if kept_by is None:
        what = f"is backed by {orphan.parent}, is named by no domain and no snapshot, and {holds}"
        return Check(f"orphan {orphan.path}", "bad", what)
    what = f"was kept by the revert to {kept_by!r}, is backed by {orphan.parent} and {holds}"
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
    yield from _check_state(conn, store)


def _check_version(subject: str, number: int, oldest: tuple[int, int, int]) -> Check:
    version = (number // 1_000_000, number // 1000 % 1000, number % 1000)
    text = ".".join(map(str, version))
    if version < oldest:
        return Check(subject, "note", f"{text} is older than {'.'.join(map(str, oldest))}, the oldest that was tried")
    return Check(subject, "good", text)


def _check_state(conn: libvirt.virConnect, store: IntentStore) -> Iterator[Check]:
    folder = next((place for place in (store.folder, *store.folder.parents) if place.exists()), Path("/"))
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Check("state", "bad", f"{store.folder} cannot be written by this user: run it as root")
        return
    try:
        if folder == store.folder:
            store.check_folder()
        yield Check("state", "good", str(store.folder))
        pending = all_unfinished(conn)
    except InvalidRequest as error:
        yield Check("state", "bad", str(error))
        return
    for one in pending:
        if not one.running:
            yield Check("state", "bad", f"{one.record}: domain {one.domain}: {one.line()}")


def _check_tools() -> Iterator[Check]:
    for tool, (verdict, purpose) in _TOOLS.items():
        path = shutil.which(tool)
        if path is None:
            yield Check(tool, "bad" if verdict == "bad" else "note", f"is not installed; needed for {purpose}")
            continue
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
        yield Check(tool, "good", (said.strip().splitlines() or [path])[0])


def _check_hooks(environ: Mapping[str, str]) -> Iterator[Check]:
    state = hooks.status()
    if not state.installed:
        yield Check("hook", "note", f"{state.path} {state.problem}")
    elif state.problem:
        yield Check("hook", "bad", f"{state.path} {state.problem}")
    else:
        stale = "" if state.current else ", not what this version would write: install it again"
        yield Check("hook", "good" if state.current else "note", f"{state.path} of version {state.version}{stale}")
    lost = {one.path: one for one in without_domain(state.policies)}
    for policy in (lost.get(one.path, one) for one in state.policies):
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
    try:
        one = unfinished_of(conn, domain)
    except InvalidRequest as error:
        yield Check("state", "bad", str(error))
        return
    if one is not None:
        yield Check("snapshots", "note" if one.running else "bad", one.line())


def _check_disk(disk: xml.Disk, chains: dict[str, list[Path]], limit: int) -> Check:
    """Check one disk of the persistent XML; its chain goes to `chains`. `limit` is how many links libvirt starts."""
    subject = f"disk {disk.target}"
    if disk.path is None or (disk.refusal is not None and not disk.refusal.startswith(_LOOKED_AT)):
        return Check(subject, "note", _skipped(disk))
    found = _check_chain(disk, disk.path, chains, limit)
    if disk.refusal is not None and found.verdict != "bad":
        return Check(subject, "note", f"{found.text}; it takes no part in snapshots: it {disk.refusal}")
    return found


def _skipped(disk: xml.Disk) -> str:
    """Return why the disk takes no part in snapshots, and what is below it that must not be changed."""
    text = f"takes no part in snapshots: it {disk.refusal or 'has no file'}"
    if disk.path is None or not (disk.refusal or "").endswith("not vmdk"):
        return text
    for path in engine.follow(disk.path).files[1:]:
        with contextlib.suppress(VmdkSnapError, OSError):
            engine.read_facts(path)
            ways = f"`qemu-img convert -O vmdk {disk.path} NEW.vmdk` makes a VMDK disk of it"
            return f"{text}, though its top {disk.path} is backed by the VMDK {path}, which must stay as it is: {ways}"
    return text


def _check_chain(disk: xml.Disk, top: Path, chains: dict[str, list[Path]], limit: int) -> Check:
    subject = f"disk {disk.target}"
    folders = sorted({path.parent for path in disk.backing})
    links, problem = _links(top, folders)
    if links is None:
        return Check(subject, "bad", problem)
    chains[disk.target] = [link.path for link in links]
    if len(links) > limit:
        reason = (
            f"has {len(links)} links: this libvirt starts no domain with more than {limit}: delete or prune snapshots"
        )
        return Check(subject, "bad", reason)
    below = [link.path for link in links[1 : len(disk.backing) + 1]]
    same = len(below) == len(disk.backing) and all(map(same_file, disk.backing, below))
    if (disk.closed or disk.backing) and not same:
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
    return Check(subject, "good", f"{top}: chain of {len(links)}, sound; XML and files agree")


def _check_snapshot(snapshot: xml.SnapshotXml, chains: dict[str, list[Path]], needed: Needed) -> Check:
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
        overlays = needed.census.dependents(links[0].files)
        try:
            engine.require_fit(frozen, links[0].cid, overlays)
        except CidMismatch as error:
            return Check(subject, "bad", f"disk {disk.target}: {error}")
        if disk.overlay is not None and not disk.overlay.exists():
            return Check(
                subject, "note", f"disk {disk.target}: its overlay {disk.overlay} is gone; the frozen file is there"
            )
        if disk.overlay is not None and place_in([one.path for one in overlays], disk.overlay) is None:
            what = f"its overlay {disk.overlay} does not name {frozen} as its parent (any more)"
            return Check(
                subject, "note", f"disk {disk.target}: {what}: `image info {disk.overlay}` shows what it names"
            )
        chain = chains.get(disk.target)
        if chain is not None and place_in(chain, frozen) is None:
            return Check(subject, "bad", f"is the current one, but disk {disk.target} is not backed by its {frozen}")
    return Check(subject, "good", f"{len(external)} disks" if len(external) != 1 else "1 disk")


def _links(path: Path, folders: Sequence[Path]) -> tuple[tuple[engine.LinkFacts, ...] | None, str]:
    """Return the links of the chain, or None and why it does not hold together."""
    try:
        return engine.read_links(path, trusted_dirs=folders), ""
    except VmdkSnapError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename or path}: {error.strerror}"
