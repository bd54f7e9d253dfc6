"""The names that libvirt knows, for who offers them while a command line is typed: fast, and nothing else is read."""

from __future__ import annotations

from qemu_vmdk_snap.domain.connect import connection, find_domain
from qemu_vmdk_snap.domain.xml import list_disks


def domain_names(uri: str | None) -> list[str]:
    """Return the names of the domains of a connection.

    Raises:
        VmdkSnapError: there is no such connection.
    """
    with connection(uri) as conn:
        return sorted(domain.name() for domain in conn.listAllDomains())


def snapshot_names(uri: str | None, domain: str) -> list[str]:
    """Return the names of the snapshots of a domain.

    Raises:
        VmdkSnapError: there is no such connection or domain.
    """
    with connection(uri) as conn:
        return sorted(find_domain(conn, domain).snapshotListNames())


def disk_names(uri: str | None, domain: str) -> list[str]:
    """Return the targets of the disks of a domain that can be snapshotted.

    Raises:
        VmdkSnapError: there is no such connection or domain.
    """
    with connection(uri) as conn:
        disks = list_disks(find_domain(conn, domain).XMLDesc(0))
        return [disk.target for disk in disks if disk.refusal is None]
