"""Nodes of ours that a running QEMU keeps open though no device uses them: what `virsh detach-disk` leaves.

libvirt takes the device away and does not know of the overlays above its own node, so these, and what they are backed
by, stay open and locked until the guest ends.
"""

from __future__ import annotations

import contextlib

from qemu_vmdk_snap.domain.qemu.graph import PREFIX, BlockGraph
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.errors import DomainError


def unused_nodes(graph: BlockGraph) -> list[str]:
    """Return our nodes that nothing uses, and what is open for them alone; each before what it is backed by."""
    ours = [name for name in graph.children if name.startswith(PREFIX) and name not in graph.used]
    nodes = frozenset().union(*map(graph.below, ours)) - graph.used
    return sorted(nodes, key=lambda name: (-len(graph.below(name)), name))


def release_unused(monitor: Monitor) -> list[str]:
    """Close these nodes, and return those that are gone. No command on the domain may be at work.

    Raises:
        DomainError: QEMU cannot be asked.
    """
    closed = []
    for name in unused_nodes(monitor.edges()):
        with contextlib.suppress(DomainError):
            monitor.execute("blockdev-del", node_name=name)
            closed.append(name)
    return closed
