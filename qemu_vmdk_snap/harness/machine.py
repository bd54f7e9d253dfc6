"""A QEMU process of our own with the probe booted on an image; nothing survives it but its logs."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from qemu_vmdk_snap.errors import GuestError, InvalidRequest, PluginError, VmdkSnapError
from qemu_vmdk_snap.harness.accelerator import choose_accelerator
from qemu_vmdk_snap.harness.deadlines import scaled
from qemu_vmdk_snap.harness.probe import floppy_image
from qemu_vmdk_snap.harness.session import BOOT_SECONDS, ProbeSession, over_descriptor
from qemu_vmdk_snap.units import TIB

CONTROLLERS: Final[dict[str, tuple[str, ...]]] = {
    "ide": ("-device", "ide-hd,drive=disk"),
    "ahci": ("-device", "ahci,id=ahci", "-device", "ide-hd,drive=disk,bus=ahci.0"),
    "virtio-blk": ("-device", "virtio-blk-pci,drive=disk"),
    "virtio-scsi": ("-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk"),
    "pvscsi": ("-device", "pvscsi", "-device", "scsi-hd,drive=disk"),
    "lsi": ("-device", "lsi53c895a", "-device", "scsi-hd,drive=disk"),
    "nvme": ("-device", "nvme,drive=disk,serial=probe"),
}
"""How the disk under test is attached: QEMU's arguments, the drive being `disk`."""

REACH: Final[dict[str, int]] = dict.fromkeys(("virtio-scsi", "pvscsi", "lsi"), 2 * TIB)
"""Bytes that the BIOS sees of a disk, where that has a limit: SeaBIOS 1.16 asks SCSI disks in 32 bits only."""

DEFAULT_CONTROLLER: Final = "ahci"
EXECUTABLE: Final = "qemu-system-x86_64"
_MEMORY_MIB: Final = 16
_EXIT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What a machine is made of."""

    image: Path
    image_format: str = "vmdk"
    controller: str = DEFAULT_CONTROLLER
    from_disk: bool = False
    """Boot from the disk under test, which begins with the probe, not from the probe's floppy."""
    writable: bool = False
    """Let the guest's writes reach the image; else they go to a temporary file, and the image is only read."""
    accelerator: str | None = None
    """`tcg` or `kvm`; None: kvm where a boot has shown it to be faster here."""
    qemu: str = EXECUTABLE


class Machine:
    """A running QEMU; `probe` is the session with the guest. Use it in a `with` block."""

    def __init__(self, setup: Setup, folder: Path, seconds: float = BOOT_SECONDS) -> None:
        """Start QEMU, its logs going to `folder`; `boot` is the usual way.

        Raises:
            PluginError: QEMU is not installed.
            GuestError: QEMU ended at once, or the probe did not boot.
        """
        self.setup = setup
        self.folder = folder
        executable = shutil.which(setup.qemu)
        if executable is None:
            raise PluginError(setup.qemu, "is not installed (Debian: qemu-system-x86, Fedora: qemu-system-x86-core)")
        started = time.monotonic()
        ours, theirs = socket.socketpair()
        with ours, theirs, (folder / "stderr.log").open("wb") as stderr:
            self.command = [executable, *_arguments(setup, folder, theirs.fileno())]
            (folder / "command").write_text(shlex.join(self.command) + "\n")
            self._log = (folder / "serial.log").open("wb", buffering=0)
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, pass_fds=[theirs.fileno()]
            )
            self.probe = ProbeSession(over_descriptor(ours.detach(), self._log), setup.image.name, self._death)
        try:
            self.probe.wait_for_boot(seconds)
        except BaseException:
            self.kill()
            raise
        self.boot_seconds = time.monotonic() - started

    @property
    def pid(self) -> int:
        """The process ID of QEMU."""
        return self._process.pid

    def power_off(self, status: int = 0) -> None:
        """Let the probe switch off, and return when QEMU has ended and let go of the image.

        Raises:
            GuestError: QEMU does not end, or not with the status that was asked for.
        """
        try:
            self.probe.power_off(status)
        except GuestError:
            # QEMU may be gone before its last answer has left: then its exit status is the answer.
            if self._process.poll() is None:
                raise
        try:
            code = self._process.wait(scaled(_EXIT_SECONDS))
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise GuestError(self.setup.image.name, "QEMU did not end after the probe switched off") from error
        self.kill()
        if code != 2 * status + 1:
            raise GuestError(
                self.setup.image.name, f"QEMU ended with {code}, not {2 * status + 1}: {self._last_words()}"
            )

    def kill(self) -> None:
        """End QEMU at once, as a power cut would; harmless when it has ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self.probe.close()
        self._log.close()

    def __enter__(self) -> Self:
        """Return the machine."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End QEMU if it still runs."""
        self.kill()

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(scaled(2.0))
            return f"QEMU ended with {code}: {self._last_words()}"
        return "QEMU closed the serial line"

    def _last_words(self) -> str:
        lines = (self.folder / "stderr.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


@contextlib.contextmanager
def boot(
    image: Path | str,
    *,
    image_format: str = "vmdk",
    controller: str = DEFAULT_CONTROLLER,
    from_disk: bool = False,
    writable: bool = False,
    accelerator: str | None = None,
    log_dir: Path | None = None,
    seconds: float = BOOT_SECONDS,
) -> Iterator[Machine]:
    """Give a machine with the probe booted on `image` (and the chain behind it, as QEMU's own driver opens it).

    The logs (QEMU's command line, its stderr, the serial line) go to `log_dir`, or to a temporary folder that is kept
    when the guest or the caller's own check fails; the error, or a note on it, then names it.

    Raises:
        InvalidRequest: there is no such controller.
        PluginError: QEMU is not installed.
        GuestError: QEMU died, or the probe did not boot (in `seconds` of an ordinary machine) or answer.
    """
    if controller not in CONTROLLERS:
        raise InvalidRequest("controller", f"{controller!r} is not one of {', '.join(CONTROLLERS)}")
    setup = Setup(Path(image), image_format, controller, from_disk, writable, accelerator or choose_accelerator())
    folder = log_dir or Path(tempfile.mkdtemp(prefix="qemu-vmdk-snap-guest-"))
    folder.mkdir(parents=True, exist_ok=True)
    keep = log_dir is not None
    try:
        with Machine(setup, folder, seconds) as machine:
            yield machine
    except GuestError as error:
        keep = True
        raise GuestError(error.guest, f"{error.reason} (logs: {folder})") from error
    except (VmdkSnapError, OSError, KeyboardInterrupt, GeneratorExit):
        raise  # no fault of the guest: its logs tell nothing
    except BaseException as error:  # a test's own assertion: pytest shows the note
        keep = True
        error.add_note(f"logs of the guest: {folder}")
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _arguments(setup: Setup, folder: Path, serial_fd: int) -> list[str]:
    """Return QEMU's arguments: a PC with nothing but the serial line, the floppy and the disk under test."""
    image = str(setup.image.absolute()).replace(",", ",,")
    # Without `snapshot=on` a guest could not be kept from writing: IDE has no read-only disks.
    access = "" if setup.writable else ",snapshot=on"
    words: list[str] = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    words += ["-machine", "pc", "-accel", setup.accelerator or "tcg", "-m", str(_MEMORY_MIB)]
    words += ["-chardev", f"socket,id=line,fd={serial_fd}", "-serial", "chardev:line"]
    words += ["-device", "isa-debug-exit,iobase=0x501,iosize=1"]
    words += ["-drive", f"if=none,id=disk,format={setup.image_format},file={image}{access}"]
    words += CONTROLLERS[setup.controller]
    if setup.from_disk:
        return [*words, "-boot", "order=c"]
    floppy = folder / "probe.img"
    floppy.write_bytes(floppy_image())
    name = str(floppy.absolute()).replace(",", ",,")
    return [*words, "-drive", f"if=floppy,format=raw,readonly=on,file={name}", "-boot", "order=a"]
