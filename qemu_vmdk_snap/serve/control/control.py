"""The control socket: JSON objects, one a line, answered one a line, in order.

    {"execute": "snapshot", "arguments": {"overlay": "/images/a-2.vmdk"}, "id": 1}
    {"return": {"frozen": "/images/a.vmdk", "top": "/images/a-2.vmdk", "pause_seconds": 0.0031}, "id": 1}

An error is the object that `--output=json` prints, without the exit status. docs/served-disks.md lists the commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

from qemu_vmdk_snap import log
from qemu_vmdk_snap.errors import InvalidRequest, VmdkSnapError
from qemu_vmdk_snap.serve.control.arguments import Arguments
from qemu_vmdk_snap.serve.control.merge import Merger
from qemu_vmdk_snap.serve.control.switch import Holder, Switcher
from qemu_vmdk_snap.serve.server import Server

_log = log.of(__name__)

_LONGEST_LINE: Final = 64 << 10
_MOST_CLIENTS: Final = 32

Command = Callable[[Arguments, Holder], dict[str, Any]]


class Control:
    """The commands of a server, and the threads of those who give them."""

    def __init__(self, server: Server, describe: Callable[[Exception], dict[str, object]]) -> None:
        """Take the server, and what makes an object of an error."""
        self._server, self._describe = server, describe
        self._switcher = Switcher(server)
        self._merger = Merger(server, self._switcher)
        self._places = threading.Semaphore(_MOST_CLIENTS)
        self._ends = False
        """Whether a client has asked for the end."""
        self._commands: dict[str, Command] = {
            "status": self._status,
            "statistics": lambda arguments, holder: self._server.statistics.as_dict(),
            "flush": self._flush,
            "stop": self._stop,
            **self._switcher.commands(),
            **self._merger.commands(),
        }

    def accept(self, listener: socket.socket) -> None:
        """Take clients until the listener is closed."""
        while True:
            self._places.acquire()  # one more waits until another has gone
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def end(self) -> None:
        """Take back what is prepared or held, then stop a merge: the server ends."""
        self._switcher.end()
        self._merger.end()

    def _serve(self, client: socket.socket) -> None:
        holder = Holder()
        try:
            with client, client.makefile("rb") as lines:
                while line := lines.readline(_LONGEST_LINE):
                    if not line.endswith(b"\n"):
                        break
                    if line.strip():
                        self._reply(client, self._answer(line, holder))
        except OSError as error:
            _log.info("a control client is gone: %s", error)
        finally:
            self._switcher.let_go(holder)
            self._places.release()

    def _reply(self, client: socket.socket, answer: dict[str, Any]) -> None:
        try:
            client.sendall(json.dumps(answer).encode() + b"\n")
        finally:
            if self._ends:  # after the answer to it, which the process would not live to send
                self._server.stop_asked.set()

    def _answer(self, line: bytes, holder: Holder) -> dict[str, Any]:
        ident: dict[str, Any] = {}
        try:
            request = _parsed(line)
            if "id" in request:
                ident = {"id": request["id"]}
            name, arguments = request.get("execute"), request.get("arguments", {})
            command = self._commands.get(name) if isinstance(name, str) else None
            if command is None or not isinstance(arguments, dict):
                raise InvalidRequest("execute", f"no command {name!r} (known: {', '.join(sorted(self._commands))})")
            return {"return": command(arguments, holder), **ident}
        except (VmdkSnapError, OSError) as error:
            return {"error": self._describe(error), **ident}

    def _status(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        server, stack = self._server, self._server.stack
        return {
            "pid": os.getpid(),
            "top": str(stack.top.path),
            "chain": [str(link.path) for link in stack.links],
            "size": int(stack.top.capacity),
            "read_only": server.read_only,
            "connections": server.connections,
            "clean": not stack.dirty,
            "held": self._switcher.held,
            "merge": self._merger.status(),
            "exports": server.names(),
            "statistics": server.statistics.as_dict(),
        }

    def _flush(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        self._switcher.require_free()
        with self._server.stack.pause():
            self._server.stack.flush()
        return {}

    def _stop(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        self._ends = True
        return {}


def _parsed(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        request = json.loads(line)
        if isinstance(request, dict):
            return request
    raise InvalidRequest("request", "must be a JSON object on one line")
