"""One client in transmission: take every request that has come, do them in one turn, answer them all at once.

Memory is bounded whatever a client asks: requests are taken from a buffer of `_TAKEN` bytes, answers collected in one
of `_GIVEN` bytes; what is larger than a piece is moved piece by piece. A client that does not read its answers blocks
its own thread alone, as nothing is sent or received with the turn in hand.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from qemu_vmdk_snap import log
from qemu_vmdk_snap.errors import VmdkSnapError
from qemu_vmdk_snap.serve.nbd import wire
from qemu_vmdk_snap.serve.nbd.extents import block_status
from qemu_vmdk_snap.serve.nbd.handshake import Agreed, Dropped
from qemu_vmdk_snap.serve.nbd.pages import Pages
from qemu_vmdk_snap.serve.nbd.statistics import Statistics
from qemu_vmdk_snap.units import KIB, MIB

_log = log.of(__name__)

_PIECE: Final = MIB
"""The most that is read, or written, in one turn by a request that is larger."""
_REQUEST: Final = wire.REQUEST.size
_COMMAND_BYTE: Final = 7
"""Where the lower byte of the command is in a request."""
_TAKEN: Final = 2 * MIB
_NEEDED: Final = _PIECE + _REQUEST
_SPLICED: Final = 32 * KIB
"""The shortest read that is answered with pages of the file, which cost a pipe in the place of two copies."""
_SMALL_ANSWERS: Final = 256 * KIB
_GIVEN: Final = _PIECE + _SMALL_ANSWERS
_DATA_HEAD: Final = wire.DATA_CHUNK.size
_SIMPLE_HEAD: Final = wire.SIMPLE_REPLY.size
_ERROR: Final = struct.Struct(">IH")
_CHANGES: Final = frozenset([wire.WRITE, wire.TRIM, wire.WRITE_ZEROES])
_FAILURES: Final = (OSError, VmdkSnapError)


class _Large(NamedTuple):
    """A read or write that does not fit into the buffers."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int


class Connection:
    """A client that has chosen an export; `run` returns when it has gone."""

    def __init__(self, sock: socket.socket, agreed: Agreed, statistics: Statistics) -> None:
        self._sock = sock
        self._disk, self._stack = agreed.disk, agreed.disk.stack
        self._structured, self._contexts = agreed.structured, agreed.contexts
        self._statistics = statistics
        self._taken = memoryview(bytearray(_TAKEN))
        self._given = memoryview(bytearray(_GIVEN))
        self._start = self._end = 0
        """What of `_taken` is not done yet."""
        self._missing = 0
        """How many bytes the write that comes first in `_taken` lacks."""
        self._filled = 0
        """How much of `_given` is to be sent."""
        self._pages = Pages()
        """The answer that is sent after that."""
        self._waiting: list[int] = []
        """Cookies of this batch that are answered after a flush."""
        self._large: _Large | None = None
        self._ended = False

    def run(self) -> None:
        """Serve until the client disconnects; raises Dropped, or OSError of the socket."""
        try:
            self._serve()
        finally:
            self._pages.close()

    def _serve(self) -> None:
        receive, gate, turn = self._sock.recv_into, self._stack.gate, self._stack.turn
        taken, pages = self._taken, self._pages
        while True:
            if self._missing:  # the rest of a write whose length is known: in one call, however it comes
                got = receive(taken[self._end :], self._missing, socket.MSG_WAITALL)
            else:
                got = receive(taken[self._end :])
            if not got:
                return
            self._end += got
            self._missing = 0
            if got == _REQUEST and taken[_COMMAND_BYTE] == wire.WRITE and self._is_head_of_write():
                continue  # most clients send the data apart: no turn is needed to wait for it
            more = True
            while more:
                if not gate.is_set():
                    gate.wait()
                with turn:
                    more = self._batch()
                if self._filled:
                    self._sock.sendall(self._given[: self._filled])
                    self._filled = 0
                if pages.filled:
                    pages.send(self._sock.fileno())
                if self._large is not None:
                    self._do_large(self._large)
                    self._large = None
            if self._ended:
                return
            self._make_room()

    def _is_head_of_write(self) -> bool:
        """Return whether no more than the head of a write has come, and note what it lacks."""
        if self._end == _REQUEST:
            length = wire.REQUEST.unpack_from(self._taken)[-1]
            self._missing = length if length <= _PIECE else 0
        return self._missing > 0

    def _make_room(self) -> None:
        rest = self._end - self._start
        if not rest:
            self._start = self._end = 0
        elif self._start > _TAKEN - _NEEDED:
            self._taken[:rest] = self._taken[self._start : self._end]
            self._start, self._end = 0, rest

    def _batch(self) -> bool:
        """Do the requests that are there, in the turn; return whether there are more, when the answers are sent."""
        unpack, taken = wire.REQUEST.unpack_from, self._taken
        start, end = self._start, self._end
        more = False
        while end - start >= _REQUEST:
            magic, flags, command, cookie, offset, length = unpack(taken, start)
            if magic != wire.REQUEST_MAGIC:
                raise Dropped
            if command <= wire.WRITE:
                if length > _PIECE:
                    start += _REQUEST
                    self._large = _Large(command, flags, cookie, offset, length)
                    more = True
                    break
                room = _GIVEN - 64 - self._filled - 32 * len(self._waiting)
                if (room < length) if command == wire.READ else (room < 0):
                    more = True
                    break
                if command == wire.READ:
                    start += _REQUEST
                    if length >= _SPLICED and self._read_pages(flags, cookie, offset, length):
                        more = True
                        break
                    self._read(flags, cookie, offset, length)
                    continue
                stop = start + _REQUEST + length
                if stop > end:
                    self._missing = stop - end
                    break
                self._write(flags, cookie, offset, taken[start + _REQUEST : stop])
                start = stop
                continue
            if self._filled + 32 * len(self._waiting) > _PIECE:
                more = True
                break
            start += _REQUEST
            if command == wire.DISCONNECT:
                self._ended = True
                break
            self._other(command, flags, cookie, offset, length)
        self._start = start
        if self._waiting:
            self._flush_waiting()
        return more

    # --- one request --------------------------------------------------------------------------------------------------

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        disk, at = self._disk, self._filled
        if not 0 < length <= disk.capacity - offset or flags & ~wire.ALLOWED_FLAGS[wire.READ] or disk.gone:
            self._fail(cookie, wire.ESHUTDOWN if disk.gone else wire.EINVAL, structured=self._structured)
            return
        if self._structured:
            start = at + _DATA_HEAD
            head = (wire.CHUNK_MAGIC, wire.CHUNK_DONE, wire.CHUNK_DATA, cookie, length + 8, offset)
            wire.DATA_CHUNK.pack_into(self._given, at, *head)
        else:
            start = at + _SIMPLE_HEAD
            wire.SIMPLE_REPLY.pack_into(self._given, at, wire.SIMPLE_MAGIC, 0, cookie)
        try:
            disk.read_into(offset, self._given[start : start + length])
        except _FAILURES as error:
            self._failed(cookie, error, structured=self._structured)
            return
        self._filled = start + length
        counts = self._statistics
        counts.reads += 1
        counts.read_bytes += length

    def _read_pages(self, flags: int, cookie: int, offset: int, length: int) -> bool:
        """Answer with pages of the file, where the range is stored in one piece; False where that cannot be."""
        disk = self._disk
        if length > disk.capacity - offset or flags & ~wire.ALLOWED_FLAGS[wire.READ] or disk.gone:
            return False
        stored = disk.stored(offset, length)
        if stored is None:
            return False
        if self._structured:
            head = wire.DATA_CHUNK.pack(wire.CHUNK_MAGIC, wire.CHUNK_DONE, wire.CHUNK_DATA, cookie, length + 8, offset)
        else:
            head = wire.SIMPLE_REPLY.pack(wire.SIMPLE_MAGIC, 0, cookie)
        if not self._pages.put(head, *stored, length):
            return False
        counts = self._statistics
        counts.reads += 1
        counts.read_bytes += length
        return True

    def _write(self, flags: int, cookie: int, offset: int, data: memoryview) -> None:
        disk, length = self._disk, len(data)
        usual = not (flags or disk.gone or disk.read_only) and offset + length <= disk.capacity
        if not usual and (refused := self._refused(wire.WRITE, flags, offset, length)):
            self._fail(cookie, refused)
            return
        try:
            if length:
                disk.write(offset, data)
        except _FAILURES as error:
            self._failed(cookie, error)
            return
        counts = self._statistics
        counts.writes += 1
        counts.written_bytes += length
        if flags & wire.FLAG_FUA or self._stack.write_through:
            self._waiting.append(cookie)
            return
        wire.SIMPLE_REPLY.pack_into(self._given, self._filled, wire.SIMPLE_MAGIC, 0, cookie)
        self._filled += _SIMPLE_HEAD

    def _other(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        if refused := self._refused(command, flags, offset, length):
            self._fail(cookie, refused, structured=self._structured and command == wire.BLOCK_STATUS)
            return
        try:
            if command == wire.BLOCK_STATUS:
                self._block_status(flags, cookie, offset, length)
                return
            self._change(command, flags, offset, length)
        except _FAILURES as error:
            self._failed(cookie, error, structured=self._structured and command == wire.BLOCK_STATUS)
            return
        if command == wire.FLUSH or flags & wire.FLAG_FUA or self._stack.write_through:
            self._waiting.append(cookie)
        else:
            self._answer(cookie)

    def _change(self, command: int, flags: int, offset: int, length: int) -> None:
        if command == wire.TRIM:
            self._disk.trim(offset, length)
            self._statistics.trims += 1
        elif command == wire.WRITE_ZEROES:
            keep = bool(flags & wire.FLAG_NO_HOLE)
            self._disk.zero(offset, length, keep_space=keep, fast=bool(flags & wire.FLAG_FAST_ZERO))
            self._statistics.zeroes += 1

    def _refused(self, command: int, flags: int, offset: int, length: int) -> int:
        """Return the error of a request that cannot be done, or 0."""
        disk = self._disk
        if disk.gone:
            return wire.ESHUTDOWN
        if command not in wire.ALLOWED_FLAGS or flags & ~wire.ALLOWED_FLAGS[command]:
            return wire.EINVAL
        if command in _CHANGES:
            if disk.read_only:
                return wire.EPERM
            if offset + length > disk.capacity:
                return wire.EINVAL if command == wire.TRIM else wire.ENOSPC
        elif command == wire.BLOCK_STATUS and (not self._contexts or not 0 < length <= disk.capacity - offset):
            return wire.EINVAL
        return 0

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        one = bool(flags & wire.FLAG_REQ_ONE)
        parts: list[bytes] = []
        for number, context in self._contexts.items():
            extents = block_status(self._disk, context, offset, length, one=one)
            body = struct.pack(">I", number) + b"".join(struct.pack(">II", *extent) for extent in extents)
            done = wire.CHUNK_DONE if len(parts) == len(self._contexts) - 1 else 0
            parts.append(wire.CHUNK.pack(wire.CHUNK_MAGIC, done, wire.CHUNK_STATUS, cookie, len(body)) + body)
        self._put(b"".join(parts))

    # --- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, cookie: int, error: int = 0) -> None:
        wire.SIMPLE_REPLY.pack_into(self._given, self._filled, wire.SIMPLE_MAGIC, error, cookie)
        self._filled += _SIMPLE_HEAD

    def _put(self, raw: bytes) -> None:
        self._given[self._filled : self._filled + len(raw)] = raw
        self._filled += len(raw)

    def _fail(self, cookie: int, error: int, *, structured: bool = False) -> None:
        if structured:
            body = _ERROR.pack(error, 0)
            head = wire.CHUNK.pack(wire.CHUNK_MAGIC, wire.CHUNK_DONE, wire.CHUNK_ERROR, cookie, len(body))
            self._put(head + body)
        else:
            self._answer(cookie, error)

    def _failed(self, cookie: int, error: BaseException, *, structured: bool = False) -> None:
        """Answer a request that the engine or the system could not do."""
        self._statistics.failed(error)
        _log.info("a request failed: %s", error)
        self._fail(cookie, wire.error_of(error), structured=structured)

    def _flush_waiting(self) -> None:
        """Flush once for all of the batch that asked for it, then answer them."""
        error = 0
        try:
            self._disk.flush()
            self._statistics.flushes += 1
        except _FAILURES as failure:
            self._statistics.failed(failure)
            _log.info("a flush failed: %s", failure)
            error = wire.error_of(failure)
        for cookie in self._waiting:
            self._answer(cookie, error)
        self._waiting.clear()

    # --- what is larger than a piece ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        self._stack.gate.wait()
        with self._stack.turn:
            yield

    def _do_large(self, request: _Large) -> None:
        if request.command == wire.WRITE:
            self._large_write(request)
        else:
            self._large_read(request)

    def _large_write(self, request: _Large) -> None:
        if request.length > wire.MAX_BLOCK:
            raise Dropped
        refused = self._refused(wire.WRITE, request.flags, request.offset, request.length)
        failure: BaseException | None = None
        done = 0
        while done < request.length:
            piece = self._next_piece(min(_PIECE, request.length - done))
            if not refused and failure is None:
                try:
                    with self._turn():
                        self._disk.write(request.offset + done, piece)
                        if done + len(piece) == request.length and (
                            request.flags & wire.FLAG_FUA or self._stack.write_through
                        ):
                            self._disk.flush()
                        self._statistics.written_bytes += len(piece)
                except _FAILURES as error:
                    failure = error
            done += len(piece)
        if failure is not None:
            self._failed(request.cookie, failure)
        else:
            self._statistics.writes += not refused
            self._fail(request.cookie, refused)
        self._send()

    def _next_piece(self, length: int) -> memoryview:
        """Return the next `length` bytes that the client sends."""
        rest = self._end - self._start
        if rest < length and self._start + length > _TAKEN:
            self._taken[:rest] = self._taken[self._start : self._end]
            self._start, self._end = 0, rest
        while self._end - self._start < length:
            got = self._sock.recv_into(self._taken[self._end :])
            if not got:
                raise Dropped
            self._end += got
        piece = self._taken[self._start : self._start + length]
        self._start += length
        return piece

    def _large_read(self, request: _Large) -> None:
        disk, offset, length = self._disk, request.offset, request.length
        wrong = length > min(wire.MAX_BLOCK, disk.capacity - offset) or request.flags & ~wire.ALLOWED_FLAGS[wire.READ]
        if wrong or disk.gone:
            error = wire.ESHUTDOWN if disk.gone else wire.EINVAL
            self._fail(request.cookie, error, structured=self._structured)
            self._send()
            return
        pieces = self._structured and not request.flags & wire.FLAG_DF
        if not pieces:
            self._large_head(request)
        for done in range(0, length, _PIECE):
            size = min(_PIECE, length - done)
            start = self._filled
            if pieces:
                flags = wire.CHUNK_DONE if done + size == length else 0
                head = (wire.CHUNK_MAGIC, flags, wire.CHUNK_DATA, request.cookie, size + 8, offset + done)
                wire.DATA_CHUNK.pack_into(self._given, start, *head)
                start += _DATA_HEAD
            try:
                with self._turn():
                    disk.read_into(offset + done, self._given[start : start + size])
                    self._statistics.read_bytes += size
            except _FAILURES as failure:
                if not pieces:
                    raise Dropped from failure  # the answer has begun: there is no way left to say no
                self._failed(request.cookie, failure, structured=True)
                break
            self._filled = start + size
            self._send()
        self._statistics.reads += 1
        self._send()

    def _large_head(self, request: _Large) -> None:
        if self._structured:
            size = request.length + 8
            head = (wire.CHUNK_MAGIC, wire.CHUNK_DONE, wire.CHUNK_DATA, request.cookie, size, request.offset)
            self._put(wire.DATA_CHUNK.pack(*head))
        else:
            self._answer(request.cookie)

    def _send(self) -> None:
        if self._filled:
            self._sock.sendall(self._given[: self._filled])
            self._filled = 0
