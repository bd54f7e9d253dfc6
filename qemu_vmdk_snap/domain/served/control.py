"""The client of a server's control socket: JSON lines, one answer to each request."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from qemu_vmdk_snap.errors import DomainError

_log = logging.getLogger(__name__)
_PATIENCE: Final = 60.0
"""Seconds that an answer may take; a flush of a slow disk is part of some."""

_LOOK: Final = 10.0
"""Seconds after which a server that is there and does not answer counts as gone; a busy machine makes it late."""
_MAX_LINE: Final = 1 << 20


class NoServer(DomainError):
    """Nothing answers at the control socket."""


class Control:
    """A connection to the server of one disk."""

    def __init__(self, domain: str, path: Path, *, patience: float = _PATIENCE) -> None:
        """Connect.

        Raises:
            NoServer: nothing listens there.
        """
        self._domain, self._path = domain, path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(patience)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise NoServer(domain, f"its disk is not served: {path}: {error.strerror or error}") from error
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, command: str, /, **arguments: object) -> dict[str, Any]:
        """Return what the server answers; underscores in names of arguments stay.

        Raises:
            DomainError: it refuses; nothing was done.
            NoServer: it is gone: what it has done is not known.
        """
        request = {"execute": command, "arguments": arguments}
        _log.debug("domain %s: sent to %s: %s", self._domain, self._path, request)
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            line = self._lines.readline(_MAX_LINE)
            answer = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError) as error:
            raise NoServer(self._domain, f"the server at {self._path} gives no answer to {command}: {error}") from error
        if not isinstance(answer, dict):
            raise NoServer(self._domain, f"the server at {self._path} ended before it answered {command}")
        if "error" in answer:
            raise DomainError(self._domain, f"its server refuses {command}: {_reason(answer['error'])}")
        result = answer.get("return")
        return result if isinstance(result, dict) else {}

    def close(self) -> None:
        """Close the connection; a server that it holds goes on as before the hold."""
        with contextlib.suppress(OSError):
            self._lines.close()
        self._socket.close()


def status_of(domain: str, path: Path) -> dict[str, Any] | None:
    """Return the server's status; None where none answers."""
    try:
        with Control(domain, path, patience=_LOOK) as control:
            return control.ask("status")
    except NoServer:
        return None


@contextlib.contextmanager
def asked(domain: str, path: Path) -> Iterator[Control]:
    """Have a connection for the length of the block."""
    with Control(domain, path) as control:
        yield control


def _reason(error: object) -> str:
    if isinstance(error, dict):
        return " ".join(str(error.get("message") or error.get("desc") or error).split())
    return str(error)
