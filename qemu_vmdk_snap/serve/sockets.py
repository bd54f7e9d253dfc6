"""The sockets that a server listens on: its own, made where nobody listens, or those that systemd hands over."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.errors import InvalidRequest

LONGEST: Final = 107
"""Bytes of a path that a Unix socket can have."""
_FIRST_PASSED: Final = 3
_BACKLOG: Final = 64
_PATIENCE: Final = 10.0
"""Seconds for which whoever else begins to listen in the folder is waited for."""


def listen(path: Path, *, mode: int, owner: tuple[int, int] | None = None) -> socket.socket:
    """Return a socket that listens at `path`; one that a dead server left there is replaced.

    Raises:
        InvalidRequest: the path is too long, another kind of file is there, or another server listens.
        OSError: the system refused.
    """
    if len(os.fsencode(path)) > LONGEST:
        raise InvalidRequest(path, f"a socket's path has at most {LONGEST} bytes")
    with _alone_in(path.parent):
        _clear(path)
        return _listener(path, mode=mode, owner=owner)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other servers from beginning to listen in the folder: two would take each other's socket for a dead one's.

    A name in the abstract namespace is the lock: only one process can have it, and it ends with that. Somebody who
    keeps it is not waited for without end.
    """
    facts = folder.stat()
    name = f"\0qemu-vmdk-snap listens in {facts.st_dev:x}:{facts.st_ino:x}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                lock.bind(name)
                break
            time.sleep(0.01)
        yield


def _listener(path: Path, *, mode: int, owner: tuple[int, int] | None) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Nobody can connect before its mode is right: a name of its own, then the final one.
        draft = path.with_name(f".{os.getpid()}{path.suffix or '.s'}")
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        if len(os.fsencode(draft)) > LONGEST:
            draft = path
        before = os.umask(0o177)
        try:
            listener.bind(str(draft))
        finally:
            os.umask(before)
        if owner is not None:
            os.chown(draft, *owner)
        draft.chmod(mode)
        listener.listen(_BACKLOG)
        if draft != path:
            draft.rename(path)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, str(path)) from error
    return listener


def _clear(path: Path) -> None:
    """Remove the socket of a dead server; refuse that of a living one, and anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InvalidRequest(path, "is there, and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                raise
        else:
            raise InvalidRequest(path, "another server listens there")
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def passed() -> dict[str, socket.socket]:
    """Return the sockets that systemd passed to this process, by name; see sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, socket.socket] = {}
    for i in range(count):
        os.set_inheritable(_FIRST_PASSED + i, False)
        name = names[i] if i < len(names) and names[i] in ("nbd", "control") else ("nbd", "control")[min(i, 1)]
        found.setdefault(name, socket.socket(fileno=_FIRST_PASSED + i))
    return found


def remove(path: Path) -> None:
    """Remove the socket of this process."""
    with contextlib.suppress(OSError):
        path.unlink()
