"""A QEMU process of our own with the probe booted on an image; nothing survives it but its logs."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Self

from qemu_vmdk_snap import read_links
from qemu_vmdk_snap.errors import GuestError, InvalidRequest, PluginError, VmdkSnapError
from qemu_vmdk_snap.harness.accelerator import choose_accelerator, kvm_fault
from qemu_vmdk_snap.harness.deadlines import HUNG_SECONDS, SILENT_SECONDS, SYSTEM_SECONDS, scaled
from qemu_vmdk_snap.harness.hardware import DEFAULT_CONTROLLER, EXECUTABLE, Channels, Disk, Setup, arguments, by_hand
from qemu_vmdk_snap.harness.known.content import Content, Known
from qemu_vmdk_snap.harness.probe import floppy_image
from qemu_vmdk_snap.harness.session import BOOT_SECONDS, ProbeSession
from qemu_vmdk_snap.harness.watch.clock import is_stopped
from qemu_vmdk_snap.harness.watch.console import PANICS, Console, bad_news
from qemu_vmdk_snap.harness.watch.qmp import Qmp
from qemu_vmdk_snap.harness.watch.report import FailureReport, gather

__tracebackhide__ = True

_EXIT_SECONDS: Final = 30.0
_DEATH_SECONDS: Final = 10.0
_NO_PROBE: Final = "was booted with `expect`: no probe runs there; use `guest.console` and `guest.qmp`"


class Machine:
    """A running QEMU; `probe` is the session with the guest, unless its own system boots. Use it in a `with` block."""

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        seconds: float = BOOT_SECONDS,
        *,
        expect: bytes | re.Pattern[bytes] | None = None,
        failures: Sequence[bytes | re.Pattern[bytes]] = PANICS,
        patience: float | None = None,
    ) -> None:
        """Start QEMU, its logs going to `folder`, and wait for the probe, or for `expect`; `boot` is the usual way.

        `patience` is how long the guest may show no sign of life.

        Raises:
            PluginError: QEMU is not installed.
            GuestError: QEMU ended at once, or the guest did not boot.
        """
        self.setup = setup
        self.folder = folder
        self.known: Known | None = None
        """The chain of known content that it was booted on, if it was one."""
        self.report: FailureReport | None = None
        """The report of the guest, once it has failed."""
        executable = shutil.which(setup.qemu)
        if executable is None:
            raise PluginError(setup.qemu, "is not installed (Debian: qemu-system-x86, Fedora: qemu-system-x86-core)")
        self._held = False
        self._booted = False
        self._own_system = expect is not None
        self.found: re.Match[bytes] | None = None
        """What matched `expect`."""
        started = time.monotonic()
        self._start(executable)
        self.console.patience = patience or (HUNG_SECONDS if expect is None else SILENT_SECONDS)
        try:
            if expect is None:
                self._probe.wait_for_boot(seconds)
            else:
                self.found = self.console.wait_for(expect, seconds, failures)
        except BaseException:
            self.kill()
            raise
        self._booted = True
        self.boot_seconds = time.monotonic() - started

    def _start(self, executable: str) -> None:
        folder, setup = self.folder, self.setup
        (folder / "firmware.log").unlink(missing_ok=True)  # another guest's, in a folder that is used again
        if not (setup.from_disk or setup.uefi or setup.kernel):
            (folder / "probe.img").write_bytes(floppy_image())
        serial, their_serial = socket.socketpair()
        monitor, their_monitor = socket.socketpair()
        port, their_port = socket.socketpair()
        with serial, port, their_serial, their_monitor, their_port, (folder / "stderr.log").open("wb") as stderr:
            fds = their_serial.fileno(), their_monitor.fileno(), their_port.fileno()
            # A path of pytest's is often too long for a Unix socket.
            self._sockets = Path(tempfile.mkdtemp(prefix="vmdk-", dir="/tmp")) if setup.hold else None
            channels = Channels(fds[0], fds[1], self._sockets, fds[2] if setup.kernel else None)
            self.command = [executable, *arguments(setup, folder, channels)]
            self.command_by_hand = shlex.join([executable, *by_hand(setup, folder)])
            (folder / "command").write_text(f"{self.command_by_hand}\n")
            self._log = (folder / "serial.log").open("wb", buffering=0)
            # A session of its own: Ctrl-C is for the caller, who then ends QEMU, and the kernel's scheduler gives each
            # session its share, however many guests one caller has.
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=fds,
                start_new_session=True,
            )
            self.qmp = Qmp(monitor, setup.image.name, folder / "qmp.log")
            main = port.detach() if setup.kernel else serial.detach()
            line = Console(main, self._process.pid, self.qmp, folder / "firmware.log", self.failure)
            if setup.kernel:
                line.listen(serial.detach(), self._log)
            else:
                line.logfile_read = self._log
        line.own_disks = setup.drive is None
        line.explain_end = self._death
        self.console = line
        """The guest's serial line, or the port for its commands: `expect` and `send` as pexpect has them."""
        self._probe = ProbeSession(line, setup.image.name, self._death, self.failure)
        self._probe.memory = self.memory

    @property
    def probe(self) -> ProbeSession:
        """The session with the probe.

        Raises:
            InvalidRequest: the disk's own system was booted, with `expect`.
        """
        if self._own_system:
            raise InvalidRequest("probe", f"{self.setup.image.name} {_NO_PROBE}")
        return self._probe

    @property
    def pid(self) -> int:
        """The process ID of QEMU."""
        return self._process.pid

    def failure(self, reason: str) -> GuestError:
        """Return the error of a guest that has failed, with its report; QEMU is ended, or held for a look at it."""
        if not self._booted and self.setup.accelerator == "kvm" and (fault := kvm_fault()) is not None:
            reason = f"{reason}; {fault} (see qemu-vmdk-snap doctor)"
        error = GuestError(self.setup.image.name, reason)
        if self.report is None:
            self.qmp.drain()
            images = [disk.image for disk in self.setup.images if disk.image_format == "vmdk"]
            self.report = gather(reason, images, self.folder, self._asked(), self.command_by_hand)
            (self.folder / "report.txt").write_text(f"{self.report}\n")
        error.logs = self.folder
        error.add_note(str(self.report))
        if self._sockets is not None and isinstance(self._asked(), Qmp):
            error.add_note(self._hold(self._sockets))
        return error

    def memory(self, address: int, length: int) -> bytes:
        """Return so many bytes of the guest's memory, at a physical address."""
        path = self.folder / "memory.bin"
        self.qmp("pmemsave", {"val": address, "size": length, "filename": str(path.absolute())})
        data = path.read_bytes()
        path.unlink()
        return data

    def assert_reads(self, content: Content | Known | None = None, *, disk: int = 0, samples: int = 8) -> int:
        """Let the guest read from a disk what was written to it, and return the bytes that were compared.

        Without `content` that of the chain that the machine was booted on. See `ProbeSession.assert_reads`.

        Raises:
            WrongContent, WrongSize (AssertionError): it reads something else.
            InvalidRequest: nothing is known of what was written, or the disk's own system was booted, with `expect`.
        """
        if self._own_system:
            raise InvalidRequest("assert_reads", f"{self.setup.image.name} {_NO_PROBE}")
        known = self.known if content is None else content
        if known is None:
            raise InvalidRequest("assert_reads", "needs the content, unless a known chain was booted")
        model = known if isinstance(known, Content) else known.model
        if disk:
            self.probe.select(disk)
        try:
            setup = self.setup.images[disk]
            image = setup.image if setup.image_format == "vmdk" else None
            return self.probe.assert_reads(model, image=image, samples=samples)
        finally:
            if disk:
                self.probe.select(0)

    def power_off(self, status: int = 0) -> None:
        """Let the probe switch off, and return when QEMU has ended and released the image.

        A system of the disk's own has its power button pressed (ACPI), and chooses no status.

        Raises:
            GuestError: QEMU does not end, or not with the status that was asked for.
            InvalidRequest: the disk's own system was booted, with `expect`, and a status is asked for.
        """
        if self._own_system and status:
            raise InvalidRequest("power_off", f"the status {status}: {self.setup.image.name} {_NO_PROBE}")
        self.console.end_is_expected = True
        if self._own_system:
            with contextlib.suppress(GuestError):  # QEMU may have ended by itself: its exit status is the answer
                self.qmp("system_powerdown")
            self.console.wait_for_end("the guest to switch off, its power button pressed", SYSTEM_SECONDS)
            self.wait()
            return
        try:
            self.probe.power_off(status)
        except GuestError:
            # QEMU may be gone before its last answer has left: then its exit status is the answer.
            if self._process.poll() is None:
                raise
        self.wait(2 * status + 1)

    def wait(self, status: int = 0) -> None:
        """Return when QEMU has ended with this exit status.

        Raises:
            GuestError: it does not end, or ends with another one.
        """
        self.console.end_is_expected = True
        try:
            code = self._process.wait(scaled(_EXIT_SECONDS))
        except subprocess.TimeoutExpired:
            error = self.failure("QEMU did not end after the guest switched off")
            self.kill()
            raise error from None
        self.kill()
        if code != status:
            raise self.failure(f"QEMU ended with {code}, not {status}: {self._last_words()}")

    def kill(self) -> None:
        """End QEMU at once, as a power cut would; harmless when it has ended. One that is held continues."""
        if self._held:
            self._process.returncode = 0  # it is not ours any more: no warning that it still runs
        elif self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        with contextlib.suppress(GuestError):  # a panic, of which nobody waits to hear any more
            self.console.drain()
        self._probe.close()
        self.qmp.close()
        self._log.close()
        if self._sockets is not None and not self._held:
            shutil.rmtree(self._sockets, ignore_errors=True)

    def __enter__(self) -> Self:
        """Return the machine."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End QEMU if it still runs."""
        self.kill()

    def _asked(self) -> Qmp | str:
        """Return the monitor, or why it will not answer."""
        if self._process.poll() is not None:
            return "QEMU has ended"
        return "QEMU is stopped by a signal" if is_stopped(self.pid) else self.qmp

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(scaled(_DEATH_SECONDS))
            self.qmp.drain()
            told = [reason for event in self.qmp.events if (reason := bad_news(event))]
            if told and code == 0:
                return told[-1]
            return f"QEMU ended with {code}: {self._last_words()}"
        return "QEMU closed the serial line"

    def _last_words(self) -> str:
        lines = (self.folder / "stderr.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def _hold(self, sockets: Path) -> str:
        """Hand the console over to a socket, and return how to get at the guest and end it."""
        console, monitor = sockets / "console", sockets / "monitor"
        if not self._held:
            address = {"type": "unix", "data": {"path": str(console)}}
            backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
            self.qmp("chardev-change", {"id": "line", "backend": backend})
            self._held = True
        return (
            f"the guest still runs, process {self.pid}; its console: socat -,rawer UNIX-CONNECT:{console}; "
            f"QEMU's monitor: socat - UNIX-CONNECT:{monitor}; end it: kill {self.pid}"
        )


class Booting(AbstractContextManager[Machine]):
    """A machine from its start to its end, and what becomes of its logs."""

    def __init__(self, setup: Setup, log_dir: Path | None, chain: Known | None, options: dict[str, Any]) -> None:
        self._setup, self._log_dir, self._chain, self._options = setup, log_dir, chain, options
        self._machine: Machine | None = None

    def __enter__(self) -> Machine:
        self._setup.validate()
        if self._chain is not None:
            read_links(self._chain.top)
        self._folder = self._log_dir or Path(tempfile.mkdtemp(prefix="qemu-vmdk-snap-guest-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._machine = Machine(self._setup, self._folder, **self._options)
        except GuestError as error:
            raise error.with_traceback(None) from None
        except BaseException:
            self._clean()
            raise
        self._machine.known = self._chain
        return self._machine

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self._machine is not None
        failed = error is not None and not isinstance(error, (OSError, KeyboardInterrupt, GeneratorExit))
        if isinstance(error, VmdkSnapError) and not isinstance(error, GuestError):
            failed = False  # no fault of the guest: its logs tell nothing
        if isinstance(error, GuestError) and error.logs is None:
            error.logs = self._folder
            error.add_note(str(self._report(error.reason)))
        elif failed and error is not None and not isinstance(error, GuestError):
            self._report(str(error) or type(error).__name__)  # a test's own assertion: pytest shows the note
            error.add_note(f"logs of the guest: {self._folder}")
        self._machine.kill()
        if not failed:
            self._clean()

    def _report(self, reason: str) -> FailureReport | None:
        if self._machine is not None and self._machine.report is None:
            self._machine.failure(reason)
        return self._machine.report if self._machine is not None else None

    def _clean(self) -> None:
        if self._log_dir is None:
            shutil.rmtree(self._folder, ignore_errors=True)


def boot(
    image: Known | Path | str,
    *,
    image_format: str = "vmdk",
    controller: str = DEFAULT_CONTROLLER,
    from_disk: bool = False,
    writable: bool = False,
    accelerator: str | None = None,
    log_dir: Path | None = None,
    seconds: float | None = None,
    machine: str = "pc",
    disks: Sequence[Disk] = (),
    qemu: str = EXECUTABLE,
    qemu_args: Sequence[str] = (),
    uefi: bool = False,
    memory_mib: int | None = None,
    drive: str | None = None,
    patience: float | None = None,
    expect: bytes | str | re.Pattern[bytes] | None = None,
    failures: Sequence[bytes | re.Pattern[bytes]] = PANICS,
    hold: bool = False,
) -> AbstractContextManager[Machine]:
    """Give a machine with the probe booted on `image` (and its backing chain, as QEMU's own driver opens it).

    `image` may be a `KnownChain`: then `assert_reads` knows what should be read, and the CIDs are checked first.

    With `expect` the disk's own system boots, and is ready when that pattern has come out of its first serial port;
    one of `failures` there, or the firmware that finds nothing to boot, ends the wait.

    A guest that shows no sign of life for two seconds of its own time hangs (with `expect` for thirty, unless its
    processor is halted, or loops with interrupts off, for good); `seconds`, of its own time too, is the limit for one
    that does: 15, or with `expect` 300. Waiting for a processor or for the host's disk is not its own time.

    The logs (QEMU's command line, its standard error, serial line, firmware, QMP) go to `log_dir`, or to a temporary
    folder that is kept when the guest or the caller's own check fails; the error, or a note on it, then names it.
    `hold` leaves a guest that fails running. `drive` takes the place of the file in QEMU's `-drive`, as
    `file.driver=nbd,...`; `patience` that of the two and the thirty seconds, which `drive` has too.

    Raises:
        InvalidRequest: there is no such controller, or there are too many disks.
        PluginError: QEMU is not installed.
        GuestError: QEMU died, or the guest did not boot or answer; its notes have the whole report.
        CidMismatch, CorruptChain, FormatError: the known chain is not what it was.
    """
    pattern = expect.encode() if isinstance(expect, str) else expect
    own_system = expect is not None
    setup = Setup(
        image.top if isinstance(image, Known) else Path(image),
        image_format,
        controller,
        from_disk or own_system,
        writable,
        accelerator or choose_accelerator(),
        qemu=qemu,
        machine=machine,
        disks=tuple(disks),
        qemu_args=tuple(qemu_args),
        uefi=uefi,
        memory_mib=memory_mib or (512 if own_system else 16),
        drive=drive,
        hold=hold,
    )
    if patience is None and drive is not None:
        patience = SILENT_SECONDS  # whoever has the disk may be slow, or be started again
    known = image if isinstance(image, Known) else None
    return Booting(
        setup,
        log_dir,
        known,
        {
            "seconds": seconds or (SYSTEM_SECONDS if own_system else BOOT_SECONDS),
            "expect": pattern,
            "failures": failures,
            "patience": patience,
        },
    )
