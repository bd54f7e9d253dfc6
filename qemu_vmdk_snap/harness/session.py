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
from pexpect import fdpexpect, socket_pexpect

from qemu_vmdk_snap.errors import GuestError
from qemu_vmdk_snap.harness.deadlines import scaled
from qemu_vmdk_snap.harness.probe import BAD_SUM, PROTOCOL, Answer, command_line, parse_answer
from qemu_vmdk_snap.units import MIB, SECTOR_SIZE

BOOT_SECONDS: Final = 15.0
_ANSWER_SECONDS: Final = 10.0
_SECONDS_PER_MIB: Final = 0.5
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


class ProbeSession:
    """A probe, booted and answering. Offsets and lengths are bytes of its disk, in whole sectors."""

    def __init__(self, line: Line, name: str, explain: Callable[[], str] | None = None) -> None:
        """Talk over `line`; `explain` tells why when the other end is gone."""
        self._over = line
        self._name = name
        self._explain = explain or (lambda: "its serial line was closed")
        self._sequence = 0

    def wait_for_boot(self, seconds: float = BOOT_SECONDS) -> None:
        """Return when the probe has said hello.

        Raises:
            GuestError: the machine is gone, the time is over, or another version of the probe answers.
        """
        deadline = time.monotonic() + scaled(seconds)
        while True:
            answer = parse_answer(self._line(deadline, "the probe's first line"))
            if answer is None:
                continue  # the firmware may write to the line too
            words = answer.text.split()
            if not answer.ok or words[:2] != ["probe", PROTOCOL]:
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
        self.command(f"off {status:x}")

    def command(self, words: str, *, moving: int = 0) -> str:
        """Send one command of the protocol and return its answer; `moving` bytes of disk give it more time.

        Raises:
            GuestError: the probe answers `err`, its answers stay damaged, or it does not answer in time.
        """
        deadline = time.monotonic() + scaled(_ANSWER_SECONDS + _SECONDS_PER_MIB * moving / MIB)
        for _ in range(_TRIES):
            answer = self._ask(words, deadline)
            if answer is None:
                continue
            if not answer.ok:
                raise GuestError(self._name, f"{words!r}: {answer.text}")
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
        try:
            self._over.send(command_line(sequence, words))
        except OSError as error:
            raise GuestError(self._name, f"{words!r}: {self._explain()}") from error
        while True:
            answer = parse_answer(self._line(deadline, f"the answer to {words!r}"))
            if answer is None or answer.sequence == BAD_SUM:
                return None
            if answer.sequence == sequence:
                return answer

    def _line(self, deadline: float, waiting_for: str) -> bytes:
        try:
            self._over.expect(_LINE, timeout=max(0.01, deadline - time.monotonic()))
        except pexpect.EOF as error:
            raise GuestError(self._name, f"waiting for {waiting_for}: {self._explain()}") from error
        except pexpect.TIMEOUT as error:
            raise GuestError(self._name, f"waiting for {waiting_for}: no answer in time") from error
        line: bytes = self._over.match[1]
        return line


def attach(path: Path | str, *, log: IO[bytes] | None = None, seconds: float = BOOT_SECONDS) -> ProbeSession:
    """Return a session with a probe whose serial line is at `path`: a Unix socket that listens, or a terminal.

    For a libvirt domain: the source path of its serial device. The probe must not have been attached to before: its
    first line is waited for. `log` gets every byte that comes in.

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
    session.wait_for_boot(seconds)
    return session


def over_socket(line: socket.socket, log: IO[bytes] | None) -> Line:
    """Return the pexpect spawn that talks over a connected socket."""
    spawn = socket_pexpect.SocketSpawn(line, use_poll=True)
    spawn.logfile_read = log
    spawn.delaybeforesend = None
    return cast(Line, spawn)


def _connect(path: Path, log: IO[bytes] | None) -> Line:
    if stat.S_ISSOCK(path.stat().st_mode):
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            line.connect(str(path))
        except OSError:
            line.close()
            raise
        return over_socket(line, log)
    spawn = fdpexpect.fdspawn(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC), use_poll=True)
    spawn.logfile_read = log
    spawn.delaybeforesend = None
    return cast(Line, spawn)


def _sectors(length: int) -> int:
    if length % SECTOR_SIZE:
        raise ValueError(f"{length} is no whole number of sectors")
    return length // SECTOR_SIZE
