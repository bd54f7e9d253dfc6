"""The moment of a snapshot of served disks: the servers go over to the overlays, all of them, or none does.

A server makes its overlay beforehand, while the guest writes. At the switch it answers what it has in hand, writes it
out, goes over, and holds every further request until the release. So with several disks there is a moment at which all
stand still, and which all overlays begin at. A server that is held goes back by itself when our connection to it
closes: killed in the middle, nothing has happened.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.served.control import Control, status_of
from qemu_vmdk_snap.domain.xml import Disk
from qemu_vmdk_snap.domain.xml.served import ServedDisk, served_disks
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt

_DECIDING: Final = 30.0
"""Seconds."""


class Holds:
    """Connections to the servers of the disks that take part; closing them takes back what is not released."""

    def __init__(self, domain: str, disks: Mapping[str, ServedDisk]) -> None:
        """Connect to each server.

        Raises:
            DomainError: one does not answer.
        """
        self._stack = contextlib.ExitStack()
        self._tokens: dict[str, str] = {}
        self._controls: dict[str, Control] = {}
        try:
            for target, disk in disks.items():
                self._controls[target] = self._stack.enter_context(Control(domain, disk.control))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Holds:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def __contains__(self, target: object) -> bool:
        """Return whether the disk is one of these."""
        return target in self._controls

    def prepare(self, target: str, overlay: Path) -> None:
        """Let the server make the overlay, durable, on what it serves now.

        Raises:
            DomainError: it cannot; nothing is left of it.
        """
        self._tokens[target] = str(self._controls[target].ask("snapshot-prepare", overlay=str(overlay))["token"])

    def switch(self) -> float:
        """Let all servers go over, and hold them; return when the first was held, on the performance counter.

        Raises:
            DomainError: one cannot: `abort` takes the others back.
        """
        started = time.perf_counter()
        for target, token in self._tokens.items():
            self._controls[target].ask("snapshot-switch", token=token, hold=True)
        return started

    def release(self) -> None:
        """Let the servers go on, in the overlays; from here on nothing can be taken back."""
        tokens, self._tokens = self._tokens, {}
        for target in tokens:
            self._controls[target].ask("release")
        self._stack.close()

    def abort(self) -> None:
        """Let the servers go on in what they had, and remove the overlays, unless they are released."""
        for target, token in self._tokens.items():
            with contextlib.suppress(DomainError):  # the server is gone: there is nothing that it could go back from
                self._controls[target].ask("snapshot-abort", token=token)
        self._tokens = {}
        self._stack.close()


def check_served(domain: libvirt.virDomain, served: Mapping[str, ServedDisk], disks: Sequence[Disk]) -> None:
    """Accept the served disks where the running guest has them and their servers write to what the XML says.

    Raises:
        DomainError: that is not so.
    """
    name = domain.name()
    with libvirt_errors(name, "read its live XML"):
        live = served_disks(domain.XMLDesc(0))
    for disk in disks:
        there = served[disk.target]
        if disk.target not in live or live[disk.target].socket != there.socket:
            raise DomainError(name, f"disk {disk.target} is not plugged into the running guest as a served disk")
        status = status_of(name, there.control)
        if status is None:
            raise DomainError(name, f"disk {disk.target}: its server does not answer at {there.control}")
        if status.get("read_only"):
            raise DomainError(name, f"disk {disk.target} is served read-only")
        if disk.path is None or not _same(str(status.get("top")), disk.path):
            reason = f"disk {disk.target}: the persistent XML names {disk.path}, but its server writes to"
            raise DomainError(name, f"{reason} {status.get('top')}: shut it down, or correct the XML")


def await_decided(domain: str, domain_xml: str, overlays: Mapping[str, Path]) -> None:
    """Wait until each server has gone over to its overlay for good, or has removed it: its client died just now."""
    deadline = time.monotonic() + _DECIDING
    for target, disk in served_disks(domain_xml).items():
        overlay = overlays.get(target)
        while overlay is not None and overlay.exists() and time.monotonic() < deadline:
            status = status_of(domain, disk.control)
            if status is None or (_same(str(status.get("top")), overlay) and not status.get("held")):
                break
            time.sleep(0.02)


def written_by_servers(domain: str, domain_xml: str, candidates: Mapping[str, Path]) -> dict[str, Path]:
    """Return which of the overlays, by target, the server of a served disk writes to, or may have written to.

    Of a server that is gone nobody can ask that. Its overlay counts if it is there: an empty one shows what its base
    has, and the server removes it when it goes back.
    """
    found = {}
    for target, disk in served_disks(domain_xml).items():
        overlay = candidates.get(target)
        if overlay is None:
            continue
        status = status_of(domain, disk.control)
        if overlay.exists() if status is None else _same(str(status.get("top")), overlay):
            found[target] = overlay
    return found


def complete_switch(domain: str, domain_xml: str, overlays: Mapping[str, Path]) -> None:
    """Let each server that is not in its overlay yet go over to it, where other disks of the snapshot have.

    Raises:
        DomainError: a server cannot.
    """
    for target, disk in served_disks(domain_xml).items():
        overlay = overlays.get(target)
        status = status_of(domain, disk.control)
        if overlay is None or status is None or _same(str(status.get("top")), overlay) or overlay.exists():
            continue
        with Control(domain, disk.control) as control:
            control.ask("snapshot", overlay=str(overlay))


def _same(one: str, other: Path) -> bool:
    return Path(one).resolve() == other.resolve()
