"""A server as its users run it: a process, its two sockets, and how to end it well or badly."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class ControlError(Exception):
    """What the control socket answered instead of a result."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.code = error["code"]


class Control:
    """One connection of the control socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")

    def __call__(self, command: str, **arguments: object) -> dict[str, Any]:
        line = json.dumps({"execute": command, "arguments": arguments, "id": 7})
        self._socket.sendall(line.encode() + b"\n")
        said = self._lines.readline()
        assert said, f"the server has ended before it answered {command}"
        answer = json.loads(said)
        assert answer["id"] == 7
        if "error" in answer:
            raise ControlError(answer["error"])
        return dict(answer["return"])

    def raw(self, line: bytes) -> dict[str, Any]:
        self._socket.sendall(line)
        return dict(json.loads(self._lines.readline()))

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Served:
    """A running server."""

    def __init__(self, image: Path, path: Path, *words: str | Path) -> None:
        self.path = path
        command = [sys.executable, "-m", "qemu_vmdk_snap", "serve", "-k", str(path), *map(str, words), str(image)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline().decode()
        if not self.ready:
            self.process.wait(60)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def export(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.path}"

    def control(self, command: str, **arguments: object) -> dict[str, Any]:
        connection = Control(self.path.with_name(self.path.name + ".control"))
        try:
            return connection(command, **arguments)
        finally:
            connection.close()

    def connect_control(self) -> Control:
        return Control(self.path.with_name(self.path.name + ".control"))

    def until_left(self, clients: int = 0) -> None:
        """Wait until it has no more clients than that: qemu-io, for one, ends without waiting for the server."""
        deadline = time.monotonic() + 60
        while (connected := self.control("status")["connections"]) > clients:
            assert time.monotonic() < deadline, f"{connected} clients are connected"
            time.sleep(0.01)

    def stop(self) -> str:
        """End it as systemd does; return what it said on standard error."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors.decode()
        return errors.decode()

    def kill(self) -> None:
        """End it as the kernel does when memory is short."""
        self.process.kill()
        self.process.communicate(timeout=60)

    def close(self) -> None:
        """Let go of its pipes."""
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def memory(self) -> int:
        """Return the bytes of memory that it has resident."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def serving(image: Path, folder: Path, *words: str | Path) -> Iterator[Served]:
    """Serve the image on a socket in `folder` for the block; a server that still runs is ended well."""
    served = Served(image, folder / "s", *words)
    try:
        assert served.ready, served.process.communicate(timeout=60)[1].decode()
        yield served
        if served.process.poll() is None:
            served.stop()
    finally:
        if served.process.poll() is None:
            served.kill()
        served.close()


def refusal(image: Path, path: Path, *words: str | Path) -> tuple[int, str]:
    """Return the exit status and the one line of a server that does not start."""
    command = [sys.executable, "-m", "qemu_vmdk_snap", "serve", "-k", str(path), *map(str, words), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stdout
    return done.returncode, done.stderr


def io(uri: str, *commands: str) -> str:
    """Run qemu-io on an export; return what it said, which must be no failure."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "raw", *words, uri], check=True, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert "failed" not in said, said
    assert "error" not in said, said
    return said
