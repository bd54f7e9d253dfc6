"""How deep a chain may be for the libvirt that starts the domain: what it cannot start must not be made."""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt

_MAX_LINKS: Final = 200
"""libvirt 9.0 starts 200 links and refuses 201: "backing chains more than 200 layers deep are not supported"."""

_MAX_LINKS_OF_JSON_C: Final = 23
"""libvirt 11.3 starts 23 and fails at 24: QEMU's answer about the disk nests deeper than its parser goes. From 10.8,
which went over to json-c, until 12.0, which raised the limit (release notes of both). libvirt asks the same when it is
restarted, and ends a guest about which it gets no answer."""


def max_links(version: int) -> int:
    """Return how many links the chain of a disk may have for libvirt of `version`, as from virConnectGetLibVersion."""
    return _MAX_LINKS_OF_JSON_C if 10_008_000 <= version < 12_000_000 else _MAX_LINKS


def check_depth(conn: libvirt.virConnect, domain: str, target: str, links: Sized) -> None:
    """Accept a disk whose chain is `links` and that gets one more overlay.

    Raises:
        DomainError: libvirt could not start the domain then.
    """
    with libvirt_errors(domain, "ask for its version"):
        limit = max_links(conn.getLibVersion())
    if len(links) >= limit:
        reason = f"disk {target} has a chain of {len(links)} links, and this libvirt starts none of more than {limit}"
        raise DomainError(domain, f"{reason}: delete or prune snapshots first")
