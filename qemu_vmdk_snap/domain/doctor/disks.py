"""The disks of a domain: is each chain valid, does the XML spell it out, and does nothing else read its top?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.doctor.check import Check, Repair
from qemu_vmdk_snap.domain.doctor.foreign import check_foreign_top
from qemu_vmdk_snap.domain.doctor.relink import relinking
from qemu_vmdk_snap.domain.doctor.view import View
from qemu_vmdk_snap.domain.needs.needed import place_in, same_file
from qemu_vmdk_snap.domain.state import define
from qemu_vmdk_snap.domain.xml.respell import with_chains
from qemu_vmdk_snap.domain.xml.served import served_disks

MAX_PROBED_DEPTH: Final = 2
"""libvirt finds out the format of so many links by itself; deeper ones must be spelt out in the XML."""

_LOOKED_AT: Final = ("is read-only", "is shared", "is transient")
"""Disks that take no part in a snapshot for these reasons are checked nevertheless."""


def check_disk(view: View, disk: xml.Disk) -> Check:
    """Return what there is to say of one disk of the persistent XML; its chain goes to `view.chains`."""
    if disk.path is None or (disk.refusal is not None and not disk.refusal.startswith(_LOOKED_AT)):
        return check_foreign_top(view, disk)
    found = _check_chain(view, disk, disk.path)
    if disk.refusal is not None and found.verdict != "bad":
        text = f"{found.found}; it takes no part in snapshots: it {disk.refusal}"
        return Check(found.subject, "note", text, found.remedy, found.repair)
    return found


def check_top(view: View, disk: xml.Disk) -> Iterator[Check]:
    """Yield who else reads the top of the disk, or writes it: it changes with each write of the guest."""
    if disk.path is None or disk.refusal is not None or not os.path.lexists(disk.path):
        return
    subject, top = f"disk {disk.target}", disk.path
    for holder in view.needed.of_others(view.uuid):
        files = holder.chain.files
        if holder.snapshot is None and holder.chain.role == "disk" and files and same_file(files[0].path, top):
            text = f"its top {top} is the disk {holder.chain.disk} of {holder.owner} too, and both write to it"
            yield Check(subject, "bad", text, "let one of the two have another file, by `virsh edit`")
            return
    frozen_by = view.frozen_by(top)
    above = view.overlays_on(top)
    if frozen_by is None and not above:
        return
    if frozen_by is not None:
        text = f"its top {top} is what snapshot {frozen_by!r} froze, and what the guest writes changes that"
        remedy = f"`snapshot revert {view.name} {frozen_by}` puts an overlay on it"
    else:
        text = f"its top {top} backs {above[0]}, and what the guest writes changes what that reads"
        remedy = f"`snapshot create {view.name}` puts a new top on it"
    repair = None if view.domain.isActive() else _successor(view, disk.target, top)
    if repair is not None:
        remedy = f"`doctor {view.name} --repair` lets the XML name the top of before, or {remedy}"
    yield Check(subject, "bad", text, remedy, repair)


def _successor(view: View, target: str, top: Path) -> Repair | None:
    """Return what lets the XML name the one top that the disk has continued in; None where that is not certain."""
    ends = view.successors(top)
    if len(ends) != 1 or same_file(ends[0], top):
        return None
    if _of_another(view, ends[0]):
        return None
    links, _, _ = view.links(ends[0])
    return None if links is None else _respelling(view, target, [link.path for link in links])


def _of_another(view: View, path: Path) -> bool:
    return place_in(view.needed.files_of(view.needed.of_others(view.uuid)), path) is not None


def _respelling(view: View, target: str, chain: Sequence[Path]) -> Repair:
    def respell() -> None:
        define(view.conn, with_chains(view.text, {target: chain}))

    return Repair(f"disk {target}: the XML spells out the chain {', '.join(map(str, chain))}", respell)


def _check_chain(view: View, disk: xml.Disk, top: Path) -> Check:
    subject = f"disk {disk.target}"
    links, problem, mismatch = view.links(top)
    if links is None:
        if not os.path.lexists(top):
            return _lost_top(view, disk, top, problem)
        return Check(subject, "bad", problem, *relinking(view, mismatch))
    chain = [link.path for link in links]
    view.chains[disk.target] = tuple(chain)
    if len(links) > view.limit and disk.target not in served_disks(view.text):
        reason = f"has {len(links)} links: this libvirt starts no domain with more than {view.limit}"
        return Check(subject, "bad", reason, "delete or prune snapshots")
    respelled = f"`doctor {view.name} --repair` spells out the chain of the files"
    repair = _respelling(view, disk.target, chain)
    below = chain[1 : len(disk.backing) + 1]
    if (disk.closed or disk.backing) and not _same(disk.backing, below):
        named = ", ".join(map(str, disk.backing)) or "no parent"
        return Check(subject, "bad", f"its XML spells out {named}, its files another chain", respelled, repair)
    if disk.closed and len(disk.backing) != len(links) - 1:
        text = f"its XML ends after {len(disk.backing)} parents, its files after {len(links) - 1}"
        return Check(subject, "bad", text, respelled, repair)
    if not disk.closed and len(links) > MAX_PROBED_DEPTH:
        text = f"has {len(links)} links that the XML does not spell out: libvirt refuses to start it"
        return Check(subject, "bad", text, f"{respelled}, and `snapshot adopt` does too", repair)
    denied = [link.path for link in links if not os.access(link.path, os.R_OK)]
    if denied:
        return Check(subject, "bad", f"{denied[0]} may not be read by this user")
    original = _original(view, chain[1:])
    owners = {(link.path.stat().st_uid, link.path.stat().st_gid) for link in links}
    if len(owners) > 1:
        return Check(subject, "note", f"chain of {len(links)}, sound, but its files belong to {len(owners)} owners")
    return Check(subject, "good", f"{top}: chain of {len(links)}, sound; XML and files agree{original}")


def _original(view: View, below: Sequence[Path]) -> str:
    """Return of which domain's snapshot the disk is a clone: that froze a file below it, and this domain's did not."""
    for path in below:
        if view.frozen_by(path) is not None:
            continue
        for holder in view.needed.of_others(view.uuid):
            files = holder.chain.files
            if holder.snapshot is not None and holder.chain.role == "disk" and files and same_file(files[0].path, path):
                return f"; it is a clone: {path} is what {holder.owner} froze"
    return ""


def _same(named: Sequence[Path], files: Sequence[Path]) -> bool:
    return len(named) == len(files) and all(map(same_file, named, files))


def _lost_top(view: View, disk: xml.Disk, top: Path, problem: str) -> Check:
    """Tell of a top that is gone: merged into its parent by hand, or deleted by libvirt's own revert."""
    subject = f"disk {disk.target}"
    left = next((path for path in disk.backing if path.exists()), None)
    if left is None:
        return Check(subject, "bad", problem)
    frozen_by = view.frozen_by(left)
    text = f"its top {top} is gone, and {left} below it is there"
    if frozen_by is not None:
        remedy = f"`snapshot revert {view.name} {frozen_by}` puts a new top on it"
        return Check(subject, "bad", text, remedy)
    links, reason, mismatch = view.links(left)
    if links is None:
        return Check(subject, "bad", f"{text}; {reason}", *relinking(view, mismatch))
    if view.overlays_on(left) or _of_another(view, left):
        return Check(subject, "bad", f"{text}, but something else is backed by it")
    repair = _respelling(view, disk.target, [link.path for link in links])
    return Check(subject, "bad", text, f"`doctor {view.name} --repair` makes that the top", repair)
