"""One domain: do its chains, XML, registry and QEMU agree? Looking changes nothing; `repair` puts right what it can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap import follow
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.doctor.check import Check
from qemu_vmdk_snap.domain.doctor.disks import check_disk, check_top
from qemu_vmdk_snap.domain.doctor.running import Live, ask_qemu, check_running, writes_to_top
from qemu_vmdk_snap.domain.doctor.served import check_served
from qemu_vmdk_snap.domain.doctor.snapshots import check_snapshot
from qemu_vmdk_snap.domain.doctor.view import View
from qemu_vmdk_snap.domain.journal.pending import unfinished_of
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover_domain
from qemu_vmdk_snap.domain.needs.needed import NOTHING, Needed, place_in
from qemu_vmdk_snap.domain.needs.orphans import Orphan, find_orphans
from qemu_vmdk_snap.domain.registration import lacking_form
from qemu_vmdk_snap.domain.xml.kept import kept_branches
from qemu_vmdk_snap.domain.xml.served import served_disks
from qemu_vmdk_snap.errors import InvalidRequest, StillNeeded
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    import libvirt

_MOST_ROUNDS: Final = 100
"""Repairs of one call: a repair that does not help must not be tried for ever."""


def check_domain(conn: libvirt.virConnect, domain: str) -> Iterator[Check]:
    """Yield the checks of the domain: its disks, its snapshots, unfinished operations, orphans.

    Raises:
        DomainError: there is no such domain, or libvirt reports an error.
    """
    found = find_domain(conn, domain)
    yield from _check_intent(conn, found)
    yield from _check(conn, found)


def repair_domain(conn: libvirt.virConnect, domain: str) -> list[str]:
    """Do every repair that `check_domain` has for a finding, until none is left; return a line for each.

    Unfinished operations are finished or undone first. After each repair everything is checked again.

    Raises:
        DomainError: there is no such domain, another command changes its snapshots, or libvirt refuses.
        VmdkSnapError, OSError: a repair fails: an image is in use, say. The repairs before it are done.
    """
    found = find_domain(conn, domain)
    store = IntentStore.of(conn)
    done: list[str] = []
    with store.locked(found.UUIDString(), found.name()):
        with libvirt_errors(found.name(), "read its snapshots"):
            before = lacking_form(found)
        recover_domain(conn, found, store)
        with libvirt_errors(found.name(), "read its snapshots"):
            after = lacking_form(found)
        done += [f"snapshot {name} is registered again, in the current form" for name in before if name not in after]
        for _ in range(_MOST_ROUNDS):
            repairs = [check.repair for check in _check(conn, found) if check.repair is not None]
            wanted = next((one for one in repairs if one.what not in done), None)
            if wanted is None:
                break
            with libvirt_errors(found.name(), "repair it"):
                wanted.do()
            done.append(wanted.what)
    return done


def _check(conn: libvirt.virConnect, domain: libvirt.virDomain) -> Iterator[Check]:
    try:
        view = View.read(conn, domain)
    except StillNeeded as error:
        yield Check("files", "bad", str(error))
        return
    live = ask_qemu(view)
    for disk in view.disks:
        yield check_disk(view, disk)
    if isinstance(live, Check):
        yield live
    elif live is not None:
        yield from check_running(view, live)
    yield from check_served(view)
    for name in view.snapshots:
        yield from check_snapshot(view, name)
    if view.snapshots and view.current is None:
        remedy = f"`snapshot current {view.name} NAME` makes one the current one"
        yield Check("snapshots", "note", "none of them is the current one", remedy)
    for disk in view.disks:
        if disk.target in served_disks(view.text) or not isinstance(live, Live) or writes_to_top(live, disk):
            yield from check_top(view, disk)
    yield from _check_unnamed(view)


def _check_unnamed(view: View) -> Iterator[Check]:
    """Yield who else needs the files, the orphans, and what reverts have kept."""
    needed, name = view.needed, view.name
    orphans = find_orphans(view.conn, view.domain, needed)
    yield from _check_needs(view.uuid, orphans, needed)
    kept = {path.resolve(): snapshot for path, snapshot in kept_branches(view.text).items() if path.exists()}
    for orphan in orphans:
        yield _check_orphan(name, orphan, kept.get(orphan.path.resolve()))
    known = [*needed.files_of(needed.of_domain(view.uuid)), *(orphan.path for orphan in orphans)]
    others = needed.files_of(needed.of_others(view.uuid))
    for path, kept_by in kept.items():
        if place_in(known, path) is not None:
            continue
        if any(place_in(others, file) is not None for file in follow(path).files):
            text = "was kept by a revert of the domain that this one was copied from, whose disks it is backed by"
            yield Check(f"kept {path}", "note", text)
            continue
        # Deleting what backed it has made it a disk by itself.
        what = f"was kept by the revert to {kept_by!r} and is backed by no file of the domain any more"
        yield Check(f"kept {path}", "note", what, "delete the file, or use it as a disk of its own")


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
    """Report an orphan; `kept_by` is the snapshot to which the revert that kept it reverted."""
    holds = orphan.problem or ("holds nothing" if orphan.empty else f"holds {format_size(orphan.allocated)}")
    if kept_by is None:
        what = f"is backed by {orphan.parent}, is named by no domain and no snapshot, and {holds}"
        option = "--remove" if orphan.empty else f"--discard {orphan.path}"
        remedy = f"`doctor {domain} --adopt` makes it a snapshot, `doctor {domain} {option}` removes it"
        return Check(f"orphan {orphan.path}", "bad", what, None if orphan.problem else remedy)
    what = f"was kept by the revert to {kept_by!r}, is backed by {orphan.parent} and {holds}"
    ways = f"`doctor {domain} --discard {orphan.path}` removes it, `doctor {domain} --adopt` makes it a snapshot"
    return Check(f"kept {orphan.path}", "bad" if orphan.problem else "note", what, ways)


def _check_intent(conn: libvirt.virConnect, domain: libvirt.virDomain) -> Iterator[Check]:
    try:
        one = unfinished_of(conn, domain)
    except InvalidRequest as error:
        yield Check("state", "bad", str(error))
        return
    if one is not None:
        yield Check("snapshots", "note" if one.running else "bad", one.line())
