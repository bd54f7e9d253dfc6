"""Which snapshots are to be deleted once the guest is shut off: a note in the domain's own metadata.

It goes where the domain's XML goes, and libvirt changes both in one step:

    <metadata><waiting:deletes xmlns:waiting="..."><waiting:delete snapshot="s1"/></waiting:deletes></metadata>
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from xml.sax.saxutils import quoteattr

from qemu_vmdk_snap.domain.xml import root_of

NAMESPACE: Final = "urn:qemu-vmdk-snap:waiting:1"


def waiting_in(domain_xml: str) -> list[str]:
    """Return the names of the snapshots, in the order in which they were noted."""
    entries = root_of(domain_xml).iterfind(f"./metadata/{{{NAMESPACE}}}deletes/{{{NAMESPACE}}}delete")
    return [entry.get("snapshot", "") for entry in entries]


def waiting_element(names: Iterable[str]) -> str | None:
    """Return the element that libvirt is to keep, without its namespace; None where nothing waits."""
    entries = "".join(f"<delete snapshot={quoteattr(name)}/>" for name in names)
    return f"<deletes>{entries}</deletes>" if entries else None
