"""The serial line of a QEMU of our own, together with all other signs of the guest's state.

`expect` is pexpect's. While it waits it also looks at the firmware's debug console, at the events of the monitor, at
the process, and at the guest's own time: whatever shows first that the pattern will never come ends the wait with a
GuestError. Time-outs are in seconds of the guest's own time, see `watch.clock`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, cast

from qemu_vmdk_snap.errors import GuestError, PluginError
from qemu_vmdk_snap.harness.deadlines import HUNG_SECONDS, scaled, timeout_scale
from qemu_vmdk_snap.harness.watch.clock import GuestClock, is_stopped
from qemu_vmdk_snap.harness.watch.qmp import Qmp

try:
    import pexpect
    from pexpect.spawnbase import SpawnBase
except ImportError:  # the one place: everything of the harness that needs it comes by here
    raise PluginError("pexpect", "is not installed (pip install 'qemu-vmdk-snap[harness]')") from None

__tracebackhide__ = True

_UEFI_GIVES_UP: Final = re.compile(rb"BdsDxe: No bootable option or device was found")
_UEFI_SHELL: Final = re.compile(
    rb"UEFI Interactive Shell v(?:(?!FS\d+:)[\s\S])*?startup\.nsh|UEFI Interactive Shell v[\s\S]*?Shell> "
)
"""The shell of a firmware that has found nothing else. Its `startup.nsh` may start a system yet, unless there is no
file system (`FS0:`) that could have one, or the prompt shows that it did not."""

PANICS: Final = (
    re.compile(rb"Kernel panic - not syncing[^\r\n]*"),
    re.compile(rb"No bootable device\.?"),
    re.compile(rb"Boot failed: not a bootable disk"),
    _UEFI_GIVES_UP,
)
"""What on the serial line means that the system will not come up."""

_FIRMWARE_GIVES_UP: Final = re.compile(rb"No bootable device")
_LOOK: Final = 0.05  # seconds between two looks at what does not wake us
_SUSPECT: Final = 0.4  # guest seconds without a sign of life after which the disks' counters are asked for
_CHARACTERS: Final = 0.0002  # seconds in which some more come
_TAIL: Final = 4096
_MONITOR_SECONDS: Final = 5.0
_SAME: Final = 1e-6
_UNSEEN: Final = 0.5
"""The most of the guest's own time that counts as idle between two looks: more passes when we had no processor."""


class _Look(NamedTuple):
    """The processors at some time."""

    idle: float
    spent: float
    registers: str


class Console(SpawnBase):  # type: ignore[type-arg]
    """The serial line; `expect` and `send` are pexpect's: what comes in is bytes, and text stands for its UTF-8."""

    def __init__(self, fd: int, pid: int, qmp: Qmp, bios: Path, fail: Callable[[str], GuestError]) -> None:
        """Watch over the connected socket `fd`, which is closed with this; `fail` makes the error to raise."""
        super().__init__(timeout=30)
        self.child_fd = fd
        self._qmp = qmp
        self._bios = bios
        self._bios_seen = 0
        self._pid = pid
        self._clock = GuestClock(pid)
        self._fail = fail
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(qmp.fileno(), select.POLLIN)
        self._serial = select.poll()
        self._serial.register(fd, select.POLLIN)
        self._others: dict[int, tuple[IO[bytes], bytes]] = {}
        self._idle = self._spent = self._next_look = 0.0
        self._next_judgement = HUNG_SECONDS
        self._limit: float | None = None
        self._asked = 0
        self._looked: _Look | None = None
        self._counters: object = None
        self._events = 0
        self.patience = HUNG_SECONDS
        """Guest seconds without a sign of life after which it hangs; halted for good, it hangs after the usual ones."""
        self.own_disks = True
        """No disk waits for another program, which may be slow: then a loop with interrupts off is for good."""
        self.waits_for = "the serial line"
        self.end_is_expected = False
        """The guest was told to switch off: then its end is pexpect.EOF, and no error."""
        self.explain_end: Callable[[], str] = lambda: "QEMU closed the serial line"
        self.tail = b""
        """The last few KiB that came in."""

    def expect(self, pattern: Any, timeout: float | None = -1, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - pexpect's own
        """Return which of `pattern` came in, as pexpect does; `timeout` in the guest's own time, None: no limit.

        Raises:
            GuestError: the guest hangs, gave up, panicked or is gone, or the time is over.
            pexpect.EOF: it is gone, as it was asked to be.
        """
        return self.expect_named(_named(pattern), pattern, timeout, *args, **options)

    def expect_exact(self, pattern_list: Any, timeout: float | None = -1, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - pexpect's own
        """Return which of these texts came in; the rest is as with `expect`."""
        self.waits_for = _named(pattern_list)
        self._begin(timeout)
        try:
            return super().expect_exact(pattern_list, None, *args, **options)
        except GuestError as error:
            raise error.with_traceback(None) from None

    def expect_named(self, what: str, pattern: Any, timeout: float | None = -1, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - pexpect's own
        """Do as `expect` does; errors say that it waits for `what`."""
        self.waits_for = what
        self._begin(timeout)
        try:
            return super().expect(pattern, None, *args, **options)
        except GuestError as error:
            raise error.with_traceback(None) from None

    def wait_for(
        self, wanted: bytes | re.Pattern[bytes], seconds: float | None = None, failures: Sequence[Any] = PANICS
    ) -> re.Match[bytes]:
        """Return the match of `wanted`; what comes first of it, `failures` and a UEFI that finds no system decides.

        Raises:
            GuestError: one of the others came first; and all that `expect` raises.
        """
        wanted = re.compile(wanted, re.DOTALL) if isinstance(wanted, bytes) else wanted
        firmware = [_UEFI_GIVES_UP] if wanted.search(b"Shell> ") else [_UEFI_GIVES_UP, _UEFI_SHELL]
        found = self.expect_named(_named(wanted), [wanted, *failures, *firmware], seconds)
        match = cast("re.Match[bytes]", self.match)
        if found and match.re in firmware:
            raise self._fail(f"waiting for {self.waits_for}: the firmware finds nothing to boot: {self._uefi_failed()}")
        if found:
            raise self._fail(f"waiting for {self.waits_for}: {match[0].decode(errors='replace').strip()}")
        return match

    def wait_for_end(self, what: str, seconds: float) -> None:
        """Return when QEMU has let go of the line, as it was asked to; `what` is waited for.

        Raises:
            GuestError: the guest hangs, panicked, or the time is over.
        """
        self.expect_named(what, pexpect.EOF, seconds)

    def listen(self, fd: int, log: IO[bytes]) -> None:
        """Write what comes in by another descriptor to `log`, and fail when it is one of `PANICS`; closed with this."""
        self._others[fd] = (log, b"")
        self._poll.register(fd, select.POLLIN)

    def drain(self) -> None:
        """Take in what the other console has said so far, without waiting."""
        poll = select.poll()
        for fd in self._others if self.child_fd >= 0 else ():
            poll.register(fd, select.POLLIN)
        while ready := [fd for fd, event in poll.poll(0) if event & select.POLLIN]:
            for fd in ready:
                if not self._overheard(fd):
                    poll.unregister(fd)

    def send(self, data: bytes | str) -> int:
        """Write all of `data` to the guest's serial port; its input takes as much as it takes."""
        view = memoryview(_bytes(data))
        size = len(view)
        while view:
            view = view[os.write(self.child_fd, view) :]
        return size

    def sendline(self, line: bytes | str = b"") -> int:
        """Write `line` and a line feed."""
        return self.send(_bytes(line) + b"\n")

    def close(self) -> None:
        """Let go of the line."""
        if self.child_fd >= 0:
            for fd in (self.child_fd, *self._others):
                os.close(fd)
            self.child_fd = -1

    def isalive(self) -> bool:
        """Return whether the line is open."""
        return self.child_fd >= 0

    def read_nonblocking(self, size: int = 1, timeout: float | None = None) -> bytes:
        """Return what came in, waiting for it under watch; pexpect calls this."""
        until = None if timeout is None or timeout < 0 else time.monotonic() + timeout
        while True:
            ready = {fd for fd, _ in self._poll.poll(_LOOK * 1000)}
            # What the guest said before it ended counts first. One that never stops talking is looked at all the same.
            if self.child_fd in ready:
                data = self._received(size)
                if time.monotonic() > self._next_look:
                    self._look(heard=True)
                return data
            heard = [fd for fd in ready & self._others.keys() if self._overheard(fd)]
            if self._qmp.fileno() in ready and not self._qmp.closed:
                self._qmp.feed()
            if self._qmp.closed:
                self._poll_serial_alone()
            self._look(heard=bool(heard))
            if until is not None and time.monotonic() >= until:
                raise pexpect.TIMEOUT("timeout")

    def _coerce_expect_string(self, s: bytes | str) -> bytes:
        """Return a pattern as bytes; pexpect itself takes ASCII alone."""
        return _bytes(s)

    # ---- signs of life -----------------------------------------------------------------------------------------------

    def _begin(self, timeout: float | None) -> None:
        self._clock.tick()
        self._idle = self._spent = 0.0
        self._looked = None
        self._next_judgement = HUNG_SECONDS
        self._limit = None if timeout is None else float(self.timeout or 30) if timeout < 0 else timeout

    def _received(self, size: int) -> bytes:
        try:
            data = os.read(self.child_fd, size)
            # QEMU sends each character by itself: wait a little for the rest of the line.
            while data and len(data) < size and not data.endswith(b"\n"):
                time.sleep(_CHARACTERS)
                if not self._serial.poll(0) or not (more := os.read(self.child_fd, size - len(data))):
                    break
                data += more
        except OSError:  # a socket is reset, not closed, when QEMU dies with our words unread
            data = b""
        if not data:
            self.flag_eof = True
            if self.end_is_expected:
                raise pexpect.EOF("QEMU has ended")
            raise self._fail(f"waiting for {self.waits_for}: {self.explain_end()}")
        self._idle = 0.0
        self.tail = (self.tail + data)[-_TAIL:]
        if self.logfile_read is not None:
            self.logfile_read.write(data)
        return data

    def _overheard(self, fd: int) -> bool:
        """Take in what the other console says, and return whether it may say more."""
        log, before = self._others[fd]
        try:
            data = os.read(fd, 1 << 16)
        except OSError:
            data = b""
        if not data:
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)
            return False
        self._idle = 0.0
        log.write(data)
        text = (before + data)[-_TAIL:]
        self._others[fd] = (log, text)
        for pattern in PANICS:
            if (found := pattern.search(text)) is not None:
                raise self._fail(f"waiting for {self.waits_for}: {found[0].decode(errors='replace').strip()}")
        return True

    def _poll_serial_alone(self) -> None:
        try:
            self._poll.unregister(self._qmp.fileno())
        except (KeyError, ValueError):
            return

    def _look(self, *, heard: bool = False) -> None:
        """Take in what does not come by the serial line, and judge; `heard`: something has just come by it."""
        self._next_look = time.monotonic() + _LOOK
        spent = self._clock.tick()
        self._idle = 0.0 if heard else self._idle + min(spent, _UNSEEN)
        self._spent += spent
        self._look_at_firmware()
        self._look_at_events()
        if self._idle > _SUSPECT:
            self._look_at_disks()
        scale = timeout_scale()
        if self._idle > self._next_judgement * scale:
            what, surely = self._hangs()
            if surely or self._idle > self.patience * scale:
                raise self._fail(f"waiting for {self.waits_for}: {what}")
            self._next_judgement += HUNG_SECONDS
        if self._limit is not None and self._spent > self._limit * scale:
            raise self._fail(f"waiting for {self.waits_for}: not in {self._limit * scale:g} s of the guest's own time")

    def _look_at_firmware(self) -> None:
        try:
            if self._bios.stat().st_size == self._bios_seen:
                return
            with self._bios.open("rb") as file:
                file.seek(max(0, self._bios_seen - 32))
                new = file.read()
                self._bios_seen = file.tell()
        except FileNotFoundError:
            return
        self._idle = 0.0
        if _FIRMWARE_GIVES_UP.search(new):
            raise self._fail(
                f"waiting for {self.waits_for}: the firmware finds no bootable device: {self._boot_failed()}"
            )

    def _boot_failed(self) -> str:
        found = re.findall(rb"Booting from ([^\r\n]*?)\.*\s+(Boot failed: [^\r\n]*)", self._bios.read_bytes())
        return "; ".join(f"{device.decode()}: {reason.decode()}" for device, reason in found) or "it names none"

    def _uefi_failed(self) -> str:
        found = re.findall(rb"BdsDxe: (failed to [^\r\n]*)", self.tail)
        return "; ".join(line.decode(errors="replace").strip() for line in found) or "it names none"

    def _look_at_events(self) -> None:
        new, self._events = self._qmp.events[self._events :], len(self._qmp.events)
        for event in new:
            self._idle = 0.0
            if (reason := bad_news(event)) is not None and not self.end_is_expected:
                raise self._fail(f"waiting for {self.waits_for}: {reason}")

    def _look_at_disks(self) -> None:
        """Ask for the disks' counters, and take it as a sign of life when one has gone up since the last answer."""
        if self._asked:
            answer = self._qmp.take(self._asked)
            if answer is None:
                return
            self._asked = 0
            counters = [
                [value for key, value in sorted(one["stats"].items()) if key.endswith(("_operations", "_bytes"))]
                for one in answer
            ]
            if self._counters is not None and counters != self._counters:
                self._idle = 0.0
            self._counters = counters
            return
        self._asked = self._qmp.send("query-blockstats", log=False)

    def _hangs(self) -> tuple[str, bool]:
        """Return how the guest hangs, by two looks at its processor, and whether it cannot but hang."""
        if is_stopped(self._pid):
            return f"a signal has stopped QEMU, process {self._pid}, as kill -STOP does", True
        what = f"the guest hangs: no output and no disk access for {self._idle:.1f} s of its own time"
        try:
            seconds = scaled(_MONITOR_SECONDS)
            status = self._qmp("query-status", seconds=seconds)["status"]
            one, two = (self._qmp.monitor("info registers -a", seconds) for _ in range(2))
        except GuestError:
            return f"{what}; QEMU's monitor does not answer either", True
        if status != "running":
            return f"{what}; QEMU says that it is {status}", True
        before, self._looked = self._looked, _Look(self._idle, self._spent, two)
        # A sign of life between two looks sets back the one time, and not the other.
        still = before is not None and abs((self._spent - before.spent) - (self._idle - before.idle)) < _SAME
        state, surely = _processor(
            one, two, before.registers if before is not None and still and self.own_disks else ""
        )
        return f"{what}; {state}", surely


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _named(pattern: object) -> str:
    """Return how errors call what is waited for: pexpect's patterns, one or several."""
    if isinstance(pattern, (list, tuple)):
        return " or ".join(_named(one) for one in pattern) or "nothing"
    if isinstance(pattern, re.Pattern):
        pattern = pattern.pattern
    if isinstance(pattern, bytes):
        pattern = pattern.decode(errors="replace")
    if isinstance(pattern, str):
        return repr(pattern)
    return "its end" if pattern is pexpect.EOF else "a time-out"


def bad_news(event: dict[str, Any]) -> str | None:
    """Return why the guest will not continue after this event of the monitor, or None."""
    name, data = event["event"], event.get("data", {})
    if name == "GUEST_PANICKED":
        return "the guest panicked"
    if name == "WATCHDOG":
        return "the guest's watchdog ran out"
    if name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
        return f"QEMU stopped the guest after a failed {data.get('operation')}: {data.get('reason')}"
    if name != "SHUTDOWN":
        return None
    reasons = {
        "guest-reset": "the guest reset itself (a triple fault or a reboot)",
        "guest-shutdown": "the guest switched itself off",
        "guest-panic": "the guest panicked",
        "host-signal": "QEMU was ended by a signal",
        "host-qmp-quit": "QEMU was ended by its monitor",
    }
    return reasons.get(data.get("reason", ""), f"QEMU ended: {data.get('reason')}")


def _processor(one: str, two: str, before: str = "") -> tuple[str, bool]:
    """Return what the first processor does, and whether none can ever do anything else.

    `one` and `two` are `info registers -a`, taken one after the other; `before` is that of seconds ago, if nothing has
    shown since then that the guest lives. Nothing wakes a processor that is halted with interrupts off. One that runs
    with them off, and whose registers are the same at all three times, waits for what does not come: no interrupt can
    bring it, and no disk is at work.
    """
    ones, twos, befores = (text.split("CPU#")[1:] or [text] for text in (one, two, before))
    surely = len(ones) == len(twos) and all(
        _is_dead(*three) for three in itertools.zip_longest(ones, twos, befores[: len(ones)], fillvalue="")
    )
    places = [re.search(r"[ER]IP=([0-9a-f]+)", text) for text in (ones[0], twos[0])]
    if places[0] is None or places[1] is None:
        return "its processor cannot be read", False
    code = re.search(r"^CS =([0-9a-f]+)", twos[0], re.MULTILINE)
    at = f"{code[1] if code else '?'}:{places[1][1]}"
    off = " with interrupts off" if _is_deaf(twos[0]) else ""
    if "HLT=1" in ones[0] and "HLT=1" in twos[0]:
        return f"halted at {at}{off or ', waiting for an interrupt'}", surely
    if places[0][1] != places[1][1]:
        return f"it runs, last seen at {at}", surely
    return f"it runs in a loop at {at}{off}", surely


def _is_deaf(registers: str) -> bool:
    """Return whether the processor takes no interrupts."""
    flags = re.search(r"FL=([0-9a-f]+)", registers)
    return flags is not None and not int(flags[1], 16) & 0x200


def _is_dead(one: str, two: str, before: str) -> bool:
    if not _is_deaf(two):
        return False
    if "HLT=1" in one and "HLT=1" in two:
        return True
    return bool(before) and len({text.partition("ES =")[0] for text in (one, two, before)}) == 1
