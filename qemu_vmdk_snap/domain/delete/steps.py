"""Doing a delete beneath a running guest: the new images, their exchange in QEMU, and their names.

The order, with an intent record durable before the first step. What is done is seen on the files, in the XML and in
QEMU, so that each step can be done again, also after the end of QEMU, of libvirtd or of this process:

    1  the new images, complete, each compared with what it takes the place of; then the record that knows their inodes
    2  one exchange in QEMU for all disks; until here everything is undone by removing the images
    3  the persistent XML names the images as they are called now, and nothing that goes
    4  each image gets the name of the link whose place it takes, beside its own: the hint above leads to it
    5  the persistent XML names it by that name
    6  the snapshots are forgotten, those that stay are registered with the chains that they have now
    7  the replaced files are unlinked, if nothing needs them now, and the images' first names are
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import Census, OnProgress, log
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.delete.plan import folders_of, open_one
from qemu_vmdk_snap.domain.delete.work import Change, change_before, change_of, work_of
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore, Merge
from qemu_vmdk_snap.domain.needs.needed import real_file
from qemu_vmdk_snap.domain.overlay.newfile import follow_base
from qemu_vmdk_snap.domain.qemu.exchange import Exchange, ExchangeReport, close_unused, exchange
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.qemu.options import read_options
from qemu_vmdk_snap.domain.state import define, inactive_xml
from qemu_vmdk_snap.errors import DomainError, LockBusy, StillNeeded, VmdkSnapError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)


def make_images(domain: str, store: IntentStore, intent: Intent, on_progress: OnProgress) -> Intent:
    """Make the new images, durable, and return the record that knows them, durable as well.

    Raises:
        VmdkSnapError, OSError: one cannot be made; those before it are there.
    """
    folders = folders_of(intent)
    for one in intent.merges:
        _log.info("domain %s: disk %s: merging %s into %s", domain, one.target, ", ".join(one.links), one.image)
        engine.merge_links(
            one.links[0], one.links[-1], one.image, trusted_dirs=folders, mode=0o600, on_progress=on_progress
        )
        intent = intent.merged(one.image, follow_base(domain, Path(one.image), Path(one.links[0]), mode=0)[1])
    if intent.merges:
        store.write(intent)
    return intent


def exchange_images(domain: libvirt.virDomain, intent: Intent) -> ExchangeReport:
    """Switch the running guest to the images, on all of its disks or on none.

    Raises:
        VmdkSnapError, OSError: see `exchange`.
    """
    with libvirt_errors(domain.name(), "read its live XML"):
        options = read_options(domain.XMLDesc(0))
    wanted: list[Exchange] = []
    for one in intent.merges:
        below = None if one.below is None else Path(one.below)
        image = Path(one.image)
        if wanted and wanted[-1].target == one.target and str(wanted[-1].below) == one.links[0]:
            wanted[-1] = wanted[-1]._replace(images=(*wanted[-1].images, image), below=below)
        else:
            wanted.append(Exchange(one.target, Path(one.upper), (image,), below, options[one.target]))
    report = exchange(Monitor(domain), wanted, folders_of(intent))
    _log.info("domain %s: its chains are exchanged; it took %.1f ms", domain.name(), report.reopened)
    return report


def is_begun(domain: libvirt.virDomain, intent: Intent) -> bool:
    """Return whether anything reads the images already: QEMU, the XML, or an overlay by their new names.

    Raises:
        DomainError: QEMU cannot be asked.
    """
    images = [Path(one.image) for one in intent.merges]
    if any(map(_is_placed, intent.merges)) or xml.files_in(inactive_xml(domain)) & set(images):
        return True
    if not domain.isActive():
        return False
    graph = Monitor(domain).graph()
    return any(graph.node_of(image) in graph.used for image in images if image.exists())


def take_back(domain: libvirt.virDomain, intent: Intent) -> None:
    """Remove the images, which nothing reads: everything is as it was.

    Raises:
        DomainError: QEMU does not close one.
        OSError: one cannot be unlinked.
    """
    for one in intent.merges:
        image = Path(one.image)
        if not os.path.lexists(image) or not _is_ours(image, one, folders_of(intent)):
            continue
        if domain.isActive():
            Monitor(domain).drop_overlay(image)
        image.unlink()
    _log.info("domain %s: the new images are removed", domain.name())


def place_images(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Do steps 3 to 5, as far as they are not done.

    Raises:
        DomainError: an image is gone, or another file has its name; or libvirt refuses.
        OSError: a name cannot be given.
    """
    if domain.isActive():
        # By their files, so before another file bears the name; what the exchange has closed is not there any more.
        names = [Path(name) for one in intent.merges if not _is_placed(one) for name in one.links]
        close_unused(Monitor(domain), names)
    if not all(map(_is_placed, intent.merges)):
        _define(conn, domain, change_before(intent.merges))
        for one in intent.merges:
            _place(domain.name(), one)
    _define(conn, domain, change_of(work_of(intent), intent.merges))


def clear(intent: Intent) -> list[str]:
    """Do step 7; return what had to stay, and why."""
    notes: list[str] = []
    folders = folders_of(intent)
    for one in intent.merges:
        Path(one.image).unlink(missing_ok=True)
        for link in one.links:
            files = {Path(file): inode for home, file, inode in one.doomed if home == link}
            try:
                with contextlib.ExitStack() as held:
                    if link != one.links[0]:  # of that one no more than its old extents are left
                        _hold_unneeded(Path(link), files, folders, held)
                    for file, inode in files.items():
                        if _inode(file) == inode:
                            real_file(file).unlink(missing_ok=True)
            except (StillNeeded, LockBusy) as error:
                notes.append(f"{link} is kept: {error}")
    return notes


def _hold_unneeded(path: Path, files: Mapping[Path, int], folders: Sequence[Path], held: contextlib.ExitStack) -> None:
    """Lock a link that is about to be unlinked, if it is complete, and check that nothing needs it now."""
    if any(_inode(file) != inode for file, inode in files.items()):
        return  # unlinked in part by whoever was here before
    held.enter_context(open_one(path, folders, lock=True))
    left = Census.of(folders).dependents([*files])
    if left:
        raise StillNeeded(path, tuple((one.path, one.reason) for one in left))


def _place(domain: str, merge: Merge) -> None:
    if _is_placed(merge):
        return
    image = Path(merge.image)
    if _inode(image) != merge.inode:
        raise DomainError(
            domain, f"disk {merge.target}: {image} is gone, or is another file than the one that was made"
        )
    engine.link_over(image, real_file(Path(merge.links[0])))
    _log.info("domain %s: %s is now also %s", domain, image, merge.links[0])


def _is_placed(merge: Merge) -> bool:
    return merge.inode is not None and _inode(Path(merge.links[0])) == merge.inode


def _is_ours(image: Path, merge: Merge, folders: Sequence[Path]) -> bool:
    """Return whether it is the image of the record, also where its maker died before noting the inode."""
    if merge.inode is not None:
        return _inode(image) == merge.inode
    with contextlib.suppress(VmdkSnapError, OSError):
        cids = {engine.read_facts(one, trusted_dirs=folders).cid for one in (image, merge.links[0])}
        return len(cids) == 1
    return False


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _define(conn: libvirt.virConnect, domain: libvirt.virDomain, change: Change) -> None:
    """Change the files in the persistent XML; what was edited meanwhile stays."""
    now = inactive_xml(domain)
    changed = xml.relink(now, change)
    if changed != now:
        with libvirt_errors(domain.name(), "define it with its new chains"):
            define(conn, changed)
