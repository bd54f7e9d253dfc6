"""Disks that take no part in snapshots, and what is a VMDK below them: a qcow2 overlay, as libvirt itself makes them.

libvirt makes one for a snapshot of its own, which its registry then names; and for its own revert to a snapshot, which
deletes the active VMDK overlays. After the latter the disk is brought back to VMDK: what the qcow2 overlays store goes
into a new VMDK overlay on the same file, which is compared before the XML names it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.doctor.check import Check, Repair
from qemu_vmdk_snap.domain.doctor.view import View
from qemu_vmdk_snap.domain.needs.needed import Needed, place_in, real_file
from qemu_vmdk_snap.domain.overlay.naming import next_overlay
from qemu_vmdk_snap.domain.overlay.newfile import make_overlay
from qemu_vmdk_snap.domain.overlay.planned import PlannedDisk
from qemu_vmdk_snap.domain.state import define
from qemu_vmdk_snap.domain.xml.origin import maker_of
from qemu_vmdk_snap.domain.xml.respell import with_chains
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError

_TOOL = "qemu-img"


def check_foreign_top(view: View, disk: xml.Disk) -> Check:
    """Return why the disk takes no part in snapshots, and what is below it that must not be changed."""
    subject, top = f"disk {disk.target}", disk.path
    text = f"takes no part in snapshots: it {disk.refusal or 'has no file'}"
    if top is None or not (disk.refusal or "").endswith("not vmdk"):
        return Check(subject, "note", text)
    files = engine.follow(top).files
    at = next((number for number, path in enumerate(files) if number and _is_vmdk(path)), None)
    if at is None:
        return Check(subject, "note", text)
    vmdk, uppers = files[at], files[:at]
    links, problem, _ = view.links(vmdk)
    text = f"{text}, though its top {top} is backed by the VMDK {vmdk}, which must stay as it is"
    if links is None:
        return Check(subject, "bad", f"{text}; {problem}")
    text = f"{text} (chain of {len(uppers) + len(links)})"
    makers = [one for one in view.snapshots.values() if maker_of(one) is not None]
    known = [disk.overlay for one in makers for disk in one.disks if disk.overlay is not None]
    if any(place_in(uppers, overlay) is not None for overlay in known):
        remedy = f"`qemu-img convert -O vmdk {top} NEW.vmdk` makes a VMDK disk of it"
        return Check(subject, "note", f"{text}; virsh made it for a snapshot", remedy)
    frozen_by = view.frozen_by(vmdk)
    cause = f" and is what snapshot {frozen_by!r} froze, so libvirt may have reverted to that" if frozen_by else ""
    if view.domain.isActive() or shutil.which(_TOOL) is None:
        needs = "shut it down first" if view.domain.isActive() else f"it needs {_TOOL}"
        remedy = f"`doctor {view.name} --repair` makes a VMDK overlay of it ({needs})"
        return Check(subject, "bad", text + cause, remedy)
    chain = [link.path for link in links]
    repair = Repair(
        f"disk {disk.target}: what {top} stores is in a new VMDK overlay on {vmdk}",
        lambda: _as_vmdk(view, disk.target, uppers, chain),
    )
    remedy = f"`doctor {view.name} --repair` makes a VMDK overlay of what it stores"
    return Check(subject, "bad", text + cause, remedy, repair)


def _is_vmdk(path: Path) -> bool:
    try:
        engine.read_facts(path)
    except (VmdkSnapError, OSError):
        return False
    return True


def _as_vmdk(view: View, target: str, uppers: Sequence[Path], chain: Sequence[Path]) -> None:
    """Let the disk continue in a VMDK overlay that reads as its top does; then remove the other formats' overlays.

    Raises:
        DomainError: qemu-img fails, or reads something else; nothing has changed.
        StillNeeded: the disk is the new one, and something else needs an old overlay, which stays.
    """
    top, vmdk = uppers[0], chain[0]
    taken = set().union(*map(xml.files_in, (view.text, *view.texts.values())))
    overlay = next_overlay(vmdk, taken)
    make_overlay(view.name, PlannedDisk(target, overlay, tuple(chain)))
    try:
        _run(
            view.name,
            "convert",
            "-n",
            "-t",
            "writeback",
            "-O",
            "vmdk",
            "-B",
            str(vmdk),
            "-F",
            "vmdk",
            str(top),
            str(overlay),
        )
        _sync(overlay)
        _run(view.name, "compare", str(top), str(overlay))
        with libvirt_errors(view.name, "define it with a VMDK overlay"):
            define(view.conn, with_chains(view.text, {target: [overlay, *chain]}))
    except BaseException:
        overlay.unlink()
        raise
    for path in uppers:
        needed = Needed.read(view.conn, view.domain, folders=[path.parent])
        needed.require_unneeded(path, [path], needed.holders)
        real_file(path).unlink()


def _run(domain: str, *words: str) -> None:
    done = subprocess.run([_TOOL, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise DomainError(domain, f"{_TOOL} {words[0]}: {said}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
