"""Move all files of a domain to another folder: every link of every snapshot, or nothing happens.

The steps, each durable before the next:

    1  the intent record, which names each file, where it goes, and what backs what
    2  each file gets its new name beside the old one: a second name of the same file, or a copy on another file system
    3  the persistent XML, which names the new files; then the XML of the snapshots
    4  the old names go
    5  the hints of the images lead to the parents in their new places; then the record goes

The images are locked from before 1 until after 4. Killed before 3 the new names are removed again; after it the rest is
done. Every name that is unlinked is known by its inode, and only where the other one is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import OnProgress, ignore, log
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.dry_run import planning
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore
from qemu_vmdk_snap.domain.journal.recover import Recovery, recover_domain
from qemu_vmdk_snap.domain.journal.staged import drop_staged, is_ours, make_staged, publish_staged, sync_folder
from qemu_vmdk_snap.domain.move.plan import MovedFile, Plan, make_plan, relinking
from qemu_vmdk_snap.domain.needs.alone import all_locked
from qemu_vmdk_snap.domain.overlay.newfile import refresh_pools
from qemu_vmdk_snap.domain.registration import register_text
from qemu_vmdk_snap.domain.state import define, inactive_xml
from qemu_vmdk_snap.domain.xml import files_in
from qemu_vmdk_snap.domain.xml.edits import keeping_description
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)
_NO_LINK: Final = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class MoveReport:
    """What a move did."""

    domain: str
    folder: Path
    files: tuple[MovedFile, ...]
    kept: tuple[tuple[Path, str], ...]
    """Images of its chains that stay where they are, and why."""
    recovered: Recovery | None
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    """Whether this is only what would be done."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed."""
        return bool(self.files) and not self.dry_run

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `snapshot move --output=json` shows it."""
        return {
            "domain": self.domain,
            "folder": str(self.folder),
            "files": [file.as_dict() for file in self.files],
            "kept": [{"filename": str(path), "reason": reason} for path, reason in self.kept],
            "notes": list(self.notes),
        } | ({"dry-run": True} if self.dry_run else {})


def move(
    conn: libvirt.virConnect,
    domain_name: str,
    folder: Path,
    *,
    orphans: Sequence[Path] = (),
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> MoveReport:
    """Move every VMDK file that is the alone of a domain that is shut off, and correct the XML of it and its snapshots.

    What is only below its disks (the base of a clone, a template) stays. `orphans` are files that need what goes where
    it is and are given up. When it fails nothing has changed, unless the error says that the rest is left to `recover`.

    Raises:
        InvalidRequest: it is not a folder.
        DomainError: the domain runs, something bears a name already, there is no space, or libvirt refuses.
        StillNeeded: something else needs a file where it is, or may; it names what.
        VmdkSnapError, OSError: a chain is broken or in use, or a file cannot be made.
    """
    if dry_run:
        with planning(conn, domain_name) as (domain, _):
            plan = make_plan(conn, domain, folder, orphans)
            with all_locked(plan.alone):
                return MoveReport(domain.name(), folder, plan.files, plan.kept, None, dry_run=True)
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()):
        recovered = recover_domain(conn, domain, store)
        plan = make_plan(conn, domain, folder, orphans)
        if plan.files:
            _execute(conn, domain, store, plan, on_progress)
    refresh_pools(conn, [path for one in plan.files for path in (one.source, one.path)])
    return MoveReport(domain.name(), folder, plan.files, plan.kept, recovered)


def settle(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> Recovery | None:
    """Finish the move where the XML names a new file already; else take the new names away.

    Raises:
        VmdkSnapError, OSError: a step cannot be done now; the record must stay.
    """
    if _names_new(domain, intent):
        _finish(conn, domain, intent)
        _correct_hints(intent)
        return None
    return Recovery(domain.name(), "", finished=False, left=tuple(_take_back(intent)), operation="move")


def _execute(
    conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, plan: Plan, on_progress: OnProgress
) -> None:
    intent = plan.intent
    with all_locked(plan.alone):
        try:
            store.write(intent)  # barrier: no name is made that nobody would know of after a crash
            for one in _files(intent):
                intent = _give_name(store, intent, one, on_progress)
            for folder in {Path(one["path"]).parent for one in _files(intent)}:
                sync_folder(folder)  # barrier: the XML names only what is durable
            _define(conn, domain, intent)
        except BaseException as error:
            _settle_now(conn, domain, store, intent, error)
            raise
        try:
            _finish(conn, domain, intent)
        except (VmdkSnapError, OSError) as error:
            raise DomainError(domain.name(), f"{error}; the move is not finished: `recover` resumes it") from error
    try:
        _correct_hints(intent)
    except (VmdkSnapError, OSError) as error:
        raise DomainError(domain.name(), f"{error}; the move is not finished: `recover` resumes it") from error
    with contextlib.suppress(OSError):
        store.remove(intent.uuid)


def _settle_now(
    conn: libvirt.virConnect, domain: libvirt.virDomain, store: IntentStore, intent: Intent, cause: BaseException
) -> None:
    """Take back what `cause` has stopped, unless libvirt has changed the XML all the same."""
    try:
        if not _names_new(domain, intent):
            _take_back(intent)
            store.remove(intent.uuid)
    except (VmdkSnapError, OSError) as error:
        raise DomainError(domain.name(), f"{cause}; undoing it failed too ({error}): `recover` does it") from cause


def _give_name(store: IntentStore, intent: Intent, one: Mapping[str, Any], on_progress: OnProgress) -> Intent:
    """Let the file bear its new name too, or a copy of it; return the record that knows it."""
    source, path = Path(one["source"]), Path(one["path"])
    try:
        path.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    else:
        _log.info("%s: is called %s too", source, path)
        return intent
    made = make_staged(Path(one["staged"]), partial(engine.copy_file, source, on_progress=on_progress))
    known = [each | {"identity": list(made)} if each is one else each for each in intent.work]
    intent = replace(intent, work=tuple(known))
    store.write(intent)
    publish_staged(Path(one["staged"]), path)
    _log.info("%s: copied to %s", source, path)
    return intent


def _define(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    with libvirt_errors(domain.name(), "define it with its files in the other folder"):
        if domain.isActive():
            raise DomainError(domain.name(), "was started meanwhile: nothing was changed")
        if inactive_xml(domain) != intent.old_xml:
            raise DomainError(domain.name(), "was edited meanwhile: try again")
        define(conn, intent.new_xml)


def _finish(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Do what is left of the steps 3 and 4; what was edited meanwhile stays."""
    with libvirt_errors(domain.name(), "correct its XML and that of its snapshots"):
        now = inactive_xml(domain)
        changed = relinking(_files(intent))(now)
        if changed != now:
            define(conn, changed)
        there = {snapshot.getName(): snapshot for snapshot in domain.listAllSnapshots()}
        current = domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None
        for name, text in intent.snapshots:
            if name in there:
                edited = keeping_description(text, there[name].getXMLDesc(0))
                register_text(domain, edited, current=name == current)
    for one in _files(intent):
        source, path = Path(one["source"]), Path(one["path"])
        drop_staged(Path(one["staged"]))
        if os.path.lexists(source) and source.lstat().st_ino == one["inode"]:
            if not _is_moved(source, path, one):
                raise DomainError(domain.name(), f"{path} is not what {source} was moved to: nothing is deleted")
            source.unlink()


def _correct_hints(intent: Intent) -> None:
    """Let each image name its parent where that is now."""
    pairs = [(Path(one["image"]), Path(one["parent"])) for one in intent.work if "image" in one]
    folders = sorted({path.parent for pair in pairs for path in pair})
    for image, parent in pairs:
        with contextlib.suppress(VmdkSnapError, OSError):
            links = engine.read_links(image, trusted_dirs=folders)
            if len(links) > 1 and os.path.normpath(links[1].path) == os.path.normpath(parent):
                continue
        engine.rebase(image, parent, unsafe=True, trusted_dirs=folders)


def _take_back(intent: Intent) -> list[Path]:
    """Remove the new names; return those that are not known to be ours."""
    left: list[Path] = []
    for one in _files(intent):
        source, path = Path(one["source"]), Path(one["path"])
        drop_staged(Path(one["staged"]))
        if not os.path.lexists(path):
            continue
        # What stays must be the file that went: never the last name of anything.
        if source.exists() and source.stat().st_ino == one["inode"] and _is_moved(source, path, one):
            path.unlink()
        else:
            left.append(path)
    return left


def _is_moved(source: Path, path: Path, one: Mapping[str, Any]) -> bool:
    """Return whether `path` is the other name of the file `source`, or the copy that was made of it."""
    if not path.exists() or path.is_symlink():
        return False
    return path.samefile(source) or is_ours(path, one)


def _names_new(domain: libvirt.virDomain, intent: Intent) -> bool:
    with libvirt_errors(domain.name(), "read its XML"):
        files = files_in(inactive_xml(domain))
    return any(Path(one["path"]) in files for one in _files(intent))


def _files(intent: Intent) -> list[dict[str, Any]]:
    return [one for one in intent.work if "path" in one]
