"""The snapshots of a domain: are their files there, do these fit their overlays, are they registered as they are?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.doctor.check import Check, Repair
from qemu_vmdk_snap.domain.doctor.relink import relinking
from qemu_vmdk_snap.domain.doctor.view import View
from qemu_vmdk_snap.domain.needs.needed import place_in, same_file
from qemu_vmdk_snap.domain.registration import register_text
from qemu_vmdk_snap.domain.xml.form import in_form
from qemu_vmdk_snap.domain.xml.nvram import frozen_nvram
from qemu_vmdk_snap.domain.xml.origin import maker_of
from qemu_vmdk_snap.domain.xml.respell import with_chains
from qemu_vmdk_snap.errors import CidMismatch


def check_snapshot(view: View, name: str) -> Iterator[Check]:
    """Yield what there is to say of one snapshot: it is good only if its frozen files and their overlays fit."""
    snapshot, subject = view.snapshots[name], f"snapshot {name}"
    maker = maker_of(snapshot)
    if maker is not None:
        yield _check_foreign(snapshot, maker)
        return
    external = [disk for disk in snapshot.disks if disk.mode == "external"]
    if snapshot.memory_file is not None and not snapshot.memory_file.exists():
        text = f"its memory {snapshot.memory_file} is gone"
        yield Check(subject, "bad", text, f"`snapshot revert {view.name} {name} --shutoff` still brings back its disks")
        return
    found = [check for disk in external if (check := _check_disk(view, snapshot, disk)) is not None]
    nvram = frozen_nvram(view.texts[name])
    if nvram is not None and not nvram.exists():
        remedy = "bring the file back: without it a revert leaves the UEFI variables as they are"
        found.append(Check(subject, "bad", f"its UEFI variables {nvram} are gone", remedy))
    if found:
        yield found[0]
    else:
        yield Check(subject, "good", f"{len(external)} disks" if len(external) != 1 else "1 disk")
    if in_form(view.texts[name], view.volume_path) != view.texts[name]:
        text = "is registered in a form that virsh and virt-manager can delete, which breaks its files"
        remedy = f"`doctor {view.name} --repair`, or the next command on the domain, registers it again"
        yield Check(subject, "note", text, remedy, _register(view, name, view.texts[name], "in the form of today"))


def _check_foreign(snapshot: xml.SnapshotXml, maker: str) -> Check:
    subject = f"snapshot {snapshot.name}"
    text = f"was not made here ({maker})"
    external = [disk for disk in snapshot.disks if disk.mode == "external"]
    gone = [disk.overlay for disk in external if disk.overlay and not disk.overlay.exists()]
    lost = [disk.frozen for disk in external if disk.frozen and not disk.frozen.exists()]
    if lost:
        return Check(subject, "bad", f"{text}, and its file {lost[0]} is gone", "`virsh snapshot-delete --metadata`")
    if gone:
        text += f"; its overlay {gone[0]} is gone"
    return Check(subject, "note", text, "virsh reverts to it and deletes it, where it can")


def _check_disk(view: View, snapshot: xml.SnapshotXml, disk: xml.SnapshotDisk) -> Check | None:
    """Return what is wrong with one disk of the snapshot."""
    subject, label = f"snapshot {snapshot.name}", f"disk {disk.target}"
    if disk.frozen is None:
        return Check(subject, "bad", f"{label}: its domain's XML does not name the file that it froze")
    frozen = disk.frozen
    links, problem, mismatch = view.links(frozen)
    if links is None:
        remedy, repair = relinking(view, mismatch)
        if mismatch is None and not frozen.exists():
            remedy = f"bring the file back, or `snapshot delete --metadata {view.name} {snapshot.name}` forgets it"
        return Check(subject, "bad", f"{label}: {problem}", remedy, repair)
    overlays = view.needed.census.dependents(links[0].files)
    try:
        engine.require_fit(frozen, links[0].cid, overlays)
    except CidMismatch as error:
        return Check(subject, "bad", f"{label}: {error}", *relinking(view, error))
    stale = _check_spelling(view, snapshot, disk, [link.path for link in links])
    if stale is not None:
        return stale
    if disk.overlay is not None and not disk.overlay.exists():
        return Check(subject, "note", f"{label}: its overlay {disk.overlay} is gone; the frozen file is there")
    if disk.overlay is not None and place_in([one.path for one in overlays], disk.overlay) is None:
        what = f"{label}: its overlay {disk.overlay} does not name {frozen} as its parent (any more)"
        return Check(subject, "note", what, f"`image info {disk.overlay}` shows what it names")
    chain = view.chains.get(disk.target) if snapshot.name == view.current else None
    if chain is not None and place_in(chain, frozen) is None:
        return Check(subject, "bad", f"is the current one, but disk {disk.target} is not backed by its {frozen}")
    return None


def _check_spelling(view: View, snapshot: xml.SnapshotXml, disk: xml.SnapshotDisk, chain: list[Path]) -> Check | None:
    """Return that the XML inside the snapshot spells out another chain than that of the files."""
    named = disk.backing
    if not named or (len(named) == len(chain) - 1 and all(map(same_file, named, chain[1:]))):
        return None
    text = f"disk {disk.target}: its XML spells out {', '.join(map(str, named))}, its files another chain"
    changed = with_chains(view.texts[snapshot.name], {disk.target: [disk.frozen or chain[0], *chain[1:]]})
    repair = _register(view, snapshot.name, changed, "with the chain of its files")
    return Check(f"snapshot {snapshot.name}", "bad", text, f"`doctor {view.name} --repair` registers it again", repair)


def _register(view: View, name: str, text: str, how: str) -> Repair:
    def register() -> None:
        with libvirt_errors(view.name, f"register the snapshot {name!r} again"):
            register_text(view.domain, text, current=name == view.current)

    return Repair(f"snapshot {name} is registered again, {how}", register)
