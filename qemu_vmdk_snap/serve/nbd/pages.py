"""Answers whose data goes from the file to the client without a copy: pages of the page cache, by way of a pipe.

What is in the pipe, and then in the socket, are the file's own pages until the client takes them. Later writes to the
same place are seen in them, so a client may get what was written after its request was looked at. It may: it has no
answer yet, so the write is concurrent with its read, and NBD orders no such two. Nothing else is ever stored in those
pages: a grain of an image is never moved, nor its place used again, and what is deleted or punched loses its pages,
which stay as they are for whoever has them.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

_ROOM: Final = 256 << 10
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_SPARE: Final = 3 * _PAGE
"""For the head, and for data that begins and ends within a page: each takes a whole page of the pipe."""


class Pages:
    """The pipe of one connection, made when it is first needed. It has one answer at a time."""

    def __init__(self) -> None:
        self._read = self._write = -1
        self._most = -1
        """The most data that has room in the pipe; -1 as long as there is none."""
        self.filled = 0
        """Bytes of the answer that waits to be sent."""

    def put(self, head: bytes | bytearray, descriptor: int, offset: int, length: int) -> bool:
        """Take an answer: `head`, and so much of the file; return False where that cannot be, and nothing is taken."""
        if self._most < 0:
            self._open()
        if length > self._most:
            return False
        done = os.write(self._write, head)
        end = done + length
        try:
            while done < end:
                at = offset + length - (end - done)
                got = os.splice(descriptor, self._write, end - done, at, flags=os.SPLICE_F_NONBLOCK)
                if not got:
                    break  # the end of a file that is too short
                done += got
        except BlockingIOError:
            pass  # it takes more places than it should
        except OSError:
            self._most = 0  # the file system has no such pages; or a plain read says what is wrong
        if done < end:
            os.read(self._read, done)
            return False
        self.filled = end
        return True

    def send(self, descriptor: int) -> None:
        """Send the answer to a socket; raises OSError of the socket."""
        while self.filled:
            self.filled -= os.splice(self._read, descriptor, self.filled)

    def close(self) -> None:
        """Close the pipe."""
        if self._read >= 0:
            os.close(self._read)
            os.close(self._write)
        self._read = self._write = -1
        self._most = 0

    def _open(self) -> None:
        self._most = 0
        try:
            self._read, self._write = os.pipe2(os.O_CLOEXEC)
            # Refused to a user who has many pipes: then there is room for less than what is sent this way.
            self._most = fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, _ROOM) - _SPARE
        except OSError:
            pass
