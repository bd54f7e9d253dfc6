"""Registering snapshots with libvirt: the one place that does, always in the form that virsh cannot harm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qemu_vmdk_snap import log
from qemu_vmdk_snap.domain.state import volume_resolver
from qemu_vmdk_snap.domain.xml.form import in_form

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)


def register_text(domain: libvirt.virDomain, text: str, *, current: bool = False) -> None:
    """Register the snapshot that the XML describes, or change what is registered under its name.

    `current` makes it the current one; otherwise that stays which is.

    Raises:
        libvirtError: libvirt refuses.
    """
    import libvirt

    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT if current else 0
    domain.snapshotCreateXML(in_form(text, volume_resolver(domain.connect(), domain.name())), flags)


def lacking_form(domain: libvirt.virDomain) -> dict[str, str]:
    """Return name -> XML of the snapshots of ours that libvirt's own commands would harm: those without the form.

    Raises:
        libvirtError: libvirt reports an error.
    """
    import libvirt

    volume_path = volume_resolver(domain.connect(), domain.name())
    texts = {one.getName(): one.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE) for one in domain.listAllSnapshots()}
    return {name: text for name, text in texts.items() if in_form(text, volume_path) != text}


def register_anew(domain: libvirt.virDomain) -> list[str]:
    """Give every snapshot of ours the form; return the names of those that did not have it.

    One that libvirt refuses to change stays as it is: `doctor` names it.
    """
    import libvirt

    changed = []
    try:
        wanting = lacking_form(domain)
        current = domain.snapshotCurrent().getName() if wanting and domain.hasCurrentSnapshot() else None
        for name, text in wanting.items():
            try:
                register_text(domain, text, current=name == current)
            except libvirt.libvirtError as error:
                _log.info("domain %s: snapshot %r is not registered again: %s", domain.name(), name, error)
            else:
                changed.append(name)
    except libvirt.libvirtError as error:
        _log.info("domain %s: its snapshots are not looked through: %s", domain.name(), error)
    if changed:
        _log.info("domain %s: registered again: %s", domain.name(), ", ".join(changed))
    return changed
