"""Merge the active overlay of a running guest into the file below it, which the guest then goes on in.

QEMU's commit of the active layer. Of VMDK it is safe only where QEMU wrote to the lower file since it opened it: then
it does not change its CID any more, and the overlay above fits at every moment. Elsewhere its first write into the
lower file gives that a new CID (seen on 7.2), while the overlay on the disk still names the old one: a guest that then
ends, or a merge that is given up, leaves a chain whose reads QEMU itself refuses after the next start. The overlay
could be told the new CID only by writing to it behind QEMU's lock; so such a merge waits until the guest is shut off.
In order:

    1  the data goes down while the guest runs; what it writes meanwhile goes to both
    2  the vCPUs stop, until both files hold the same
    3  the persistent XML, which now names the lower file: whoever starts the guest from it finds all that was written
    4  QEMU lets go of the overlay; the vCPUs go on
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qemu_vmdk_snap.domain.qemu.graph import node_name
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.errors import DomainError

if TYPE_CHECKING:
    import libvirt

_POLL: Final = 0.01
_STUCK: Final = 60.0
"""Seconds without any progress after which a job is given up."""


def written_here(domain: libvirt.virDomain) -> dict[str, str]:
    """Return the nodes that QEMU has written to since it opened them, and the file name that it knows each by."""
    monitor = Monitor(domain)
    stats = monitor.execute("query-blockstats", query_nodes=True)
    written = {one["node-name"] for one in stats if one["stats"]["wr_highest_offset"] > 0}
    graph = monitor.graph()
    return {name: graph.file_of(name) for name in written if name in graph.nodes}


def node_of(path: Path, nodes: Mapping[str, str]) -> str | None:
    """Return which of the nodes is the image at `path`: by our name for it, or as libvirt opened it."""
    if path.exists() and node_name(path) in nodes:
        return node_name(path)
    return next((name for name, file in nodes.items() if file == str(path) and name.endswith("-format")), None)


def merge_active(
    domain: libvirt.virDomain,
    merges: Iterable[tuple[str, Path, Path]],
    define: Callable[[], None],
    undefine: Callable[[], None],
) -> None:
    """Do the steps for each (target, overlay, lower file) whose overlay the guest writes to; then drop the overlays.

    `define` is step 3, and `undefine` takes it back where QEMU then did not go over. A job that a dead command has
    begun is gone on with.

    Raises:
        DomainError: QEMU cannot; the guest goes on in its overlays.
    """
    monitor = Monitor(domain)
    tops = monitor.tops()
    merges = list(merges)
    wanted = [(t, overlay, base) for t, overlay, base in merges if t in tops and tops[t].is_file(overlay)]
    done = [_job(target) for target, *_ in merges if target not in {t for t, *_ in wanted}]
    jobs = [_job(target) for target, _, _ in wanted]
    try:
        _begin(domain, monitor, wanted)
        _wait(monitor, jobs, ready=True)
        _finish(monitor, jobs, define)
    except BaseException:
        _take_back(monitor, wanted, undefine)
        raise
    _dismiss(monitor, [job for job in done if job in _jobs(monitor)])
    for _, overlay, _ in merges:
        if overlay.exists():
            monitor.drop_overlay(overlay)


def _take_back(monitor: Monitor, wanted: Iterable[tuple[str, Path, Path]], undefine: Callable[[], None]) -> None:
    with contextlib.suppress(DomainError):  # QEMU may be gone: it stood still when the XML changed, and nothing is lost
        tops = monitor.tops()
        if not all(tops[target].is_file(overlay) for target, overlay, _ in wanted):
            return
        undefine()
        for target, _, _ in wanted:
            _cancel(monitor, _job(target))


def _job(target: str) -> str:
    return f"qvs-merge-{target}"


def _jobs(monitor: Monitor) -> dict[str, dict[str, Any]]:
    return {job["id"]: job for job in monitor.execute("query-jobs")}


def _begin(domain: libvirt.virDomain, monitor: Monitor, wanted: Iterable[tuple[str, Path, Path]]) -> None:
    there, nodes = _jobs(monitor), written_here(domain)
    for target, overlay, base in wanted:
        base_node = node_of(base, nodes)
        if base_node is None:
            raise DomainError(domain.name(), f"disk {target}: QEMU has not written {base} since it opened it")
        if _job(target) not in there:
            monitor.execute(
                "block-commit",
                job_id=_job(target),
                device=node_name(overlay),
                base_node=base_node,
                auto_finalize=True,
                auto_dismiss=False,
            )


def _finish(monitor: Monitor, jobs: list[str], define: Callable[[], None]) -> None:
    running = jobs and monitor.execute("query-status")["running"]
    if running:
        monitor.execute("stop")
    try:
        _wait(monitor, jobs, ready=True, drained=True)
        define()
        for job in jobs:
            monitor.execute("job-complete", id=job)
        _dismiss(monitor, jobs)
    finally:
        if running:
            monitor.execute("cont")


def _dismiss(monitor: Monitor, jobs: list[str]) -> None:
    _wait(monitor, jobs, ready=False)
    for job in jobs:
        monitor.execute("job-dismiss", id=job)


def _wait(monitor: Monitor, jobs: list[str], *, ready: bool, drained: bool = False) -> None:
    """Return when every job is ready (and has nothing left to copy), or has come to its good end."""
    last, since = -1, time.monotonic()
    while True:
        there = _jobs(monitor)
        mine = [there[job] for job in jobs]
        for job in mine:
            if job.get("error") or (ready and job["status"] not in ("created", "running", "ready")):
                raise DomainError(job["id"], f"QEMU cannot merge: {job.get('error', job['status'])}")
        state = "ready" if ready else "concluded"
        if all(job["status"] == state for job in mine) and not (drained and any(map(_left, mine))):
            return
        done = sum(job["current-progress"] for job in mine)
        if done != last:
            last, since = done, time.monotonic()
        elif time.monotonic() - since > _STUCK:
            raise DomainError(", ".join(jobs), f"QEMU has not gone on merging for {_STUCK:.0f} s")
        time.sleep(_POLL)


def _left(job: dict[str, Any]) -> bool:
    return bool(job["current-progress"] < job["total-progress"])


def _cancel(monitor: Monitor, job: str) -> None:
    """End the job without going over; the overlay still has everything."""
    with contextlib.suppress(DomainError):
        if job in _jobs(monitor):
            monitor.execute("block-job-cancel", device=job, force=True)
            deadline = time.monotonic() + _STUCK
            while _jobs(monitor)[job]["status"] != "concluded" and time.monotonic() < deadline:
                time.sleep(_POLL)
            monitor.execute("job-dismiss", id=job)
