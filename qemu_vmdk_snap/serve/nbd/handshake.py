"""The fixed newstyle handshake: which export a client wants, and how it wants to be answered.

Everything that a client says here is bounded: an option longer than `_MOST_OPTION` bytes ends the connection, as does a
client that never comes to its choice.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from qemu_vmdk_snap.serve.disk.disk import Disk
from qemu_vmdk_snap.serve.nbd import wire

BASE_ALLOCATION: Final = "base:allocation"
SINCE: Final = "qemu-vmdk-snap:since:"
_BASE_ID: Final = 1
_FIRST_SINCE_ID: Final = 2

_MOST_OPTION: Final = 64 << 10
_MOST_OPTIONS: Final = 1000
_MOST_CONTEXTS: Final = 32


class Dropped(Exception):
    """The client has gone, or breaks the protocol: nothing more is said to it."""


class Exports(Protocol):
    """What a server offers."""

    def names(self) -> list[str]:
        """Return the name of each export, the default one first."""

    def open(self, name: str) -> Disk | None:
        """Return the export of that name, None where there is none."""

    def snapshots_below(self, disk: Disk) -> list[str]:
        """Return the names that `since` contexts of the export can have."""


@dataclass(slots=True)
class Agreed:
    """What a client and the server have agreed on."""

    disk: Disk
    structured: bool = False
    contexts: dict[int, str] = field(default_factory=dict)
    """Of the metadata contexts that are answered, number -> name, in the order of the answers."""


def receive(sock: socket.socket, length: int) -> bytes:
    """Return exactly `length` bytes from the client; raises Dropped where it has gone."""
    parts = bytearray()
    while len(parts) < length:
        part = sock.recv(length - len(parts))
        if not part:
            raise Dropped
        parts += part
    return bytes(parts)


def flags_of(disk: Disk) -> int:
    """Return the transmission flags of an export."""
    flags = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.SEND_FUA | wire.SEND_DF | wire.CAN_MULTI_CONN
    if disk.read_only:
        return flags | wire.READ_ONLY
    return flags | wire.SEND_TRIM | wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO


def shake_hands(sock: socket.socket, exports: Exports) -> Agreed | None:
    """Return what was agreed on, None where the client ends the handshake; raises Dropped or OSError."""
    return _Handshake(sock, exports).run()


class _Handshake:
    def __init__(self, sock: socket.socket, exports: Exports) -> None:
        self._sock, self._exports = sock, exports
        self._structured = False
        self._contexts: tuple[str, dict[int, str]] = ("", {})
        self._disk: Disk | None = None
        self._no_zeroes = False

    def run(self) -> Agreed | None:
        offered = wire.FIXED_NEWSTYLE | wire.NO_ZEROES
        self._sock.sendall(wire.GREETING.pack(wire.NBD_MAGIC, wire.OPTION_MAGIC, offered))
        (flags,) = struct.unpack(">I", receive(self._sock, 4))
        if flags & ~offered:
            raise Dropped
        self._no_zeroes = bool(flags & wire.NO_ZEROES)
        answers: dict[int, Callable[[bytes], bool]] = {
            wire.OPT_LIST: self._list,
            wire.OPT_INFO: self._info,
            wire.OPT_GO: self._go,
            wire.OPT_STRUCTURED_REPLY: self._structured_reply,
            wire.OPT_LIST_META_CONTEXT: lambda data: self._meta_context(data, chosen=False),
            wire.OPT_SET_META_CONTEXT: lambda data: self._meta_context(data, chosen=True),
        }
        for _ in range(_MOST_OPTIONS):
            magic, self._option, length = wire.OPTION.unpack(receive(self._sock, wire.OPTION.size))
            if magic != wire.OPTION_MAGIC or length > _MOST_OPTION:
                raise Dropped
            data = receive(self._sock, length)
            if self._option == wire.OPT_EXPORT_NAME:
                return self._export_name(data)
            if self._option == wire.OPT_ABORT:
                self._reply(wire.REP_ACK)
                return None
            answer = answers.get(self._option)
            if answer is None:
                self._reply(wire.REP_ERR_UNSUP)
            elif answer(data):
                return self._agreed()
        raise Dropped

    def _agreed(self) -> Agreed:
        assert self._disk is not None
        name, contexts = self._contexts
        same = self._structured and name == self._asked
        return Agreed(self._disk, self._structured, contexts if same else {})

    def _reply(self, kind: int, data: bytes = b"") -> None:
        head = wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, self._option, kind, len(data))
        self._sock.sendall(head + data)

    def _export_name(self, data: bytes) -> Agreed:
        self._asked = data.decode("utf-8", "replace")
        disk = self._exports.open(self._asked)
        if disk is None:
            raise Dropped  # this option has no way to say no
        answer = struct.pack(">QH", disk.capacity, flags_of(disk))
        try:
            self._sock.sendall(answer + (b"" if self._no_zeroes else bytes(124)))
        except BaseException:
            disk.close()
            raise
        self._disk = disk
        return self._agreed()

    def _list(self, data: bytes) -> bool:
        if data:
            self._reply(wire.REP_ERR_INVALID)
            return False
        for name in self._exports.names():
            raw = name.encode()
            self._reply(wire.REP_SERVER, struct.pack(">I", len(raw)) + raw)
        self._reply(wire.REP_ACK)
        return False

    def _go(self, data: bytes) -> bool:
        return self._info(data, go=True)

    def _info(self, data: bytes, *, go: bool = False) -> bool:
        """Describe an export; with `go` it is the choice."""
        try:
            (length,) = struct.unpack_from(">I", data)
            name = data[4 : 4 + length].decode()
            (count,) = struct.unpack_from(">H", data, 4 + length)
            wanted = struct.unpack_from(f">{count}H", data, 6 + length)
        except (struct.error, UnicodeDecodeError):
            self._reply(wire.REP_ERR_INVALID)
            return False
        if len(data) != 6 + length + 2 * count:
            self._reply(wire.REP_ERR_INVALID)
            return False
        disk = self._exports.open(name)
        if disk is None:
            self._reply(wire.REP_ERR_UNKNOWN, b"no such export")
            return False
        try:
            self._describe(disk, name, wanted)
            self._reply(wire.REP_ACK)
        except BaseException:
            disk.close()
            raise
        if go:
            self._asked, self._disk = name, disk
        else:
            disk.close()
        return go

    def _describe(self, disk: Disk, name: str, wanted: tuple[int, ...]) -> None:
        self._reply(wire.REP_INFO, struct.pack(">HQH", wire.INFO_EXPORT, disk.capacity, flags_of(disk)))
        if wire.INFO_NAME in wanted:
            self._reply(wire.REP_INFO, struct.pack(">H", wire.INFO_NAME) + name.encode())
        if wire.INFO_BLOCK_SIZE in wanted:
            sizes = struct.pack(">HIII", wire.INFO_BLOCK_SIZE, 1, wire.PREFERRED_BLOCK, wire.MAX_BLOCK)
            self._reply(wire.REP_INFO, sizes)

    def _structured_reply(self, data: bytes) -> bool:
        if data:
            self._reply(wire.REP_ERR_INVALID)
        else:
            self._structured = True
            self._reply(wire.REP_ACK)
        return False

    def _meta_context(self, data: bytes, *, chosen: bool) -> bool:
        """List the contexts that the queries match, or choose them for the transmission."""
        if chosen:
            self._contexts = ("", {})
        try:
            name, queries = _parse_queries(data)
        except (struct.error, UnicodeDecodeError, ValueError):
            self._reply(wire.REP_ERR_INVALID)
            return False
        if not self._structured:
            self._reply(wire.REP_ERR_INVALID, b"structured replies come first")
            return False
        disk = self._exports.open(name)
        if disk is None:
            self._reply(wire.REP_ERR_UNKNOWN, b"no such export")
            return False
        try:
            known = [BASE_ALLOCATION, *(SINCE + one for one in self._exports.snapshots_below(disk))]
        finally:
            disk.close()
        found = _matching(known, queries, chosen=chosen)[:_MOST_CONTEXTS]
        for number, context in found:
            self._reply(wire.REP_META_CONTEXT, struct.pack(">I", number if chosen else 0) + context.encode())
        self._reply(wire.REP_ACK)
        if chosen:
            self._contexts = (name, dict(found))
        return False


def _parse_queries(data: bytes) -> tuple[str, list[str]]:
    """Return the name of the export and the queries of a metadata option."""
    (length,) = struct.unpack_from(">I", data)
    name = data[4 : 4 + length].decode()
    at = 4 + length
    (count,) = struct.unpack_from(">I", data, at)
    at += 4
    if count > len(data) // 4:
        raise ValueError(count)
    queries = []
    for _ in range(count):
        (size,) = struct.unpack_from(">I", data, at)
        queries.append(data[at + 4 : at + 4 + size].decode())
        at += 4 + size
    if at != len(data):
        raise ValueError(at)
    return name, queries


def _matching(known: list[str], queries: list[str], *, chosen: bool) -> list[tuple[int, str]]:
    """Return number and name of each context that a query asks for; a list without queries asks for all."""
    return list(_matches(known, queries, chosen=chosen))


def _matches(known: list[str], queries: list[str], *, chosen: bool) -> Iterator[tuple[int, str]]:
    for i, context in enumerate(known):
        number = _BASE_ID if context == BASE_ALLOCATION else _FIRST_SINCE_ID + i
        asked = context in queries
        if not chosen:  # `base:` and `qemu-vmdk-snap:` stand for all of theirs
            asked = asked or not queries or any(query.endswith(":") and context.startswith(query) for query in queries)
        if asked:
            yield number, context
