"""The guest of served disks: seen on the right files, resumed, its memory saved and brought back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.served import server
from qemu_vmdk_snap.domain.served.memory import restore_memory
from qemu_vmdk_snap.domain.state import inactive_xml

if TYPE_CHECKING:
    import libvirt


class Memory(Protocol):
    """What a record says of the memory to restore."""

    @property
    def memory(self) -> str | None:
        """The file."""

    @property
    def resume(self) -> bool:
        """Whether the guest is to run then."""


_WATCHED: Final = 1.0
"""Seconds for which a guest must run on before it counts as resumed."""

_NOTICED: Final = 3.0
"""Seconds in which a guest that was about to write is paused: QEMU sees the loss of its server at a request."""


def ready(conn: libvirt.virConnect, domain: libvirt.virDomain) -> list[str]:
    """Let every served disk of the domain be as its state demands, and return the targets whose server was started.

    Of a running guest each is served, and the guest goes on where the loss of a server has paused it. Of one that is
    shut off no server is left, so that its images can be opened.

    Raises:
        DomainError: a disk cannot be served, or its server does not end.
    """
    text = inactive_xml(domain)
    with libvirt_errors(domain.name(), "read its state"):
        active = bool(domain.isActive())
    if not active:
        server.stop(domain.name(), text)
        return []
    started = server.start(domain.name(), text, conn.getURI(), again=True)
    if started:
        resume_after_error(domain)
    return started


def resume_from_memory(conn: libvirt.virConnect, domain: libvirt.virDomain, intent: Memory) -> None:
    """Let the shut-off domain, whose disks are back, resume from the memory of the snapshot.

    Raises:
        DomainError: a disk cannot be served, or libvirt cannot restore the memory.
    """
    text = inactive_xml(domain)
    server.start(domain.name(), text, conn.getURI())
    restore_memory(conn, domain, Path(intent.memory or ""), text, paused=not intent.resume)


def resume_after_error(domain: libvirt.virDomain) -> int:
    """Resume a guest that QEMU has paused for an I/O error until it runs on; return how many times it took.

    Raises:
        DomainError: libvirt refuses.
    """
    import libvirt

    error = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
    resumes, good_since, started = 0, time.monotonic(), time.monotonic()
    with libvirt_errors(domain.name(), "resume it"):
        while domain.isActive():
            now = time.monotonic()
            if domain.state() == error:
                domain.resume()
                resumes, good_since = resumes + 1, now
            elif now - good_since > _WATCHED and (resumes or now - started > _NOTICED):
                break
            time.sleep(0.05)
    return resumes
