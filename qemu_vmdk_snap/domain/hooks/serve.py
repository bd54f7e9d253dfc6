"""The servers of served disks, at a guest's start and after its stop; without libvirt, which a hook must not call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.domain.hooks.unneeded import drivers
from qemu_vmdk_snap.domain.served import server
from qemu_vmdk_snap.domain.xml import list_disks
from qemu_vmdk_snap.domain.xml.served import behind, direct_view
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    from qemu_vmdk_snap.domain.hooks.policy import Policy


def start_servers(domain_xml: str, policy: Policy, name: str) -> None:
    """Start what is not served yet; returns once the guest can be started.

    Raises:
        DomainError: a disk cannot be served.
    """
    server.start(name, domain_xml, policy.connect)


def stop_servers(domain_xml: str, name: str) -> None:
    """Stop the servers that have no client: one that a guest has gone to elsewhere, as by migration, goes on.

    Raises:
        DomainError: one does not end.
    """
    server.stop(name, domain_xml, leaving=5.0)


def refuse_other_state(domain_xml: str, name: str) -> None:
    """Compare with the persistent XML: memory that was saved earlier must not meet a disk that is another by now.

    Nor must what was frozen since be written again.

    Raises:
        DomainError: the XML is of saved memory that belongs to another state of a disk.
    """
    path = drivers().domains / f"{name}.xml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return  # a transient domain, or one that comes from another daemon
    except (OSError, ValueError) as error:
        raise DomainError(name, f"{path} cannot be read: {error}") from error
    now = {disk.target: disk.path for disk in list_disks(direct_view(text), lambda _pool, _volume: Path())}
    for target, disk in behind(domain_xml).items():
        if disk.path is None or now.get(target) is None:
            continue
        if os.path.realpath(disk.path) != os.path.realpath(str(now[target])):
            reason = f"disk {target}: this state was saved when its file was {disk.path}, and it is {now[target]} now"
            raise DomainError(name, f"{reason}: `snapshot revert` brings back the memory of a snapshot with its disks")
