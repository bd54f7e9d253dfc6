"""What QEMU says of a running domain: which files it writes to, whether they are those of the persistent XML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.doctor.check import Check, Repair
from qemu_vmdk_snap.domain.doctor.view import View
from qemu_vmdk_snap.domain.needs.needed import place_in, same_file
from qemu_vmdk_snap.domain.qemu.monitor import LiveTop, Monitor
from qemu_vmdk_snap.domain.qemu.unused import release_unused, unused_nodes
from qemu_vmdk_snap.domain.state import define
from qemu_vmdk_snap.domain.xml.respell import with_chains
from qemu_vmdk_snap.domain.xml.served import served_disks
from qemu_vmdk_snap.errors import VmdkSnapError


@dataclass(frozen=True, slots=True)
class Live:
    """What QEMU says."""

    tops: Mapping[str, LiveTop]
    written: Mapping[str, Path]
    """target -> the file that it writes to, as far as it is one that is known."""
    named: Mapping[str, Path | None]
    """target -> the top by libvirt's live XML."""
    unused: tuple[str, ...]
    """Our nodes that are open and used by nothing."""


def ask_qemu(view: View) -> Live | Check | None:
    """Return what QEMU says; None of a domain that is shut off; why it cannot be asked."""
    if not view.domain.isActive():
        return None
    try:
        monitor = Monitor(view.domain)
        live = xml.list_disks(view.domain.XMLDesc(0), view.volume_path)
        tops, named = monitor.tops(), {disk.target: disk.path for disk in live}
        written = {}
        for disk in view.disks:
            found = _written(tops.get(disk.target), named.get(disk.target), _candidates(view, disk))
            if found is not None:
                written[disk.target] = found
        return Live(tops, written, named, (*unused_nodes(monitor.edges()),))
    except VmdkSnapError as error:
        return Check("QEMU", "note", f"cannot be asked: {error}")


def check_running(view: View, live: Live) -> Iterator[Check]:
    """Yield where QEMU, the persistent XML and libvirt's live XML do not agree, and what is left open."""
    for disk in view.disks:
        if disk.path is None or disk.refusal is not None:
            continue
        yield from _check_disk(view, live, disk)
    for target in sorted(set(live.tops) - {disk.target for disk in view.disks}):
        text = "is plugged into the running guest alone: the persistent XML does not have it"
        yield Check(f"disk {target}", "note", text)
    if live.unused:
        text = f"the running QEMU keeps {len(live.unused)} nodes of a detached disk open ({', '.join(live.unused)})"
        done = Repair(
            f"closed {len(live.unused)} nodes of a detached disk", lambda: release_unused(Monitor(view.domain))
        )
        yield Check("QEMU", "bad", text, f"`doctor {view.name} --repair` or `recover` closes them", done)


def writes_to_top(live: Live, disk: xml.Disk) -> bool:
    """Return whether the running guest writes to the file that the persistent XML names, or may."""
    written = live.written.get(disk.target)
    return written is None or disk.path is None or same_file(written, disk.path)


def _check_disk(view: View, live: Live, disk: xml.Disk) -> Iterator[Check]:
    if disk.target in served_disks(view.text):
        return  # its server knows what it writes to
    subject, top = f"disk {disk.target}", live.tops.get(disk.target)
    if top is None or disk.path is None:
        yield Check(subject, "note", "is not plugged into the running guest")
        return
    if top.failed:
        text = f"{top.failed} writes of the guest have failed since it was started"
        yield Check(subject, "bad", text, "check its file system from inside, then restart the guest")
    if top.job is not None:
        yield Check(subject, "note", f"the block job {top.job!r} works on it")
    written = live.written.get(disk.target)
    if written is None:
        text = f"the running guest writes to another file than {disk.path}, and to none that is known"
        yield Check(subject, "bad", text, "shut it down, then `doctor` again")
    elif not same_file(written, disk.path):
        yield _stale(view, disk, written)
    named = live.named.get(disk.target)
    if written is not None and named is not None and not same_file(named, written):
        text = f"libvirt's live XML names {named} until the guest stops, though QEMU writes to {written}"
        yield Check(subject, "note", text, "`virsh dumpxml` without --inactive is not to be defined")


def _stale(view: View, disk: xml.Disk, written: Path) -> Check:
    subject, top = f"disk {disk.target}", disk.path
    links, problem, _ = view.links(written)
    above, _, _ = view.links(top) if top is not None else (None, "", None)
    if above is not None and place_in([link.path for link in above[1:]], written) is not None:
        found = f"the running guest writes to {written}, which backs {top}, the top by the persistent XML"
        return Check(subject, "bad", found, "what that reads changes: shut the guest down")
    if links is not None and place_in([link.path for link in links], top) is None:
        found = f"the running guest writes to {written}, and the next start takes {top}, which is another disk"
        return Check(subject, "note", found)
    found = f"the persistent XML names {top}, but QEMU writes to {written}, and the next start would lose that"
    if links is None:
        return Check(subject, "bad", f"{found}; {problem}")
    chain = [link.path for link in links]
    done = Repair(
        f"disk {disk.target}: the XML names {written} again",
        lambda: define(view.conn, with_chains(view.text, {disk.target: chain})),
    )
    return Check(subject, "bad", found, f"`doctor {view.name} --repair` lets the XML name it", done)


def _written(top: LiveTop | None, named: Path | None, candidates: list[Path]) -> Path | None:
    if top is None:
        return None
    if top.by_libvirt:  # opened as the live XML says
        return next((path for path in candidates if named is not None and same_file(path, named)), named)
    return next((path for path in candidates if top.is_file(path)), None)


def _candidates(view: View, disk: xml.Disk) -> list[Path]:
    """Return the files that the disk may write to: its chain, all that is backed by it, and what snapshots name."""
    found: list[Path] = [] if disk.path is None else [disk.path, *disk.backing]
    for snapshot in view.snapshots.values():
        mine = [one for one in snapshot.disks if one.target == disk.target]
        found += [path for one in mine for path in (one.frozen, one.overlay) if path is not None]
    waiting = list(found)
    while waiting:
        above = [path for path in view.overlays_on(waiting.pop()) if path not in found]
        found += above
        waiting += above
    return list(dict.fromkeys(found))
