"""Talking to a probe that runs: commands out, checked answers in, over a socket or a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, Protocol, cast

import pexpect
from pexpect import fdpexpect

from qemu_vmdk_snap.errors import GuestError
from qemu_vmdk_snap.harness.deadlines import scaled
from qemu_vmdk_snap.harness.probe import BAD_SUM, PROTOCOL, Answer, command_line, parse_answer
from qemu_vmdk_snap.units import MIB, SECTOR_SIZE

BOOT_SECONDS: Final = 15.0
_ANSWER_SECONDS: Final = 10.0
_SECONDS_PER_MIB: Final = 0.5
_FIRST_PATIENCE: Final = 0.2
_LONGEST_PATIENCE: Final = 1.0
_TRIES: Final = 3
_LINE: Final = rb"([^\r\n]*)\r\n"


class Line(Protocol):
    """The part of a pexpect spawn, over whatever carries the bytes, that a session needs."""

    match: re.Match[bytes]

    def send(self, data: bytes) -> int:
        """Write all of `data`."""

    def expect(self, pattern: bytes, *, timeout: float) -> int:
        """Return when `pattern` has come in, `match` being its match; raises pexpect.EOF or pexpect.TIMEOUT."""

    def close(self) -> None:
        """Let go of it."""


class _NoAnswer(GuestError):
    """Nothing came in time; the machine may still be there."""


class _LineClosed(GuestError):
    """The other end of the line is gone."""


class ProbeError(GuestError):
    """The probe is well, and says that it cannot do what it was told; `answer` is what it says: `bios 0c`."""

    def __init__(self, guest: str, command: str, answer: str) -> None:
        super().__init__(guest, f"{command!r}: {answer}")
        self.args = (guest, command, answer)
        self.command, self.answer = command, answer


class ProbeSession:
    """A probe, booted and answering. Offsets and lengths are bytes of its disk, in whole sectors."""

    def __init__(self, line: Line, name: str, explain: Callable[[], str] | None = None) -> None:
        """Talk over `line`; `explain` tells why when the other end is gone."""
        self._over = line
        self._name = name
        self._explain = explain or (lambda: "its serial line was closed")
        self._sequence = 0

    def wait_for_boot(self, seconds: float = BOOT_SECONDS) -> None:
        """Return when the probe has said hello: by itself when it booted, or because it was asked.

        Raises:
            GuestError: the machine is gone, the time is over, or another version of the probe answers.
        """
        deadline = time.monotonic() + scaled(seconds)
        patience = _FIRST_PATIENCE
        while True:
            answer = self._hello(deadline, patience)
            if answer is None:
                patience = min(2 * patience, _LONGEST_PATIENCE)
                continue
            if not answer.ok or answer.text.split()[:2] != ["probe", PROTOCOL]:
                raise GuestError(self._name, f"says {answer.text!r}, which is not the probe of protocol {PROTOCOL}")
            return

    def size(self) -> int:
        """Return the bytes of the disk as the BIOS sees it."""
        return int(self.command("size"), 16) * SECTOR_SIZE

    def crc(self, offset: int, length: int) -> int:
        """Return the CRC-32 (zlib's) of what the guest reads in the range."""
        lba, count = _sectors(offset), _sectors(length)
        return int(self.command(f"crc {lba:x} {count:x}", moving=length), 16)

    def dump(self, offset: int) -> bytes:
        """Return the sector at `offset` as the guest reads it."""
        return bytes.fromhex(self.command(f"dump {_sectors(offset):x}"))

    def pattern(self, seed: int, offset: int, length: int) -> None:
        """Let the guest write the pattern of `seed` over the range; see `harness.seeded`."""
        lba, count = _sectors(offset), _sectors(length)
        self.command(f"pattern {seed:x} {lba:x} {count:x}", moving=length)

    def power_off(self, status: int = 0) -> None:
        """Switch the machine off; QEMU's exit status is `2 * status + 1` where it has an isa-debug-exit device."""
        with contextlib.suppress(_LineClosed):  # QEMU may be gone before its last answer has left
            self.command(f"off {status:x}")

    def command(self, words: str, *, moving: int = 0) -> str:
        """Send one command of the protocol and return its answer; `moving` bytes of disk give it more time.

        Raises:
            ProbeError: the probe answers `err`.
            GuestError: its answers stay damaged, it does not answer in time, or the machine is gone.
        """
        deadline = time.monotonic() + scaled(_ANSWER_SECONDS + _SECONDS_PER_MIB * moving / MIB)
        for _ in range(_TRIES):
            answer = self._ask(words, deadline)
            if answer is None:
                continue
            if not answer.ok:
                raise ProbeError(self._name, words, answer.text)
            return answer.text
        raise GuestError(self._name, f"{words!r}: the serial line damaged {_TRIES} messages in a row")

    def close(self) -> None:
        """Let go of the line; the machine goes on."""
        with contextlib.suppress(OSError):
            self._over.close()

    def _ask(self, words: str, deadline: float) -> Answer | None:
        """Send one command and return its answer, or None when a message was damaged on the way."""
        self._sequence = self._sequence % 255 + 1
        sequence = f"{self._sequence:02x}"
        self._send(sequence, words)
        while True:
            answer = parse_answer(self._line(deadline, f"the answer to {words!r}"))
            if answer is None or answer.sequence == BAD_SUM:
                return None
            if answer.sequence == sequence:
                return answer

    def _hello(self, deadline: float, patience: float) -> Answer | None:
        """Return the next greeting, or None when something else came in; asks for one after `patience` seconds."""
        until = min(deadline, time.monotonic() + patience)
        try:
            answer = parse_answer(self._line(until, "the probe's first line"))
        except _NoAnswer:
            if time.monotonic() >= deadline:
                raise
            # It may have said hello before we listened: a terminal keeps nothing for those who come late.
            self._send("00", "hello")
            return None
        # The firmware writes to the line too, and a question that came while it did so arrives damaged.
        return None if answer is None or answer.sequence == BAD_SUM else answer

    def _send(self, sequence: str, words: str) -> None:
        try:
            self._over.send(command_line(sequence, words))
        except OSError as error:
            raise GuestError(self._name, f"{words!r}: {self._explain()}") from error

    def _line(self, deadline: float, waiting_for: str) -> bytes:
        try:
            self._over.expect(_LINE, timeout=max(0.01, deadline - time.monotonic()))
        except (pexpect.EOF, OSError) as error:  # a socket is reset, not closed, when QEMU dies with our words unread
            raise _LineClosed(self._name, f"waiting for {waiting_for}: {self._explain()}") from error
        except pexpect.TIMEOUT as error:
            raise _NoAnswer(self._name, f"waiting for {waiting_for}: no answer in time") from error
        line: bytes = self._over.match[1]
        return line


def attach(path: Path | str, *, log: IO[bytes] | None = None, seconds: float = BOOT_SECONDS) -> ProbeSession:
    """Return a session with a probe whose serial line is at `path`: a Unix socket that listens, or a terminal.

    For a libvirt domain: the source path of its serial device. `log` gets every byte that comes in.

    Raises:
        GuestError: nothing answers at `path` in time.
    """
    path = Path(path)
    deadline = time.monotonic() + scaled(seconds)
    line: Line | None = None
    while line is None:
        try:
            line = _connect(path, log)
        except OSError as error:
            # The socket is there a moment before it listens, and the domain a moment before its socket.
            if time.monotonic() > deadline:
                raise GuestError(str(path), f"cannot connect: {error.strerror}") from error
            time.sleep(0.02)
    session = ProbeSession(line, str(path))
    try:
        session.wait_for_boot(seconds)
    except GuestError:
        session.close()
        raise
    return session


def over_descriptor(fd: int, log: IO[bytes] | None) -> Line:
    """Return the line that talks over an open descriptor, which it closes in the end; `log` gets what comes in."""
    # Not pexpect's SocketSpawn for sockets: it writes no log.
    spawn = fdpexpect.fdspawn(fd, use_poll=True)
    spawn.logfile_read = log
    spawn.delaybeforesend = None
    return cast(Line, spawn)


def _connect(path: Path, log: IO[bytes] | None) -> Line:
    if not stat.S_ISSOCK(path.stat().st_mode):
        return over_descriptor(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC), log)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.connect(str(path))
        return over_descriptor(line.detach(), log)


def _sectors(length: int) -> int:
    if length % SECTOR_SIZE:
        raise ValueError(f"{length} is not a whole number of sectors")
    return length // SECTOR_SIZE
