"""What monitoring asks of a host: for each domain its snapshots, its findings and the depth and size of its chains.

Everything here only reads. A domain that cannot be read has a `problem` and does not hide the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors
from qemu_vmdk_snap.domain.doctor.check import Verdict
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.journal.pending import unfinished_of
from qemu_vmdk_snap.domain.registry import SnapshotInfo, list_snapshots
from qemu_vmdk_snap.domain.state import inactive_xml, volume_resolver
from qemu_vmdk_snap.errors import VmdkSnapError

if TYPE_CHECKING:
    import libvirt

VERDICTS: tuple[Verdict, ...] = ("good", "note", "bad")


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """One VMDK disk of a domain. Sizes are bytes that the files take up on their file system."""

    target: str
    depth: int
    """How many links the chain has, its active overlay included."""
    frozen_bytes: int
    """All links below the active overlay."""
    overlay_bytes: int
    """The active overlay: what was written since the newest snapshot. The whole disk where there is no snapshot."""


@dataclass(frozen=True, slots=True)
class DomainFigures:
    """One domain."""

    name: str
    read_snapshots: bool = False
    """Whether its snapshots could be read; if not, the four figures below say nothing."""
    snapshots: int = 0
    oldest: int | None = None
    """When the oldest snapshot was created, in seconds since 1970; None where there is none."""
    newest: int | None = None
    interrupted: int = 0
    """Operations that have begun and not ended, and that no command is at work on."""
    findings: dict[Verdict, int] = field(default_factory=dict)
    """How many findings `doctor` has of each verdict; empty where it was not asked."""
    bad: tuple[str, ...] = ()
    """The findings that are bad, a line each."""
    disks: tuple[DiskFigures, ...] = ()
    problem: str | None = None
    """Why the domain could not be read as a whole, in one line; the figures are those that could be."""


def read_figures(
    conn: libvirt.virConnect, names: Iterable[str], *, doctor: bool = True, disks: bool = True
) -> list[DomainFigures]:
    """Return the figures of these domains, in their order. `doctor` and `disks` say whether those are asked for.

    Nothing is raised for a domain: what is wrong is its `problem`.
    """
    return [_read(conn, name, doctor=doctor, disks=disks) for name in names]


def _read(conn: libvirt.virConnect, name: str, *, doctor: bool, disks: bool) -> DomainFigures:
    snapshots: Sequence[SnapshotInfo] = ()
    read_snapshots = False
    interrupted = 0
    found: list[DiskFigures] = []
    findings: dict[Verdict, int] = {}
    bad: list[str] = []
    problems: list[str] = []
    try:
        domain = find_domain(conn, name)
        name = domain.name()
        snapshots = list_snapshots(conn, name)
        unfinished = unfinished_of(conn, domain)
        interrupted = int(unfinished is not None and not unfinished.running)
        read_snapshots = True
        if disks:
            found = _disks(conn, domain, problems)
        if doctor:
            findings = dict.fromkeys(VERDICTS, 0)
            for check in check_domain(conn, name):
                findings[check.verdict] += 1
                if check.verdict == "bad":
                    bad.append(f"{check.subject}: {check.text}")
    except VmdkSnapError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename or name}: {error.strerror}")
    created = [snapshot.creation_time for snapshot in snapshots]
    return DomainFigures(
        name,
        read_snapshots,
        len(snapshots),
        min(created, default=None),
        max(created, default=None),
        interrupted,
        findings,
        tuple(bad),
        tuple(found),
        problems[0] if problems else None,
    )


def _disks(conn: libvirt.virConnect, domain: libvirt.virDomain, problems: list[str]) -> list[DiskFigures]:
    """Return the disks that take part in snapshots; one whose chain cannot be read goes to `problems`."""
    with libvirt_errors(domain.name(), "read its XML"):
        text = inactive_xml(domain)
    found = []
    for disk in xml.list_disks(text, volume_resolver(conn, domain.name())):
        if disk.path is None or disk.refusal is not None:
            continue
        try:
            links = engine.read_links(disk.path, trusted_dirs=[path.parent for path in disk.backing])
            sizes = [sum(file.stat().st_blocks * 512 for file in link.files) for link in links]
        except VmdkSnapError as error:
            problems.append(f"disk {disk.target}: {error}")
            continue
        except OSError as error:
            problems.append(f"disk {disk.target}: {error.filename or disk.path}: {error.strerror}")
            continue
        found.append(DiskFigures(disk.target, len(links), sum(sizes[1:]), sizes[0]))
    return found


def age_of(created: int, now: float | None = None) -> float:
    """Return how many seconds ago that was, never less than 0: clocks are set back."""
    return max(0.0, (time.time() if now is None else now) - created)
