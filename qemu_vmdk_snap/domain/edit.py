"""Change the name and the description of a snapshot, and the current one. Only libvirt's metadata changes.

libvirt cannot rename: the snapshot is registered again under the other name, the old one is removed, and its
descendants are registered again, since removing it changes their XML. An intent record stores all of them, durable
before the first step; every step can be repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore
from qemu_vmdk_snap.domain.journal.recover import Recovery, make_current, recover_domain
from qemu_vmdk_snap.domain.overlay import naming
from qemu_vmdk_snap.domain.registration import register_text
from qemu_vmdk_snap.domain.state import find_snapshot
from qemu_vmdk_snap.domain.xml.edits import keeping_description
from qemu_vmdk_snap.errors import DomainError, SnapshotExists

if TYPE_CHECKING:
    import libvirt


def describe(conn: libvirt.virConnect, domain_name: str, snapshot: str, description: str | None) -> Recovery | None:
    """Give the snapshot another description; None removes it. Return the recovery that was made first.

    Raises:
        DomainError: there is no such snapshot, or libvirt refuses.
        InvalidRequest: the text contains a control character.
    """
    naming.check_description(description or "")
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()):
        recovered = recover_domain(conn, domain, store)
        texts, current = _read(domain, snapshot)
        _redefine(domain, xml.with_description(texts[snapshot], description), current=current == snapshot)
    return recovered


def set_current(conn: libvirt.virConnect, domain_name: str, snapshot: str) -> Recovery | None:
    """Make the snapshot the current one, whose child the next one will be. Return the recovery that was made first.

    Raises:
        DomainError: there is no such snapshot, or libvirt refuses.
    """
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()):
        recovered = recover_domain(conn, domain, store)
        with libvirt_errors(domain.name(), "make the snapshot the current one"):
            make_current(domain, snapshot)
    return recovered


def rename(conn: libvirt.virConnect, domain_name: str, snapshot: str, name: str) -> Recovery | None:
    """Give the snapshot another name. Return the recovery that was made first.

    Raises:
        DomainError: there is no such snapshot, another one has the name, or libvirt refuses.
        InvalidRequest: the name is invalid.
    """
    naming.check_snapshot_name(name)
    domain = find_domain(conn, domain_name)
    store = IntentStore.of(conn)
    with store.locked(domain.UUIDString(), domain.name()):
        recovered = recover_domain(conn, domain, store)
        texts, current = _read(domain, snapshot)
        renamed = xml.with_name(texts[snapshot], name)
        if name in texts:
            raise SnapshotExists(domain.name(), f"has a snapshot {name!r} already", snapshot=name)
        below = [other for other in texts if other != name and _below(other, snapshot, texts)]
        intent = Intent(
            uuid=domain.UUIDString(),
            domain=domain.name(),
            snapshot=snapshot,
            overlays=(),
            old_xml="",
            new_xml="",
            snapshot_xml=texts[snapshot],
            operation="rename",
            current=name if current == snapshot else current,
            snapshots=((name, renamed), *((other, _moved(texts[other], snapshot, name)) for other in below)),
        )
        store.write(intent)
        finish_rename(conn, domain, intent)
        store.remove(intent.uuid)
    return recovered


def finish_rename(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Intent) -> None:
    """Do every step of a rename, also if some are done already; what was edited or deleted meanwhile stays so.

    Raises:
        DomainError: another snapshot has the new name now, or libvirt refuses; the record must stay.
    """
    (name, renamed), *below = intent.snapshots
    there, current = _read_all(domain)
    if intent.snapshot in there:
        if name in there and not _same_snapshot(there[name], renamed):
            raise DomainError(domain.name(), f"has another snapshot {name!r} by now")
        renamed = keeping_description(renamed, there[intent.snapshot])
        _redefine(domain, renamed, current=current in (intent.snapshot, name))
        with libvirt_errors(domain.name(), f"forget the name {intent.snapshot!r}"):
            _forget(find_snapshot(domain, intent.snapshot))
    for other, text in below:  # forgetting the old name has changed their XML
        if other in there:
            _redefine(domain, keeping_description(text, there[other]), current=current == other)


def _same_snapshot(one: str, other: str) -> bool:
    left, right = xml.parse_snapshot(one), xml.parse_snapshot(other)
    return (left.creation_time, left.disks) == (right.creation_time, right.disks)


def _moved(text: str, old: str, new: str) -> str:
    return xml.with_parent(text, new) if xml.parse_snapshot(text).parent == old else text


def _read(domain: libvirt.virDomain, snapshot: str) -> tuple[dict[str, str], str | None]:
    find_snapshot(domain, snapshot)
    return _read_all(domain)


def _read_all(domain: libvirt.virDomain) -> tuple[dict[str, str], str | None]:
    """Return name -> XML of every snapshot, secrets included, and the current one."""
    import libvirt

    with libvirt_errors(domain.name(), "read its snapshots"):
        secure = libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
        texts = {one.getName(): one.getXMLDesc(secure) for one in domain.listAllSnapshots()}
        return texts, domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None


def _below(name: str, ancestor: str, texts: dict[str, str]) -> bool:
    seen: set[str] = set()
    parent = xml.parse_snapshot(texts[name]).parent
    while parent is not None and parent in texts and parent not in seen:
        if parent == ancestor:
            return True
        seen.add(parent)
        parent = xml.parse_snapshot(texts[parent]).parent
    return False


def _redefine(domain: libvirt.virDomain, text: str, *, current: bool) -> None:
    with libvirt_errors(domain.name(), "change the snapshot"):
        register_text(domain, text, current=current)


def _forget(snapshot: libvirt.virDomainSnapshot) -> None:
    import libvirt

    snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
