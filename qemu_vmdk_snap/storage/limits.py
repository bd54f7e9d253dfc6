"""The number of files that may be open at once: a split disk of 2 TiB has more than a thousand."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

from qemu_vmdk_snap.light import Final

_SPARE: Final = 256
"""Reserve for other files: the other links of a chain, sockets, logs."""


def allow_open_files(count: int) -> None:
    """Raise this process's soft limit so that `count` more files may be open, as far as the hard limit lets it.

    If the limit cannot be raised, the open that exceeds it reports the error.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + sum(1 for _ in Path("/proc/self/fd").iterdir()) + _SPARE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    reachable = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, reachable), hard))
