"""QEMU's monitor (QMP) over a connected socket: commands, events, and a transcript of both directions.

The few things needed here: one thread, no reconnecting. Source: QEMU's docs/interop/qmp-spec.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qemu_vmdk_snap.errors import GuestError

__tracebackhide__ = True

_READ: Final = 1 << 16
SECONDS: Final = 30.0


class Qmp:
    """The monitor of one QEMU; call it for a command and its answer."""

    def __init__(self, channel: socket.socket, guest: str, transcript: Path) -> None:
        """Negotiate over `channel`, which is closed with this; all messages are also written to `transcript`."""
        self._channel = channel
        self._guest = guest
        self._log = transcript.open("wb", buffering=0)
        self._rest = b""
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._unlogged: set[int] = set()
        self.closed = False
        self.events: list[dict[str, Any]] = []
        """Every event so far, the oldest first."""
        # QEMU greets first, and reads what was sent before that all the same.
        self.send("qmp_capabilities")

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is something for `feed`."""
        return self._channel.fileno()

    def __call__(self, command: str, arguments: Mapping[str, object] | None = None, seconds: float = SECONDS) -> Any:  # noqa: ANN401 - whatever the command returns
        """Return the answer to `command`.

        Raises:
            GuestError: QEMU refuses the command, has ended, or does not answer in `seconds`.
        """
        number = self.send(command, arguments)
        until = time.monotonic() + seconds
        while number not in self._answers:
            if self.closed:
                raise GuestError(self._guest, f"QMP {command}: QEMU has closed its monitor")
            left = until - time.monotonic()
            if left <= 0:
                raise GuestError(self._guest, f"QMP {command}: no answer in {seconds:g} s")
            if select.select([self._channel], [], [], left)[0]:
                self.feed()
        answer = self._answers.pop(number)
        if "error" in answer:
            raise GuestError(self._guest, f"QMP {command}: {answer['error'].get('desc', answer['error'])}")
        return answer["return"]

    def monitor(self, line: str, seconds: float = SECONDS) -> str:
        """Return what the human monitor prints for `line`: `info registers`."""
        return str(self("human-monitor-command", {"command-line": line}, seconds))

    def send(self, command: str, arguments: Mapping[str, object] | None = None, *, log: bool = True) -> int:
        """Send a command without waiting, and return the number by which `take` knows its answer."""
        self._number += 1
        message: dict[str, object] = {"execute": command, "id": self._number}
        if arguments:
            message["arguments"] = dict(arguments)
        line = json.dumps(message).encode() + b"\n"
        if log:
            self._log.write(b"-> " + line)
        else:
            self._unlogged.add(self._number)
        try:
            self._channel.sendall(line)
        except OSError:
            self.closed = True
        return self._number

    def take(self, number: int) -> Any:  # noqa: ANN401 - whatever the command returns
        """Return the answer to the command of this number, or None when it has not come or is an error."""
        return self._answers.pop(number, {}).get("return")

    def feed(self) -> None:
        """Read what has come in."""
        try:
            data = self._channel.recv(_READ)
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message.get("id") not in self._unlogged:
                self._log.write(b"<- " + line.rstrip() + b"\n")
            if "event" in message:
                self.events.append(message)
            elif "id" in message:
                self._answers[message["id"]] = message

    def drain(self) -> None:
        """Read all that has come in, and return without waiting for more."""
        while not self.closed and select.select([self._channel], [], [], 0)[0]:
            self.feed()

    def close(self) -> None:
        """Let go of the monitor."""
        with contextlib.suppress(OSError):
            self._channel.close()
        self._log.close()
        self.closed = True
