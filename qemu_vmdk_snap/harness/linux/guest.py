"""A Linux on the images under test: framed commands with an exit status, file systems, discard, a load of stamps."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, NamedTuple, Self

from qemu_vmdk_snap.errors import GuestError, InvalidRequest, printable
from qemu_vmdk_snap.harness.accelerator import choose_accelerator
from qemu_vmdk_snap.harness.hardware import EXECUTABLE, Disk, Setup
from qemu_vmdk_snap.harness.hardware import LINUX_CONTROLLERS as CONTROLLERS
from qemu_vmdk_snap.harness.known.content import Known
from qemu_vmdk_snap.harness.linux.build import GENERIC, Guest, Kernel, build_guest
from qemu_vmdk_snap.harness.machine import Booting, Machine
from qemu_vmdk_snap.units import SECTOR_SIZE

__tracebackhide__ = True

FILE_SYSTEMS: Final = {
    "ext4": ("/tools/mke2fs -q -F -t ext4 {}", "/tools/e2fsck -f -n {}"),
    "xfs": ("/tools/mkfs.xfs -q -f {}", "/tools/xfs_repair -n {}"),
    "vfat": ("/tools/mkfs.fat {} >/dev/null", "/tools/fsck.fat -n {}"),
}
"""How each is made, and checked without changing anything."""

BOOT_SECONDS: Final = 60.0
_SILENT_SECONDS: Final = 10.0
_MEMORY_MIB: Final = 256
_COMMAND_SECONDS: Final = 60.0
_APPEND: Final = "console=ttyS0 quiet panic=-1 nokaslr mitigations=off no_timer_check tsc=reliable cryptomgr.notests"
# The local timer is measured for a fifth of a second, and an interrupt that ACPI routes takes an interpreter, where the
# BIOS has told it long ago: both take longer than all that the guest does after its kernel has started.
_EMULATED: Final = "noapictimer"
_EMULATED_PC: Final = "acpi=noirq pci=nomsi"
_NAMES: Final = {"virtio-blk": "vd{}", "nvme": "nvme{}n1"}
_SHOWN: Final = 400


class Ran(NamedTuple):
    """How a command ended."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output, as text without the blanks around it."""
        return self.stdout.decode(errors="replace").strip()


class CommandFailed(GuestError):
    """The guest is well; a command in it ended with another exit status than 0."""

    def __init__(self, guest: str, command: str, status: int, stderr: str) -> None:
        super().__init__(guest, f"{command!r} ended with exit status {status}: {stderr or 'no output'}")
        self.args = (guest, command, status, stderr)
        self.command, self.status, self.stderr = command, status, stderr


class LinuxGuest:
    """A booted Linux; use it in a `with` block. Paths and commands are the guest's, sizes bytes, times its own time."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._name = machine.setup.image.name
        self._number = 0
        assert machine.found is not None, "it says so when it has booted"
        self._disks = machine.found[1].decode().split()

    def disk(self, number: int = 0) -> str:
        """Return the device of a disk: `/dev/vda`; of SCSI, IDE and NVMe the first need not be `sda` or `nvme0n1`."""
        return f"/dev/{self._disks[number]}"

    def run(self, command: str, *, timeout: float = _COMMAND_SECONDS) -> Ran:
        """Run a shell script in the guest, and return its exit status, output and errors.

        Raises:
            GuestError: the guest panicked, is gone, or the script takes longer than `timeout`.
        """
        self._number += 1
        console = self.machine.console
        console.patience = timeout
        line = f"{self._number} {base64.b64encode(command.encode()).decode()}\n"
        try:
            console.send(line.encode())
        except OSError:
            raise self.machine.failure(f"{command!r}: the guest is gone") from None
        wanted = re.compile(rb"^%d (\d+) (\d+) (\d+)\r?\n" % self._number, re.MULTILINE)
        what = f"the end of {_short(command)!r}"
        console.expect_named(what, wanted, timeout)
        status, out, err = (int(value) for value in console.match.groups())  # type: ignore[union-attr]
        both = self._exactly(out + err, timeout, what)
        return Ran(status, both[:out], both[out:])

    def check(self, command: str, *, timeout: float = _COMMAND_SECONDS) -> str:
        """Run a shell script that must end with 0, and return its output as text.

        Raises:
            CommandFailed: it does not.
            GuestError: see `run`.
        """
        ran = self.run(command, timeout=timeout)
        if ran.status:
            said = ran.stderr.decode(errors="replace").strip().splitlines()
            raise CommandFailed(self._name, _short(command), ran.status, printable(said[-1]) if said else "")
        return ran.text

    def mkfs(self, kind: str, disk: int = 0) -> None:
        """Make a file system on a whole disk: ext4, xfs or vfat."""
        self._need(kind)
        self.check(FILE_SYSTEMS[kind][0].format(self.disk(disk)))

    def mount(self, kind: str, disk: int = 0, at: str = "/mnt", options: str = "rw") -> None:
        """Mount a disk."""
        self._need(kind)
        place = shlex.quote(at)
        self.check(f"mkdir -p {place} && mount -t {kind} -o {shlex.quote(options)} {self.disk(disk)} {place}")

    def umount(self, at: str = "/mnt") -> None:
        """Unmount what is mounted at a place: all of it is on the disk then."""
        self.check(f"umount {shlex.quote(at)}")

    def fsck(self, kind: str, disk: int = 0) -> Ran:
        """Check a file system, which is not mounted, and return how its checker ended: 0 is clean."""
        self._need(kind)
        return self.run(FILE_SYSTEMS[kind][1].format(self.disk(disk)))

    def sha256(self, folder: str = "/mnt") -> dict[str, str]:
        """Return the SHA-256 of every file below a folder, by its name in there."""
        told = self.check(f"cd {shlex.quote(folder)} && find . -type f -exec sha256sum {{}} +")
        pairs = (line.split(None, 1) for line in told.splitlines())
        return {name.strip().removeprefix("./"): digest for digest, name in pairs}

    def write(self, offset: int, data: bytes, disk: int = 0) -> None:
        """Write whole sectors to a disk and flush them."""
        if offset % SECTOR_SIZE or len(data) % SECTOR_SIZE:
            raise InvalidRequest("write", f"bytes {offset} to {offset + len(data)} are no whole sectors")
        text = base64.b64encode(data).decode()
        options = f"bs=512 seek={offset // SECTOR_SIZE} conv=notrunc,fsync"
        self.check(f"base64 -d <<'END' | dd of={self.disk(disk)} {options} 2>/dev/null\n{text}\nEND")

    def read(self, offset: int, length: int, disk: int = 0) -> bytes:
        """Return whole sectors of a disk, past the guest's own cache."""
        if offset % SECTOR_SIZE or length % SECTOR_SIZE:
            raise InvalidRequest("read", f"bytes {offset} to {offset + length} are no whole sectors")
        skip, count = offset // SECTOR_SIZE, length // SECTOR_SIZE
        device = self.disk(disk)
        ran = self.run(f"blockdev --flushbufs {device}; dd if={device} bs=512 skip={skip} count={count} 2>/dev/null")
        return ran.stdout

    def discard(self, offset: int, length: int, disk: int = 0) -> Ran:
        """Discard a range of a disk, and return how `blkdiscard` ended: a device without discard refuses."""
        return self.run(f"blkdiscard -o {offset} -l {length} {self.disk(disk)}")

    def flush(self) -> None:
        """Bring everything that was written to the disks."""
        self.check("sync")

    def start_load(self, disk: int = 0, offset: int = 0, sectors: int = 64) -> None:
        """Let the guest write stamps over so many sectors, over and over, each durable before it is told."""
        device, first = self.disk(disk), offset // SECTOR_SIZE
        self.check(f"load {device} {first} {sectors} </dev/null >/dev/null 2>&1 & echo $! >/run/load.pid")

    def stop_load(self) -> int:
        """End the load, and return the number of the last stamp that was told.

        Raises:
            GuestError: none was, or one could not be written.
        """
        self.check("kill $(cat /run/load.pid) && while kill -0 $(cat /run/load.pid) 2>/dev/null; do usleep 10000; done")
        return self.stamps()

    def stamps(self) -> int:
        """Return the number of the last stamp that the guest told of, which is durable whatever happens to it.

        Raises:
            GuestError: one could not be written.
        """
        self.machine.console.drain()
        text = (self.machine.folder / "serial.log").read_bytes()
        if (failed := re.search(rb"guest: (stamp \d+ was not written)", text)) is not None:
            raise GuestError(self._name, failed[1].decode())
        told = re.findall(rb"guest: stamp (\d+) \d+\r?\n", text)
        return int(told[-1]) if told else 0

    def power_off(self) -> None:
        """Unmount, switch off, and return when QEMU has ended."""
        self.machine.console.end_is_expected = True
        self.machine.console.send(b"0 %s\n" % base64.b64encode(b"umount -a 2>/dev/null; sync; poweroff -f"))
        self.machine.wait(0)

    def kill(self) -> None:
        """End QEMU at once, as a power cut would."""
        self.machine.kill()

    def __enter__(self) -> Self:
        """Return the guest."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End QEMU if it still runs."""
        self.machine.kill()

    def _exactly(self, length: int, timeout: float, what: str) -> bytes:
        if not length:
            return b""
        console = self.machine.console
        console.expect_named(what, re.compile(rb"\A.{%d}" % length, re.DOTALL), timeout)
        return bytes(console.match[0])  # type: ignore[index]

    def _need(self, kind: str) -> None:
        if kind not in FILE_SYSTEMS:
            raise InvalidRequest("file system", f"{kind!r} is not one of {', '.join(FILE_SYSTEMS)}")
        self.check(f"need {kind}")


def disk_name(controller: str, number: int) -> str:
    """Return a name that Linux gives one of the disks, another for each number: `vda`, `sdb`, `nvme0n1`."""
    return _NAMES.get(controller, "sd{}").format(number if controller == "nvme" else "abcd"[number])


def kernel_arguments(controller: str, disks: int, accelerator: str, machine: str = "pc") -> str:
    """Return the kernel's command line for so many disks."""
    names = ",".join(disk_name(controller, number) for number in range(disks))
    words = [_APPEND]
    if accelerator == "tcg":
        words += [_EMULATED, _EMULATED_PC] if machine == "pc" or machine.startswith("pc-i440fx") else [_EMULATED]
    return " ".join([*words, f"controller={controller}", f"disks={names}"])


def missing_stamps(data: bytes, told: int, first: int = 0) -> list[int]:
    """Return the stamps up to number `told` that are lost: their sectors of `data` have neither them nor later ones.

    `data` is the whole stretch of the load, whose first sector is `first`.
    """
    sectors = len(data) // SECTOR_SIZE
    lost = []
    for number in range(max(1, told - sectors + 1), told + 1):
        at = (number - 1) % sectors
        found = re.match(rb"stamp (\d+) (\d+) +\n$", data[at * SECTOR_SIZE : (at + 1) * SECTOR_SIZE])
        if found is None or int(found[1]) < number or int(found[2]) != first + at:
            lost.append(number)
    return lost


class _Booting(AbstractContextManager[LinuxGuest]):
    """A Linux from its start to its end."""

    def __init__(self, booting: Booting) -> None:
        self._booting = booting

    def __enter__(self) -> LinuxGuest:
        return LinuxGuest(self._booting.__enter__())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._booting.__exit__(kind, error, trace)


def boot_linux(
    image: Known | Path | str,
    *,
    image_format: str = "vmdk",
    controller: str = "virtio-blk",
    writable: bool = False,
    disks: Sequence[Disk] = (),
    accelerator: str | None = None,
    machine: str = "pc",
    kernel: Kernel | None = None,
    guest: Guest | None = None,
    log_dir: Path | None = None,
    seconds: float = BOOT_SECONDS,
    qemu: str = EXECUTABLE,
    qemu_args: Sequence[str] = (),
    memory_mib: int = _MEMORY_MIB,
    drive: str | None = None,
    hold: bool = False,
    check_cids: bool = True,
) -> AbstractContextManager[LinuxGuest]:
    """Give a Linux booted beside `image`, which is its first disk; the rest is as with `harness.boot`.

    The guest of the cache is made first if need be, before any time is taken; `guest` is one made elsewhere.

    Raises:
        InvalidRequest: it has no driver for the controller.
        PluginError: QEMU is not installed, or the guest cannot be made here.
        GuestError: it does not boot; see `harness.boot`.
        CidMismatch: a parent was written after its overlay was made; see `harness.boot`.
    """
    if controller not in CONTROLLERS:
        raise InvalidRequest("controller", f"the Linux guest has {', '.join(CONTROLLERS)}, not {controller!r}")
    made = guest or build_guest(kernel or ("generic" if controller in GENERIC else "cloud"))
    chosen = accelerator or choose_accelerator()
    setup = Setup(
        image.top if isinstance(image, Known) else Path(image),
        image_format,
        controller,
        writable=writable,
        accelerator=chosen,
        qemu=qemu,
        machine=machine,
        disks=tuple(disks),
        qemu_args=tuple(qemu_args),
        memory_mib=memory_mib,
        kernel=(
            *("-kernel", str(made.kernel), "-initrd", str(made.initrd)),
            *("-append", kernel_arguments(controller, 1 + len(disks), chosen, machine)),
        ),
        drive=drive,
        hold=hold,
    )
    options = {
        "seconds": seconds,
        "expect": re.compile(rb"^ready([^\r\n]*)\r?\n", re.MULTILINE),
        "patience": _SILENT_SECONDS,
    }
    return _Booting(Booting(setup, log_dir, image if isinstance(image, Known) else None, options, check_cids))


def _short(command: str) -> str:
    return command if len(command) <= _SHOWN else f"{command[:_SHOWN]}..."
