"""Deletes that wait until the guest is shut off, and who does them then.

The next command that deletes or prunes while the domain is shut off does them, and so does the hook after a stop. A
note of a snapshot that is not there any more says nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import TYPE_CHECKING

from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.state import inactive_xml
from qemu_vmdk_snap.domain.xml.waiting import NAMESPACE, waiting_element, waiting_in

if TYPE_CHECKING:
    import libvirt


def waiting(domain: libvirt.virDomain) -> list[str]:
    """Return the snapshots that are there and wait for their delete, in the order in which they were noted.

    Raises:
        DomainError: libvirt reports an error.
    """
    with libvirt_errors(domain.name(), "read which deletes wait"):
        noted = waiting_in(inactive_xml(domain))
        there = {snapshot.getName() for snapshot in domain.listAllSnapshots()} if noted else set()
    return [name for name in noted if name in there]


def note(domain: libvirt.virDomain, names: Collection[str]) -> None:
    """Note that these snapshots are to be deleted once the guest is shut off.

    Raises:
        DomainError: libvirt refuses.
    """
    known = waiting(domain)
    _store(domain, [*known, *(name for name in names if name not in known)])


def forget(domain: libvirt.virDomain, names: Collection[str]) -> None:
    """Strike the notes of snapshots that are deleted; nothing is changed where there are none.

    Raises:
        DomainError: libvirt refuses.
    """
    noted = waiting_in(inactive_xml(domain))
    left = [name for name in noted if name not in names]
    if left != noted:
        _store(domain, left)


def _store(domain: libvirt.virDomain, names: Collection[str]) -> None:
    import libvirt

    kind, text = libvirt.VIR_DOMAIN_METADATA_ELEMENT, waiting_element(names)
    with libvirt_errors(domain.name(), "note which deletes wait"):
        domain.setMetadata(kind, text, "waiting", NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        if domain.isActive():  # what the hook is given when the guest has stopped
            with contextlib.suppress(libvirt.libvirtError):
                domain.setMetadata(kind, text, "waiting", NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_LIVE)
