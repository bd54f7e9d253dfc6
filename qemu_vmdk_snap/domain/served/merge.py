"""Merge a frozen link of a served disk inside its server, while the guest writes."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Final

from qemu_vmdk_snap import OnProgress, Progress, log
from qemu_vmdk_snap.domain.served.control import Control
from qemu_vmdk_snap.domain.xml.served import ServedDisk
from qemu_vmdk_snap.errors import DomainError

_log = log.of(__name__)
_POLL: Final = 0.05
_STUCK: Final = 120.0
"""Seconds without any progress after which a job is given up."""
_PIECE: Final = 1 << 20
"""Bytes that a server may copy between two signs of progress."""


def merge_in_server(
    domain: str, disk: ServedDisk, frozen: Path, on_progress: OnProgress, *, bandwidth: int = 0
) -> None:
    """Let the server merge the link into the image above it; returns when that is done, or was done before.

    It copies at most `bandwidth` bytes a second; with 0 a new merge has no limit, and one that runs keeps its own.

    Raises:
        DomainError: the server cannot; it serves what it served before.
    """
    with Control(domain, disk.control) as control:
        said = control.ask("status")
        if not any(Path(link).resolve() == frozen.resolve() for link in said["chain"]):
            return
        merge = said.get("merge")
        if not merge or merge.get("state") != "running":  # one that a dead command has begun is gone on with
            _log.info("domain %s: disk %s: merging %s in its server", domain, disk.target, frozen)
            control.ask("merge", delete=str(frozen), bytes_per_second=bandwidth)
        elif bandwidth:
            control.ask("merge-speed", bytes_per_second=bandwidth)
        try:
            _wait(domain, disk, control, on_progress, _STUCK + (2 * _PIECE / bandwidth if bandwidth else 0.0))
        except BaseException:
            with contextlib.suppress(DomainError):
                control.ask("merge-cancel")
            raise


def _wait(domain: str, disk: ServedDisk, control: Control, on_progress: OnProgress, patience: float) -> None:
    last, since = -1, time.monotonic()
    while True:
        merge = control.ask("status").get("merge") or {}
        done, total = int(merge.get("done", 0)), int(merge.get("total", 0))
        if merge.get("state") == "done":
            return
        if merge.get("state") != "running":
            reason = merge.get("error") or merge.get("state") or "it does not know of it"
            reason = reason.get("message", reason) if isinstance(reason, dict) else reason
            raise DomainError(domain, f"disk {disk.target}: its server has not merged: {reason}")
        if done != last:
            last, since = done, time.monotonic()
            on_progress(Progress("copy", done, max(done, total)))
        elif time.monotonic() - since > patience:
            raise DomainError(domain, f"disk {disk.target}: its server has not gone on merging for {patience:.0f} s")
        time.sleep(_POLL)
