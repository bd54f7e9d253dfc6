"""The server: who may connect, which exports there are, and a thread for each client."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from qemu_vmdk_snap import Link, log
from qemu_vmdk_snap.errors import InvalidRequest, VmdkSnapError
from qemu_vmdk_snap.serve.disk.disk import Disk
from qemu_vmdk_snap.serve.disk.opening import TopNote, open_served
from qemu_vmdk_snap.serve.disk.stack import Stack
from qemu_vmdk_snap.serve.nbd.connection import Connection
from qemu_vmdk_snap.serve.nbd.handshake import Dropped, shake_hands
from qemu_vmdk_snap.serve.nbd.statistics import Statistics

_log = log.of(__name__)

MOST_CLIENTS: Final = 128
_HANDSHAKE_SECONDS: Final = 30.0
_GOODBYE_SECONDS: Final = 3.0
"""For clients to read their last answers, when the server ends."""
_SEND_BUFFER: Final = 4 << 20
_SO_SNDBUFFORCE: Final = 32


class Server:
    """A served chain with its clients. `close` belongs to the thread that made it."""

    def __init__(
        self,
        image: Path,
        *,
        read_only: bool = False,
        trusted_dirs: Sequence[Path | str] = (),
        exports: Mapping[str, Path] | None = None,
        note: TopNote | None = None,
    ) -> None:
        self.trusted_dirs = tuple(trusted_dirs)
        self.read_only = read_only
        self._note = note
        self._merging: Path | None = None
        self.statistics = Statistics()
        self.stop_asked = threading.Event()
        self.hidden: frozenset[Link] = frozenset()
        """Links that nobody may open as an export: they are about to go."""
        self._others: dict[str, Stack] = {}
        self._clients: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._guard = threading.Lock()
        written = note.written() if note is not None else []
        links = open_served(image, read_only=read_only, trusted_dirs=trusted_dirs, written=written)
        self.stack = Stack(links, read_only=read_only)
        try:
            for name, path in (exports or {}).items():
                self._require_new(name)
                links = open_served(path, read_only=True, trusted_dirs=trusted_dirs)
                self._others[name] = Stack(links, read_only=True)
        except BaseException:
            self._close_stacks()
            raise

    # --- exports ------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return the name of each export: the top, each link below it, then the others."""
        return list(dict.fromkeys(["", *map(_name, self._frozen()), *self._others]))

    def _require_new(self, name: str) -> None:
        if name in self.names():
            raise InvalidRequest(f"export {name!r}", "is the name of another export")

    def _frozen(self) -> list[Link]:
        return [link for link in self.stack.links[1:] if link not in self.hidden]

    def open(self, name: str) -> Disk | None:
        """Return the export of that name, None where there is none."""
        if name in self._others:
            other = self._others[name]
            with other.turn:
                return Disk.of(other)
        with self.stack.turn:
            if not name:
                return Disk.of(self.stack)
            link = next((link for link in self._frozen() if _name(link) == name), None)
            return None if link is None else Disk.of(self.stack, link)

    def snapshots_below(self, disk: Disk) -> list[str]:
        """Return the names of the links below that of the export: what may have changed since they were frozen."""
        return [_name(link) for link in disk.stack.links[disk.places.depth + 1 :]]

    def remember_top(self, top: Path) -> None:
        """Note, durably, that `top` is served from now on, once it exists: for the server that follows this one."""
        if self._note is not None:
            self._note.store(top, Path(self.stack.top.path), self._merging)

    def remember_merge(self, written: Path | None) -> None:
        """Note, durably, which link a merge writes: should the server be killed, it may be left with leaks."""
        self._merging = written
        self.remember_top(Path(self.stack.top.path))

    # --- clients ------------------------------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """How many clients have chosen the default export; counted before they hear that they have it."""
        return Disk.users(self.stack)

    def accept(self, listener: socket.socket) -> None:
        """Take clients until the listener is closed."""
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._guard:
                if len(self._clients) >= MOST_CLIENTS or self.stop_asked.is_set():
                    client.close()
                    continue
                self._clients.add(client)
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                self._threads.add(thread)
                thread.start()  # here: `close` joins what is in the set

    def _serve(self, client: socket.socket) -> None:
        disk: Disk | None = None
        try:
            for option in (socket.SO_SNDBUF, _SO_SNDBUFFORCE):  # the second goes beyond the limit, where it is allowed
                with contextlib.suppress(OSError):
                    client.setsockopt(socket.SOL_SOCKET, option, _SEND_BUFFER)
            client.settimeout(_HANDSHAKE_SECONDS)
            agreed = shake_hands(client, self)
            if agreed is not None:
                disk = agreed.disk
                client.settimeout(None)
                Connection(client, agreed, self.statistics).run()
        except (Dropped, OSError, VmdkSnapError) as error:
            _log.info("a client is gone: %s", error)
        finally:
            if disk is not None:
                disk.close()  # first: who sees the connection closed is no longer counted
            with self._guard:
                self._clients.discard(client)
                self._threads.discard(threading.current_thread())
            client.close()

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let every client's batch end, flush, and close the files."""
        self.stop_asked.set()
        with self.stack.pause():
            self.stack.flush()
            with self._guard:
                for client in self._clients:
                    with contextlib.suppress(OSError):
                        client.shutdown(socket.SHUT_RD)
        deadline = time.monotonic() + _GOODBYE_SECONDS
        with self._guard:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self.stack.pause():
            self._close_stacks()

    def _close_stacks(self) -> None:
        with contextlib.ExitStack() as stack:
            for one in [self.stack, *self._others.values()]:
                stack.callback(one.close)


def _name(link: Link) -> str:
    return Path(link.path).name
