"""The keeper of a domain's servers: a process that starts one again when it dies, and lets the guest run on.

A guest whose server dies is paused by QEMU at its next request (`error_policy='stop'`), with nothing lost. Once the
disk is served again it has to be resumed, some times in a row where several requests wait (seen on QEMU 7.2: up to
four). For an in-process libvirt that only the process itself can do.

The keeper ends with its last server. Killed itself, it leaves the servers to run without one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from qemu_vmdk_snap.domain.served.server import READY

_STARTING: Final = 60.0
"""Seconds until a server is ready: it may have to put right what a power cut has left."""

_MOST_DEATHS: Final = 5
_DEATHS_WITHIN: Final = 60.0
"""Seconds. A server that keeps dying is given up: something is wrong that a restart does not cure."""


class Server(NamedTuple):
    """A server that was started."""

    target: str
    process: subprocess.Popen[bytes]
    log: Path
    said: int
    """Bytes of the log before it was started."""


def main() -> None:
    """Do the task of the first argument; see `server._launch`."""
    task = json.loads(sys.argv[1])
    if os.fork():
        os._exit(0)  # whoever started us waits for this one alone
    servers: dict[int, Server] = {}
    try:
        for target, disk in task["disks"].items():
            started = _spawn(target, disk["words"], disk["log"])
            servers[started.process.pid] = started
        for one in servers.values():  # they start side by side
            _await(one)
    except (OSError, RuntimeError) as error:
        for one in servers.values():
            with contextlib.suppress(ProcessLookupError):
                one.process.terminate()
        for one in servers.values():
            one.process.wait()
        os.write(1, str(error).encode())
        os._exit(1)
    os.write(1, READY)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    _keep(task, servers)


def _keep(task: dict[str, Any], servers: dict[int, Server]) -> None:
    deaths: list[float] = []
    while servers:
        pid, status = os.wait()
        server = servers.pop(pid, None)
        if server is None:
            continue
        code = os.waitstatus_to_exitcode(status)
        server.process.returncode = code
        disk = task["disks"][server.target]
        if code == 0:
            continue  # it was asked to end
        now = time.monotonic()
        deaths = [*(then for then in deaths if now - then < _DEATHS_WITHIN), now]
        _note(disk["log"], f"the server of {server.target} has died ({code})")
        if len(deaths) > _MOST_DEATHS:
            _note(disk["log"], f"it has died {len(deaths)} times in {_DEATHS_WITHIN:g} s: it is not started again")
            continue
        try:
            # The old words: the server itself has noted which top it had gone over to.
            again = _start(server.target, disk["words"], disk["log"])
        except (OSError, RuntimeError) as error:
            _note(disk["log"], f"it cannot be started again: {error}")
            continue
        servers[again.process.pid] = again
        _note(disk["log"], f"the server of {server.target} is process {again.process.pid} now")
        _resume(task, disk["log"])


def _start(target: str, words: list[str], log: str) -> Server:
    """Start a server and return once it is ready.

    Raises:
        RuntimeError: it is not; the last line that it said.
    """
    server = _spawn(target, words, log)
    _await(server)
    return server


def _spawn(target: str, words: list[str], log: str) -> Server:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        said = os.fstat(fd).st_size
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=fd)
    finally:
        os.close(fd)
    return Server(target, process, Path(log), said)


def _await(server: Server) -> None:
    assert server.process.stdout is not None
    if _ready(server.process.stdout):
        server.process.stdout.close()
        return
    server.process.kill()
    server.process.wait()
    with server.log.open("rb") as said:
        said.seek(server.said)
        lines = said.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")
    raise RuntimeError(f"disk {server.target}: {last.removeprefix('qemu-vmdk-snap: ')}")


def _ready(stdout: IO[bytes]) -> bool:
    said, deadline = b"", time.monotonic() + _STARTING
    while b"\n" not in said:
        readable, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
        more = os.read(stdout.fileno(), 4096) if readable else b""
        if not more:
            return False
        said += more
    return True


def _resume(task: dict[str, Any], log: str) -> None:
    from qemu_vmdk_snap.domain.connect import connection, embed_root, find_domain
    from qemu_vmdk_snap.domain.served.guest import resume_after_error
    from qemu_vmdk_snap.errors import VmdkSnapError

    if embed_root(task["uri"]) is not None:
        return
    try:
        with connection(task["uri"]) as conn, contextlib.suppress(OSError):
            resumes = resume_after_error(find_domain(conn, task["domain"]))
            _note(log, f"the guest was resumed {resumes} times")
    except VmdkSnapError as error:
        _note(log, f"the guest cannot be resumed: {error}")


def _note(log: str, line: str) -> None:
    with contextlib.suppress(OSError), Path(log).open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} keeper: {line}\n")
