"""Talking to a probe that runs: commands out, checked answers in, over a socket or a terminal."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Protocol, cast

from qemu_vmdk_snap.errors import GuestError
from qemu_vmdk_snap.harness.deadlines import HUNG_SECONDS, scaled
from qemu_vmdk_snap.harness.known.content import Content
from qemu_vmdk_snap.harness.known.reads import assert_reads
from qemu_vmdk_snap.harness.probe import BAD_SUM, PROTOCOL, Answer, command_line, parse_answer
from qemu_vmdk_snap.harness.probe import ProbeError as ProbeError
from qemu_vmdk_snap.harness.watch.console import Console
from qemu_vmdk_snap.units import MIB, SECTOR_SIZE

import pexpect  # isort: skip # once it is known to be there

__tracebackhide__ = True

BOOT_SECONDS: Final = 15.0
_ANSWER_SECONDS: Final = 30.0
_SECONDS_PER_MIB: Final = 0.5
_LOOK_SECONDS: Final = 0.2
_FIRST_PATIENCE: Final = 0.2
_LONGEST_PATIENCE: Final = 1.0
_TRIES: Final = 3
_BATCH: Final = 127  # sectors that the probe moves at once
_DISCARDED: Final = 64 * 0xFFFF  # sectors that a command discards
_LOADED: Final = 7  # sectors that a line to it has room for
_BUFFER: Final = 0x20000  # where they are in its memory
_NOT_AHCI: Final = "ata ff"
_LINE: Final = rb"([^\r\n]*)\r\n"


class Line(Protocol):
    """The part of a pexpect spawn, over whatever carries the bytes, that a session needs."""

    match: Any

    def send(self, data: bytes) -> int:
        """Write all of `data`."""

    def expect(self, pattern: Any, /, *, timeout: float) -> Any:  # noqa: ANN401 - pexpect's own
        """Return when `pattern` has come in, `match` being its match; raises pexpect.EOF or pexpect.TIMEOUT."""

    def close(self) -> None:
        """Let go of it."""


class _Limit(NamedTuple):
    """How long to wait: by the guest's own clock where it is watched, else until a time of the host's."""

    seconds: float
    until: float | None


class _NoAnswer(Exception):
    """Nothing came in time; the machine may still be there."""


class _LineClosed(Exception):
    """The other end of the line is gone."""


class ProbeSession:
    """A probe, booted and answering. Offsets and lengths are bytes of its disk, in whole sectors."""

    def __init__(
        self,
        line: Line,
        name: str,
        explain: Callable[[], str] | None = None,
        fail: Callable[[str], GuestError] | None = None,
        *,
        stopped: Callable[[], str | None] | None = None,
    ) -> None:
        """Talk over `line`; `explain` returns why the other end is gone, `fail` makes the error of a failure.

        `stopped` returns why no answer can come now, if so: that ends a wait unless it passes within two seconds.
        """
        self._over = line
        self._name = name
        self.memory: Callable[[int, int], bytes] | None = None
        """Reads so many bytes of the guest's memory at an address, where there is a way to do that."""
        self._explain = explain or (lambda: "its serial line was closed")
        self._fail = fail or (lambda reason: GuestError(name, reason))
        self._stopped = stopped
        self._give_up: float | None = None
        self._sequence = 0

    def wait_for_boot(self, seconds: float = BOOT_SECONDS) -> None:
        """Return when the probe has said hello: by itself when it booted, or because it was asked.

        Raises:
            GuestError: the machine is gone, the time is over, or another version of the probe answers.
        """
        limit = self._limit(seconds)
        patience = _FIRST_PATIENCE
        while True:
            try:
                answer = self._hello(limit, patience)
            except (_NoAnswer, _LineClosed) as error:
                raise self._fail(str(error)) from None
            if answer is None:
                patience = min(2 * patience, _LONGEST_PATIENCE)
                continue
            if not answer.ok or answer.text.split()[:2] != ["probe", PROTOCOL]:
                raise self._fail(f"says {answer.text!r}, which is not the probe of protocol {PROTOCOL}")
            return

    @property
    def name(self) -> str:
        """What the guest is called in errors."""
        return self._name

    def select(self, disk: int) -> None:
        """Let all that follows be about the disk of this number: 0 is the first that the BIOS found."""
        self.command(f"disk {disk:x}")

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

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes of the range as the guest reads them, up to 127 sectors in one call of its BIOS."""
        lba, count = _sectors(offset), _sectors(length)
        pieces = []
        for at in range(0, count, _BATCH):
            size = min(_BATCH, count - at)
            if self.memory is None:
                pieces += [self.dump((lba + at + i) * SECTOR_SIZE) for i in range(size)]
                continue
            told = int(self.command(f"fetch {lba + at:x} {size:x}"), 16)
            pieces.append(self.memory(_BUFFER, size * SECTOR_SIZE))
            if zlib.crc32(pieces[-1]) != told:
                raise self._fail("QEMU gives other bytes of the guest's memory than the guest has there")
        return b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        """Let the guest write `data` at `offset`, up to 127 sectors in one call of its BIOS."""
        lba, count = _sectors(offset), _sectors(len(data))
        for at in range(0, count, _BATCH):
            size = min(_BATCH, count - at)
            for i in range(0, size, _LOADED):
                start = (at + i) * SECTOR_SIZE
                piece = data[start : start + min(_LOADED, size - i) * SECTOR_SIZE]
                self.command(f"load {i:x} {piece.hex()}")
            self.command(f"write {lba + at:x} {size:x}")

    def flush(self) -> None:
        """Let the guest flush its disk, which must be on AHCI.

        Raises:
            ProbeError: the disk is not on AHCI (`ata ff`), or cannot.
        """
        self._on_ahci("flush")

    def discard(self, offset: int, length: int) -> None:
        """Let the guest discard the range of its disk, which must be on AHCI.

        Raises:
            ProbeError: the disk is not on AHCI (`ata ff`), or cannot.
        """
        lba, count = _sectors(offset), _sectors(length)
        for at in range(0, count, _DISCARDED):
            self._on_ahci(f"discard {lba + at:x} {min(_DISCARDED, count - at):x}")

    def assert_reads(self, content: Content, *, image: Path | str | None = None, samples: int = 8) -> int:
        """Let the guest read all of `content` that was written, all that `image` stores, and samples of the rest.

        Return the bytes that were compared.

        Raises:
            WrongContent, WrongSize (AssertionError): it reads something else; the first wrong sector is named, with the
                link and the byte of the file that it comes from, where `image` is given.
        """
        return assert_reads(self, content, image=None if image is None else Path(image), samples=samples)

    def pattern(self, seed: int, offset: int, length: int) -> None:
        """Let the guest write the pattern of `seed` over the range; see `harness.seeded`."""
        lba, count = _sectors(offset), _sectors(length)
        self.command(f"pattern {seed:x} {lba:x} {count:x}", moving=length)

    def power_off(self, status: int = 0) -> None:
        """Switch the machine off; QEMU's exit status is `2 * status + 1` where it has an isa-debug-exit device."""
        try:
            self._command(f"off {status:x}")
        except _LineClosed:  # QEMU may be gone before its last answer has left
            return
        except _NoAnswer as error:
            raise self._fail(str(error)) from None

    def command(self, words: str, *, moving: int = 0) -> str:
        """Send one command of the protocol and return its answer; `moving` bytes of disk give it more time.

        Raises:
            ProbeError: the probe answers `err`.
            GuestError: its answers stay damaged, it does not answer in time, or the machine is gone.
        """
        try:
            return self._command(words, moving)
        except (_NoAnswer, _LineClosed) as error:
            raise self._fail(str(error)) from None

    def close(self) -> None:
        """Close the line; the machine keeps running."""
        with contextlib.suppress(OSError):
            self._over.close()

    def _command(self, words: str, moving: int = 0) -> str:
        limit = self._limit(_ANSWER_SECONDS + _SECONDS_PER_MIB * moving / MIB)
        for _ in range(_TRIES):
            answer = self._ask(words, limit)
            if answer is None:
                continue
            if not answer.ok:
                raise ProbeError(self._name, words, answer.text)
            return answer.text
        raise self._fail(f"{words!r}: the serial line damaged {_TRIES} messages in a row")

    def _on_ahci(self, words: str) -> None:
        """Send a command for which the BIOS has no word, and of which the probe knows AHCI's."""
        try:
            self.command(words)
        except ProbeError as error:
            if error.answer != _NOT_AHCI:
                raise
            reason = f"{_NOT_AHCI}: the disk is not on ahci, and the probe does that nowhere else (a Linux guest does)"
            raise ProbeError(self._name, words, reason) from None

    def _limit(self, seconds: float) -> _Limit:
        self._give_up = None
        watched = isinstance(self._over, Console)
        return _Limit(seconds, None if watched else time.monotonic() + scaled(seconds))

    def _ask(self, words: str, limit: _Limit) -> Answer | None:
        """Send one command and return its answer, or None when a message was damaged on the way."""
        self._sequence = self._sequence % 255 + 1
        sequence = f"{self._sequence:02x}"
        self._send(sequence, words)
        while True:
            answer = parse_answer(self._line(limit, f"the answer to {words!r}"))
            if answer is None or answer.sequence == BAD_SUM:
                return None
            if answer.sequence == sequence:
                return answer

    def _hello(self, limit: _Limit, patience: float) -> Answer | None:
        """Return the next greeting, or None when something else came in; asks for one after `patience` seconds."""
        ours = limit.until is None  # a machine of our own is heard from its first byte on: no need to ask
        until = limit if ours else _Limit(limit.seconds, min(limit.until or 0.0, time.monotonic() + patience))
        try:
            answer = parse_answer(self._line(until, "the probe's first line"))
        except _NoAnswer:
            if limit.until is None or time.monotonic() >= limit.until:
                raise
            # It may have said hello before we listened: a terminal keeps nothing for those who come late.
            self._send("00", "hello")
            return None
        # The firmware writes to the line too, and a question that came while it did so arrives damaged.
        return None if answer is None or answer.sequence == BAD_SUM else answer

    def _send(self, sequence: str, words: str) -> None:
        try:
            self._over.send(command_line(sequence, words))
        except OSError:
            raise self._fail(f"{words!r}: {self._explain()}") from None

    def _line(self, limit: _Limit, waiting_for: str) -> bytes:
        timeout = limit.seconds if limit.until is None else max(0.01, limit.until - time.monotonic())
        try:
            self._expect_line(timeout, waiting_for)
        except (pexpect.EOF, OSError):  # a socket is reset, not closed, when QEMU dies with our words unread
            raise _LineClosed(f"waiting for {waiting_for}: {self._explain()}") from None
        except pexpect.TIMEOUT:
            raise _NoAnswer(f"waiting for {waiting_for}: no answer in time") from None
        line: bytes = self._over.match[1]
        return line

    def _expect_line(self, timeout: float, waiting_for: str) -> None:
        """Return when a line has come in; fail when none can come any more."""
        if isinstance(self._over, Console):
            self._over.expect_named(waiting_for, _LINE, timeout)
            return
        if self._stopped is None:
            self._over.expect(_LINE, timeout=timeout)
            return
        until = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            try:
                self._over.expect(_LINE, timeout=max(0.01, min(_LOOK_SECONDS, until - now)))
            except pexpect.TIMEOUT:
                reason = self._stopped()
                if reason is None:
                    self._give_up = None
                elif self._give_up is None:
                    self._give_up = now + scaled(HUNG_SECONDS)
                elif now > self._give_up:
                    raise self._fail(f"waiting for {waiting_for}: {reason}") from None
                if now >= until:
                    raise
            else:
                self._give_up = None
                return


def attach(
    path: Path | str,
    *,
    log: IO[bytes] | None = None,
    seconds: float = BOOT_SECONDS,
    name: str | None = None,
    explain: Callable[[], str] | None = None,
    stopped: Callable[[], str | None] | None = None,
) -> ProbeSession:
    """Return a session with a probe whose serial line is at `path`: a Unix socket that listens, or a terminal.

    For a libvirt domain: the source path of its serial device. `log` gets every byte that comes in. Errors call the
    guest `name`, or by its path; `explain` and `stopped` are as for `ProbeSession`.

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
                raise GuestError(name or str(path), f"cannot connect: {error.strerror}") from None
            time.sleep(0.02)
    session = ProbeSession(line, name or str(path), explain, stopped=stopped)
    try:
        session.wait_for_boot(seconds)
    except GuestError:
        session.close()
        raise
    return session


def over_descriptor(fd: int, log: IO[bytes] | None) -> Line:
    """Return the line that talks over an open descriptor, which it closes in the end; `log` gets what comes in."""
    from pexpect import fdpexpect

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
