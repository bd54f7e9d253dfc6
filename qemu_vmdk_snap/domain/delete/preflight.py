"""What can be known of a delete before its record is written: locks, links, permissions, pending records, space."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain.delete.live import LivePlan, shares_extents
from qemu_vmdk_snap.domain.delete.plan import folders_of, open_one
from qemu_vmdk_snap.domain.delete.work import Work, work_of
from qemu_vmdk_snap.domain.needs.needed import real_file
from qemu_vmdk_snap.domain.qemu.exchange import can_exchange
from qemu_vmdk_snap.domain.qemu.monitor import Monitor, refuse_busy
from qemu_vmdk_snap.errors import DomainError, NotWhileRunning

if TYPE_CHECKING:
    import libvirt


def check_work(domain: str, works: Sequence[Work], folders: Collection[Path]) -> None:
    """Accept work that nothing known stands in the way of; nothing is changed, and no lock is kept.

    Raises:
        LockBusy: an image that is written, moved or deleted is open: a guest, perhaps of another host.
        CidMismatch, CorruptChain, FormatError, Unsupported: a chain is broken, or an operation on it is unfinished.
        DomainError: there is no space, or a folder may not be written.
        OSError: a file may not be read or written.
    """
    for work in works:
        if work.mode == "keep":
            continue
        touched = [Path(name) for name in (work.frozen, work.child, *work.handled) if name is not None]
        for image in [Path(work.child)] if work.child else [Path(work.frozen), *map(Path, work.moving)]:
            engine.read_links(image, trusted_dirs=sorted(folders))
        for image in touched if not work.served else ():
            with open_one(image, folders, lock=True) as link:
                if work.removed is not None and image == work.removed:
                    engine.own_files(link)
        _check_folder(domain, work)
        _check_space(domain, work, folders)


def check_live(domain: libvirt.virDomain, plan: LivePlan) -> None:
    """Accept a delete beneath a running guest that nothing known stands in the way of; nothing is changed.

    Raises:
        NotWhileRunning: its QEMU is too old.
        DomainError: a disk is not there, a block job works on it, or a write of the guest has failed; or there is no
            space, or a folder may not be written.
        VmdkSnapError, OSError: see `check_work`.
    """
    name, intent = domain.name(), plan.intent
    check_work(name, work_of(intent), folders_of(intent))
    works = [one for deleted in plan.deleted for one in deleted.work if one.mode == "exchange"]
    if not works:
        return
    monitor = Monitor(domain)
    if not can_exchange(monitor):
        raise NotWhileRunning(
            name, "its QEMU cannot exchange the backing chain of a running guest's disk: that needs QEMU 6.1"
        )
    tops = monitor.tops()
    for target in sorted({work.target for work in works}):
        if target not in tops:
            raise DomainError(name, f"the running guest has no disk {target}")
        refuse_busy(name, tops[target])
    needed: dict[Path, int] = {}
    for work in works:
        folder = real_file(Path(work.child or work.frozen)).parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DomainError(name, f"disk {work.target}: {folder} may not be written, so no image can be made there")
        if not shares_extents(Path(work.frozen)):
            needed[folder] = needed.get(folder, 0) + work.size
    for folder, size in needed.items():
        if size > _free(folder):
            reason = f"{folder} needs {size} bytes for the images that replace the old ones"
            raise DomainError(name, f"{reason}, and its file system has {_free(folder)} left")


def _check_folder(domain: str, work: Work) -> None:
    if work.removed is None:
        return
    folder = real_file(work.removed).parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DomainError(
            domain, f"disk {work.target}: {folder} may not be written, so {work.removed} cannot be deleted"
        )


def _check_space(domain: str, work: Work, folders: Collection[Path]) -> None:
    """Refuse what certainly does not fit: the grains that would be stored where none are now."""
    if work.mode in ("drop", "empty") or work.cost <= _free(Path(work.frozen)):
        return
    wanting = [(work.child, work.frozen)] if work.mode == "merge" else [(work.frozen, one) for one in work.moving]
    wanting += [(work.frozen, one) for one in work.copied]
    for source, into in wanting:
        image = Path(into)
        needed = _new_bytes(Path(source or ""), image, folders)
        free = _free(image)
        if needed > free:
            reason = f"disk {work.target}: {image} would grow by {needed} bytes, and its file system has {free} left"
            raise DomainError(domain, reason)


def _free(path: Path) -> int:
    facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


def _new_bytes(source: Path, into: Path, folders: Collection[Path]) -> int:
    """Return the bytes that `source` stores and `into` does not, each by itself."""
    with contextlib.ExitStack() as stack:
        stored, there = (stack.enter_context(open_one(path, folders, lock=False)) for path in (source, into))
        total = 0
        for table in stored.tables():
            start, end = int(table.starts[0]), min(table.end, there.capacity)
            if start >= end:
                break
            taken = [(row.offset, row.offset + row.length) for row in there.resolve(start, end).rows() if row.kind > 0]
            for row in table.rows():
                if row.kind > 1:  # stored data: a hole and a range of zeros take no room
                    first, last = row.offset, row.offset + row.length
                    total += row.length - sum(max(0, min(last, e) - max(first, s)) for s, e in taken)
        return total
