"""A live snapshot: the guest's disks are switched to their overlays, all in one step, or none.

What must hold is that each overlay's parentCID is the CID that its base has for good. QEMU writes a new CID once per
open, after the first data; from the transaction on the base is read-only, and its CID final. So:

    the base has been written since QEMU opened it    its CID is final already: no vCPU needs to stop
    it has not                                        vCPUs stop; the CID is compared once more; then the transaction

If the CID has changed before the vCPUs stopped, the guest continues, the overlay gets the new one, and the second try
finds it final. The transaction itself drains all the disks and is atomic, as for libvirt's own snapshots.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap import Descriptor, PosixFile, confined, fitting_parent, open_link, open_posix, read_descriptor
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.qemu.agent import frozen
from qemu_vmdk_snap.domain.qemu.monitor import LiveTop, Monitor, refuse_busy
from qemu_vmdk_snap.domain.qemu.options import DriverOptions, read_options
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt

    from qemu_vmdk_snap.domain.overlay.planned import PlannedDisk

_TRIES: Final = 3
_FRESH: Final = 1.0
"""Seconds: what QEMU said longer ago is asked again. Each question costs the guest a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Pause:
    """How long the guest was stopped, in milliseconds, measured from outside: communication with QEMU is included."""

    stalled: float
    """While the transaction held back the guest's disk requests."""
    stopped: float | None
    """While the vCPUs stood still, the stall included; None where they went on."""
    frozen: float | None
    """While its file systems were frozen by the guest agent; None where they were not."""
    notes: tuple[str, ...] = ()
    """Problems that did not prevent the operation."""

    def as_dict(self) -> dict[str, object]:
        """Return the times with JSON's own types."""
        return {"disk-ms": self.stalled, "cpu-ms": self.stopped, "frozen-ms": self.frozen}


@dataclass(slots=True)
class _Run:
    domain: libvirt.virDomain
    monitor: Monitor
    disks: Sequence[PlannedDisk]
    options: Mapping[str, DriverOptions]
    quiesce: str
    tops: Mapping[str, LiveTop] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    """target -> node of the overlay."""
    notes: list[str] = field(default_factory=list)
    frozen: float | None = None
    stalled: float = 0.0
    stopped: float | None = None


@dataclass(frozen=True, slots=True)
class Tops:
    """What QEMU said that the disks write to."""

    by_target: Mapping[str, LiveTop] = field(default_factory=dict)
    asked: float = -math.inf
    """When, on the monotonic clock."""

    def still_true(self, disks: Sequence[PlannedDisk]) -> bool:
        """Return whether it need not be asked again: what has been written stays so, what has not may be by now."""
        recent = time.monotonic() - self.asked < _FRESH
        return recent and all(disk.target in self.by_target and self.by_target[disk.target].settled for disk in disks)


def check_disks(domain: libvirt.virDomain, disks: Sequence[xml.Disk], volume_path: xml.VolumePath) -> Tops:
    """Accept the disks where QEMU writes to what the persistent XML says, and can be switched while it runs.

    Returns what QEMU says of them.

    Raises:
        DomainError: that is not so.
    """
    name = domain.name()
    tops = _ask(domain)
    written = _written(domain, {disk.target: [disk.path] for disk in disks if disk.path}, volume_path, tops.by_target)
    live = {disk.target: disk for disk in _live_disks(domain, volume_path)}
    for disk in disks:
        mine = live.get(disk.target)
        if mine is None:
            raise DomainError(name, f"disk {disk.target} is not plugged into the running guest: leave it out")
        if mine.refusal:
            raise DomainError(name, f"disk {disk.target} {mine.refusal} in the running guest: leave it out")
        if written.get(disk.target) != disk.path:
            reason = f"disk {disk.target}: the persistent XML names {disk.path}, but QEMU writes to another file"
            raise DomainError(name, f"{reason}: shut it down, or correct the XML")
        refuse_busy(name, tops.by_target[disk.target])
    return tops


def written_files(domain: libvirt.virDomain, candidates: Mapping[str, Sequence[Path]]) -> dict[str, Path]:
    """Return which of the candidate files of each target QEMU writes to; a target that writes to none is left out."""
    return _written(domain, candidates, None, _ask(domain).by_target)


def _ask(domain: libvirt.virDomain) -> Tops:
    asked = time.monotonic()
    return Tops(Monitor(domain).tops(), asked)


def _written(
    domain: libvirt.virDomain,
    candidates: Mapping[str, Sequence[Path]],
    volume_path: xml.VolumePath | None,
    tops: Mapping[str, LiveTop],
) -> dict[str, Path]:
    live = {disk.target: disk.path for disk in _live_disks(domain, volume_path)}
    found = {}
    for target, paths in candidates.items():
        top = tops.get(target)
        for path in paths:
            if top is not None and (top.is_file(path) or (top.by_libvirt and live.get(target) == path)):
                found[target] = path
    return found


def _live_disks(domain: libvirt.virDomain, volume_path: xml.VolumePath | None) -> list[xml.Disk]:
    with libvirt_errors(domain.name(), "read its live XML"):
        return xml.list_disks(domain.XMLDesc(0), volume_path)


def switch(domain: libvirt.virDomain, disks: Sequence[PlannedDisk], quiesce: str, tops: Tops) -> Pause:
    """Switch the running guest to the overlays, which are durable and named by the persistent XML.

    `tops` is what `check_disks` returned.

    Raises:
        DomainError: it cannot be done; the guest continues as before, and QEMU does not have the overlays.
    """
    run = _Run(domain, Monitor(domain), disks, _live_options(domain), quiesce)
    for _ in range(_TRIES):
        try:
            tops = tops if tops.still_true(disks) else _ask(domain)
            run.tops = tops.by_target
            _prepare(run)
            if _try(run):
                return Pause(run.stalled, run.stopped, run.frozen, tuple(run.notes))
        except BaseException:
            with contextlib.suppress(DomainError):  # QEMU may be gone
                if not _switched(run):
                    drop(run.monitor, disks)
            raise
        drop(run.monitor, disks)
    raise DomainError(domain.name(), "the CIDs of its disks keep changing: something else writes to them")


def drop(monitor: Monitor, disks: Sequence[PlannedDisk]) -> None:
    """Let QEMU forget the overlays."""
    for disk in disks:
        monitor.drop_overlay(disk.overlay)


def _switched(run: _Run) -> bool:
    """Return whether QEMU writes to the overlays, whatever its answer was."""
    tops = run.monitor.tops()
    return any(tops[disk.target].is_file(disk.overlay) for disk in run.disks if disk.target in tops)


def _prepare(run: _Run) -> None:
    """Do all that can be done while the guest runs: QEMU opens the overlays, which fit their bases as they are now."""
    for disk in run.disks:
        if _descriptor(disk.overlay).parent_cid != _descriptor(disk.frozen).cid:
            follow_cid(disk.overlay, disk.frozen)
    _add(run)
    for disk in run.disks:
        _flush(disk.frozen)  # what is on its way to the disk already, the guest need not wait for


def _add(run: _Run) -> None:
    for disk in run.disks:
        run.nodes[disk.target] = run.monitor.add_overlay(disk.overlay, run.options[disk.target])


def _try(run: _Run) -> bool:
    """Do it, or return False where a CID is not what the overlay was made for."""
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": run.tops[d.target].node, "overlay": run.nodes[d.target]}}
        for d in run.disks
    ]
    settled = all(run.tops[disk.target].settled for disk in run.disks)  # before the CIDs were compared: they stay
    with _quiesced(run), contextlib.nullcontext() if settled else _stopped(run):
        if not settled and not _fits(run):
            return False
        started = time.perf_counter()
        run.monitor.execute("transaction", actions=actions)
        run.stalled = _milliseconds(started)
    return True


def _fits(run: _Run) -> bool:
    return all(_descriptor(disk.overlay).parent_cid == _descriptor(disk.frozen).cid for disk in run.disks)


def follow_cid(overlay: Path, base: Path) -> None:
    """Give an overlay that is empty, and open nowhere, the CID that its base has now."""
    below = _descriptor(base)
    link = open_link(overlay, opener=open_posix, writable=True, resolver=confined())
    try:
        link.write_descriptor(fitting_parent(link.descriptor, below))
    finally:
        link.close()


def _descriptor(path: Path) -> Descriptor:
    file = PosixFile.open(path)  # without a lock: QEMU has it
    try:
        return read_descriptor(file)[0]
    finally:
        file.close()


@contextlib.contextmanager
def _stopped(run: _Run) -> Iterator[None]:
    """Hold the vCPUs for the length of the block, unless they stand still already."""
    if not run.monitor.execute("query-status")["running"]:
        yield
        return
    started = time.perf_counter()
    run.monitor.execute("stop")
    try:
        yield
    finally:
        run.monitor.execute("cont")
        run.stopped = _milliseconds(started)


@contextlib.contextmanager
def _quiesced(run: _Run) -> Iterator[None]:
    started = time.perf_counter()
    held = False
    try:
        with frozen(run.domain, run.quiesce, run.notes) as held:
            yield
    finally:
        if held:
            run.frozen = _milliseconds(started)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _live_options(domain: libvirt.virDomain) -> dict[str, DriverOptions]:
    with libvirt_errors(domain.name(), "read its live XML"):
        return read_options(domain.XMLDesc(0))


def _milliseconds(started: float) -> float:
    return (time.perf_counter() - started) * 1000
