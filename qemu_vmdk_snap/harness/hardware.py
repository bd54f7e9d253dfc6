"""What a machine is made of, as QEMU's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.errors import InvalidRequest
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

LINUX_CONTROLLERS: Final = ("virtio-blk", "virtio-scsi", "nvme", "ide", "ahci", "pvscsi")
"""Those that the Linux guest has drivers for; `ahci` takes the generic kernel, a larger download."""

REACH: Final[dict[str, int]] = dict.fromkeys(("virtio-scsi", "pvscsi", "lsi"), 2 * TIB)
"""Bytes that the BIOS sees of a disk, where that has a limit: SeaBIOS 1.16 asks SCSI disks in 32 bits only."""

DEFAULT_CONTROLLER: Final = "ahci"
MACHINES: Final = ("pc", "q35")
EXECUTABLE: Final = "qemu-system-x86_64"
MEMORY_MIB: Final = 16
MAX_DISKS: Final = 4
COMMANDS: Final = "qemu-vmdk-snap"
"""The name of the port for commands."""

_UEFI: Final = (
    Path("/usr/share/OVMF/OVMF_CODE_4M.fd"),
    Path("/usr/share/OVMF/OVMF_CODE.fd"),
    Path("/usr/share/edk2/ovmf/OVMF_CODE.fd"),
)


@dataclass(frozen=True, slots=True)
class Disk:
    """One more disk of a machine."""

    image: Path
    image_format: str = "vmdk"
    writable: bool = False


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
    machine: str = "pc"
    """`pc` or `q35`, or another name that QEMU knows."""
    disks: tuple[Disk, ...] = ()
    """Further disks, on the same kind of controller."""
    qemu_args: tuple[str, ...] = ()
    """Further arguments for QEMU, after all others."""
    memory_mib: int = MEMORY_MIB
    uefi: bool = False
    """Boot by UEFI from the disk; the probe, which needs a BIOS, then cannot run."""
    kernel: tuple[str, ...] = ()
    """QEMU's arguments for a kernel that it boots itself, in the probe's place; it is told what to do over a port."""
    drive: str | None = None
    """What QEMU's `-drive` is told of the first disk in the place of its file: `file.driver=nbd,...`."""
    hold: bool = False
    """Leave a guest that fails running, its console and monitor on sockets."""

    @property
    def images(self) -> tuple[Disk, ...]:
        """All disks, the first is the one under test."""
        return (Disk(self.image, self.image_format, self.writable), *self.disks)

    def validate(self) -> None:
        """Refuse what no machine can be made of.

        Raises:
            InvalidRequest: there is no such controller, or there are too many disks.
        """
        if self.controller not in CONTROLLERS:
            raise InvalidRequest("controller", f"{self.controller!r} is not one of {', '.join(CONTROLLERS)}")
        if len(self.images) > MAX_DISKS:
            raise InvalidRequest("disks", f"{len(self.images)} are more than the {MAX_DISKS} of a machine")


@dataclass(frozen=True, slots=True)
class Channels:
    """The descriptors that QEMU inherits, and the folder for the sockets of a guest that is to be held."""

    serial: int
    qmp: int
    sockets: Path | None = None
    commands: int | None = None
    """For a guest that is told what to do over a port of its own, beside the serial line."""


def arguments(setup: Setup, folder: Path, channels: Channels) -> list[str]:
    """Return QEMU's arguments: a PC with nothing but serial line, monitor, floppy and the disks under test."""
    words = ["-chardev", f"socket,id=line,fd={channels.serial}", "-serial", "chardev:line"]
    words += ["-chardev", f"socket,id=qmp,fd={channels.qmp}", "-mon", "chardev=qmp,mode=control"]
    words += ["-chardev", f"file,id=firmware,path={_escaped(folder / 'firmware.log')}"]
    if channels.sockets is not None:
        words += ["-chardev", f"socket,id=monitor,path={_escaped(channels.sockets / 'monitor')},server=on,wait=off"]
        words += ["-mon", "chardev=monitor,mode=readline", "-no-shutdown"]
    if channels.commands is not None:
        words += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=commands,fd={channels.commands}"]
        words += ["-device", f"virtserialport,chardev=commands,name={COMMANDS}"]
    return [*_board(setup), *words, *_disks(setup, {}), *_boot(setup, folder), *setup.qemu_args]


def by_hand(setup: Setup, folder: Path) -> list[str]:
    """Return the arguments that boot the same from a shell: console and monitor on the terminal, no image written."""
    words = ["-serial", "mon:stdio", "-chardev", "file,id=firmware,path=/dev/stderr"]
    return [*_board(setup), *words, *_disks(setup, {"snapshot": "on"}), *_boot(setup, folder), *setup.qemu_args]


def _board(setup: Setup) -> list[str]:
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    words += ["-machine", setup.machine, "-accel", setup.accelerator or "tcg", "-m", str(setup.memory_mib)]
    # A guest that panics stands still, so that QEMU can be asked about it.
    words += ["-device", "isa-debug-exit,iobase=0x501,iosize=1", "-device", "pvpanic", "-action", "panic=pause"]
    return [*words, "-device", "isa-debugcon,iobase=0x402,chardev=firmware"]


def _disks(setup: Setup, forced: dict[str, str]) -> list[str]:
    words: list[str] = []
    for number, disk in enumerate(setup.images):
        name = "disk" if number == 0 else f"disk{number}"
        # Without `snapshot=on` a guest could not be kept from writing: IDE has no read-only disks.
        options = dict.fromkeys(("snapshot",), "on") if not disk.writable else {}
        tail = "".join(f",{key}={value}" for key, value in (options | forced).items())
        where = f"file={_escaped(disk.image)}" if number or setup.drive is None else setup.drive
        words += ["-drive", f"if=none,id={name},format={disk.image_format},{where}{tail}"]
        attached = CONTROLLERS[setup.controller]
        own = attached[-2:]  # what goes before is the controller, which the first disk has brought
        device = own[1].replace("drive=disk", f"drive={name}").replace("ahci.0", f"ahci.{number}")
        device = device.replace("serial=probe", "serial=probe" if number == 0 else f"serial=probe{number}")
        words += [*(attached[:-2] if number == 0 else ()), own[0], device]
    return words


def _boot(setup: Setup, folder: Path) -> list[str]:
    if setup.kernel:
        return list(setup.kernel)
    if setup.uefi:
        return ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={_firmware()}"]
    if setup.from_disk:
        return ["-boot", "order=c"]
    drive = f"format=raw,readonly=on,file={_escaped(folder / 'probe.img')}"
    if setup.machine.startswith(("q35", "pc-q35")):  # a board without a floppy controller
        return ["-device", "isa-fdc", "-drive", f"if=none,id=probe,{drive}", "-device", "floppy,drive=probe", *_FROM_A]
    return ["-drive", f"if=floppy,{drive}", *_FROM_A]


_FROM_A: Final = ("-boot", "order=a")


def _firmware() -> Path:
    for path in _UEFI:
        if path.exists():
            return path
    raise InvalidRequest("uefi", "there is no OVMF here (Debian: ovmf, Fedora: edk2-ovmf)")


def _escaped(path: Path) -> str:
    return str(path.absolute()).replace(",", ",,")
