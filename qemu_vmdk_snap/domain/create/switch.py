"""Let a running guest go over to its overlays: disks that QEMU writes, disks that servers write, or some of each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qemu_vmdk_snap.domain.create.plan import Plan
from qemu_vmdk_snap.domain.qemu.agent import frozen
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.qemu.switch import Pause, switch
from qemu_vmdk_snap.domain.served.hold import Holds

if TYPE_CHECKING:
    import libvirt


def switch_all(domain: libvirt.virDomain, plan: Plan, holds: Holds) -> Pause:
    """Let the guest go on in the overlays, which are durable and named by the persistent XML.

    With disks of both kinds its vCPUs stand still meanwhile: QEMU waits for all requests when it goes over, also for
    those that a held server does not answer.

    Raises:
        DomainError: it cannot be done; the guest goes on as before.
    """
    if not plan.served:
        return switch(domain, plan.disks, plan.quiesce, plan.tops)
    notes: list[str] = []
    stopped = thawed = None
    began = time.perf_counter()
    with frozen(domain, plan.quiesce, notes) as held:
        with _stopped(domain, wanted=bool(plan.direct)) as stopping:
            started = holds.switch()
            if plan.direct:
                notes += switch(domain, plan.direct, "no", plan.tops).notes
            holds.release()
            stalled = (time.perf_counter() - started) * 1000
        if plan.direct:
            stopped = (time.perf_counter() - stopping) * 1000
    if held:
        thawed = (time.perf_counter() - began) * 1000
    return Pause(stalled, stopped, thawed, tuple(notes))


@contextlib.contextmanager
def _stopped(domain: libvirt.virDomain, *, wanted: bool) -> Iterator[float]:
    """Hold the vCPUs for the length of the block, unless they stand still already; give when that began."""
    started = time.perf_counter()
    monitor = Monitor(domain) if wanted else None
    if monitor is None or not monitor.execute("query-status")["running"]:
        yield started
        return
    monitor.execute("stop")
    try:
        yield started
    finally:
        monitor.execute("cont")
