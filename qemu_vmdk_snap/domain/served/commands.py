"""What the commands about served disks do for a domain by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.served import server
from qemu_vmdk_snap.domain.served.guest import ready
from qemu_vmdk_snap.domain.state import inactive_xml
from qemu_vmdk_snap.domain.xml.served import behind, served_disks
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt


@dataclass(frozen=True, slots=True)
class ServedStatus:
    """One served disk of a domain."""

    target: str
    file: Path | None
    """The top of its chain, by the XML."""
    socket: Path
    control: Path
    server: dict[str, Any] | None
    """What its server says of itself; None where none answers."""
    active: bool
    """Whether the domain runs."""

    @property
    def problem(self) -> str | None:
        """Return what is not as it must be, in one line."""
        if self.server is None:
            return f"its server does not answer at {self.control}" if self.active else None
        top = self.server.get("top")
        if self.file is not None and os.path.realpath(str(top)) != os.path.realpath(self.file):
            return f"its server writes to {top}, and the XML names {self.file}"
        if self.active and not self.server.get("connections"):
            return "its server has no client, and the guest runs"
        return None

    @property
    def state(self) -> str:
        """Return how it is, in a few words."""
        if self.problem is not None:
            return self.problem
        if self.server is None:
            return "not served"
        return "in use" if self.server.get("connections") else "idle"

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {
            "target": self.target,
            "file": None if self.file is None else str(self.file),
            "socket": str(self.socket),
            "control": str(self.control),
            "state": self.state,
            "problem": self.problem,
            "server": self.server,
        }


def served_status(conn: libvirt.virConnect, domain_name: str) -> list[ServedStatus]:
    """Return the served disks of the domain, in the order of its XML.

    Raises:
        DomainError: there is no such domain, or libvirt reports an error.
    """
    domain = find_domain(conn, domain_name)
    with libvirt_errors(domain.name(), "read its state"):
        text, active = inactive_xml(domain), bool(domain.isActive())
    files, said = behind(text), server.statuses(domain.name(), text)
    return [
        ServedStatus(target, files[target].path, disk.socket, disk.control, said[target], active)
        for target, disk in served_disks(text).items()
    ]


def start_servers(conn: libvirt.virConnect, domain_name: str) -> list[str]:
    """Start the servers that do not run, also for a domain that is about to be started; return the targets.

    A guest that the loss of a server has paused goes on.

    Raises:
        DomainError: there is no such domain, or a disk cannot be served.
    """
    domain = find_domain(conn, domain_name)
    with libvirt_errors(domain.name(), "read its state"):
        active = bool(domain.isActive())
    if active:
        return ready(conn, domain)
    return server.start(domain.name(), inactive_xml(domain), conn.getURI())


def stop_servers(conn: libvirt.virConnect, domain_name: str) -> list[str]:
    """Stop the servers of a domain that is shut off; return the targets.

    Raises:
        DomainError: there is no such domain, it runs, or a server does not end.
    """
    domain = find_domain(conn, domain_name)
    with libvirt_errors(domain.name(), "read its state"):
        if domain.isActive():
            raise DomainError(domain.name(), "runs on its served disks: shut it down first")
    return server.stop(domain.name(), inactive_xml(domain))
