"""Undefine a domain with every file that is its alone.

The steps, each durable before the next:

    1  the intent record, which names each file by its inode, and holds the XML of every snapshot
    2  the domain is undefined, with its snapshots
    3  the files are unlinked, overlays before what backs them; then the record goes

What others need is found out before 1, and asked again before each unlink where a killed command is finished. Killed
before 2 the domain is as it was; after it only files are left, and `recover` unlinks them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qemu_vmdk_snap import log
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.dry_run import planning
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore
from qemu_vmdk_snap.domain.journal.recover import Recovery, recover_domain
from qemu_vmdk_snap.domain.needs.alone import Alone, all_locked, images_alone, require_alone
from qemu_vmdk_snap.domain.needs.needed import Given, Needed, real_file
from qemu_vmdk_snap.domain.overlay.newfile import refresh_pools
from qemu_vmdk_snap.domain.registration import register_text
from qemu_vmdk_snap.domain.served.memory import memory_files
from qemu_vmdk_snap.domain.state import inactive_xml, volume_resolver
from qemu_vmdk_snap.domain.xml.nvram import frozen_nvram
from qemu_vmdk_snap.errors import DomainError, StillNeeded, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)


@dataclass(frozen=True, slots=True)
class DestroyReport:
    """What a destroy did."""

    domain: str
    uuid: str
    deleted: tuple[tuple[Path, int], ...]
    """Each file, and the bytes that it took up on its file system."""
    kept: tuple[tuple[Path, str], ...]
    """Files that stay, and why."""
    snapshots: tuple[str, ...]
    recovered: Recovery | None
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    """Whether this is only what would be done."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `snapshot destroy --output=json` shows it."""
        return {
            "domain": self.domain,
            "uuid": self.uuid,
            "deleted": [{"filename": str(path), "size": size} for path, size in self.deleted],
            "kept": [{"filename": str(path), "reason": reason} for path, reason in self.kept],
            "snapshots": list(self.snapshots),
            "notes": list(self.notes),
        } | ({"dry-run": True} if self.dry_run else {})


class _Plan(NamedTuple):
    alone: Alone
    intent: Intent


class _Gone(NamedTuple):
    """A domain that libvirt has forgotten, for those who ask on its behalf."""

    intent: Intent

    def name(self) -> str:
        return self.intent.domain

    def UUIDString(self) -> str:
        return self.intent.uuid


def destroy(
    conn: libvirt.virConnect, domain_name: str, *, orphans: Sequence[Path] = (), dry_run: bool = False
) -> DestroyReport:
    """Undefine a domain that is shut off, with its snapshots, and delete every file that belongs only to it.

    Its alone are the images that it or one of its snapshots has or had on top of a disk. What is only below them (the
    base of a clone, a template) stays, as does what is read-only, shared or a CD. `orphans` are files that need what
    goes and are given up.

    Raises:
        DomainError: the domain runs, or libvirt refuses.
        StillNeeded: something else needs one of the files, or may; it names what. Nothing was changed.
        LockBusy: somebody has an image open.
        VmdkSnapError, OSError: an image cannot be looked at; or a file cannot be deleted: `recover` goes on.
    """
    if dry_run:
        with planning(conn, domain_name) as (domain, _):
            plan = _plan(conn, domain, orphans)
            with all_locked(plan.alone):
                return _report(plan, _sizes(plan.intent), None, (), dry_run=True)
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()):
        recovered = recover_domain(conn, domain, store)
        plan = _plan(conn, domain, orphans)
        sizes = _sizes(plan.intent)
        with all_locked(plan.alone):
            _execute(conn, domain, store, plan.intent)
    refresh_pools(conn, [path for path, _ in sizes])
    return _report(plan, sizes, recovered, ())


def settle(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> Recovery:
    """Leave the domain, which is still defined, as it was: whatever snapshot libvirt has forgotten is registered again.

    Raises:
        DomainError: libvirt refuses.
    """
    with libvirt_errors(domain.name(), "register its snapshots again"):
        there = {snapshot.getName() for snapshot in domain.listAllSnapshots()}
        missing = {name: text for name, text in intent.snapshots if name not in there}
        for name, text in missing.items():
            register_text(domain, text, current=name == intent.current)
    return Recovery(domain.name(), "", finished=False, operation="destroy")


def finish(conn: libvirt.virConnect, intent: Intent) -> Recovery:
    """Unlink what is left of a domain that libvirt has forgotten; what somebody has come to need stays.

    Raises:
        DomainError: libvirt cannot list what is named.
        OSError: a file cannot be deleted.
    """
    left: list[Path] = []
    for path, inode in zip(map(Path, intent.discard), intent.discard_inodes, strict=True):
        if not path.exists() or path.stat().st_ino != inode:
            continue  # gone already, or another file by now
        rest = [Path(one) for one in intent.discard]
        try:
            needed = Needed.read(conn, _Gone(intent), folders={path.parent, real_file(path).parent})
            needed.require_unneeded(path, [path], needed.of_others(intent.uuid), handled=rest)
        except StillNeeded:
            left.append(path)
        else:
            _unlink(path)
    return Recovery(intent.domain, "", finished=True, left=tuple(left), operation="destroy")


def _plan(conn: libvirt.virConnect, domain: libvirt.virDomain, orphans: Sequence[Path]) -> _Plan:
    import libvirt

    name, uuid = domain.name(), domain.UUIDString()
    with libvirt_errors(name, "read its snapshots"):
        if domain.isActive():
            raise DomainError(name, "runs: shut it off first (virsh shutdown, or virsh destroy)")
        text = inactive_xml(domain)
        secure = libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
        snapshots = _parents_first({one.getName(): one.getXMLDesc(secure) for one in domain.listAllSnapshots()})
        current = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
    alone = images_alone(text, snapshots, volume_resolver(conn, name))
    needed = Needed.read(conn, domain)
    require_alone(needed, uuid, alone, Given(tuple(orphans)))
    for file in alone.files:
        if not os.access(real_file(file).parent, os.W_OK | os.X_OK):
            raise DomainError(name, f"{real_file(file).parent} may not be written, so {file} cannot be deleted")
    files = [real_file(file) for file in alone.files]  # a symbolic link to it belongs to the user, and stays
    files += [real_file(file) for file in memory_files(name, uuid, snapshots.values())]
    copies = [frozen_nvram(one) for one in snapshots.values()]
    files += [copy for copy in copies if copy is not None and copy.is_file()]
    intent = Intent(
        uuid=uuid,
        domain=name,
        snapshot="",
        overlays=(),
        old_xml=text,
        new_xml="",
        snapshot_xml="",
        operation="destroy",
        current=current,
        discard=tuple(map(str, files)),
        discard_inodes=tuple(file.stat().st_ino for file in files),
        snapshots=tuple(snapshots.items()),
    )
    return _Plan(alone, intent)


def _execute(conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent) -> None:
    store.write(intent)  # barrier: from here on `recover` knows what is left of the domain
    try:
        _undefine(domain, intent.domain)
    except BaseException:
        with contextlib.suppress(VmdkSnapError, OSError):
            settle(conn, domain, intent)
            store.remove(intent.uuid)
        raise
    _log.info("domain %s: undefined", intent.domain)
    for path, inode in zip(map(Path, intent.discard), intent.discard_inodes, strict=True):
        if path.stat().st_ino == inode:
            _unlink(path)
    store.remove(intent.uuid)


def _undefine(domain: libvirt.virDomain, name: str) -> None:
    with libvirt_errors(name, "undefine it"):
        if domain.isActive():
            raise DomainError(name, "was started meanwhile: nothing was changed")
        domain.undefineFlags(_undefine_flags())


def _undefine_flags() -> int:
    """Return everything that libvirt itself keeps of a domain, as far as this libvirt knows of it."""
    import libvirt

    names = ("MANAGED_SAVE", "SNAPSHOTS_METADATA", "CHECKPOINTS_METADATA", "NVRAM", "TPM")
    return sum(getattr(libvirt, f"VIR_DOMAIN_UNDEFINE_{name}", 0) for name in names)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
    _log.info("%s: deleted", path)


def _sizes(intent: Intent) -> tuple[tuple[Path, int], ...]:
    return tuple((path, path.stat().st_blocks * 512) for path in map(Path, intent.discard))


def _report(
    plan: _Plan,
    sizes: tuple[tuple[Path, int], ...],
    recovered: Recovery | None,
    notes: tuple[str, ...],
    *,
    dry_run: bool = False,
) -> DestroyReport:
    below = tuple((path, "is only below its disks: it was never written by the domain") for path in plan.alone.below)
    names = tuple(name for name, _ in plan.intent.snapshots)
    return DestroyReport(plan.intent.domain, plan.intent.uuid, sizes, below, names, recovered, notes, dry_run)


def _parents_first(snapshots: dict[str, str]) -> dict[str, str]:
    """Return the snapshots in an order in which libvirt takes them back."""
    parents = {name: xml.parse_snapshot(text).parent for name, text in snapshots.items()}
    done: dict[str, str] = {}
    while len(done) < len(snapshots):
        ready = [name for name in snapshots if name not in done and (parents[name] in done or parents[name] is None)]
        for name in ready or [name for name in snapshots if name not in done]:
            done[name] = snapshots[name]
    return done
