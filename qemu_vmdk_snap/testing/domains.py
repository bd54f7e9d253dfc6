"""A libvirt domain on a chain, with the probe in it; for tests, on a connection of the caller's."""

from __future__ import annotations

import itertools
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from xml.sax.saxutils import quoteattr

from qemu_vmdk_snap import chain_info
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.errors import GuestError, InvalidRequest, VmdkSnapError
from qemu_vmdk_snap.harness import KnownChain, attach, floppy_image
from qemu_vmdk_snap.harness.deadlines import scaled
from qemu_vmdk_snap.harness.stale import refuse_stale
from qemu_vmdk_snap.testing.buses import BUSES

if TYPE_CHECKING:
    from typing import IO

    from qemu_vmdk_snap.harness import ProbeSession

__tracebackhide__ = True

_TARGETS: Final = {"ide": "hda", "sata": "sda", "virtio": "vda", "scsi": "sda"}
_OFF_SECONDS: Final = 20.0
_NOTICED_SECONDS: Final = 2.0

# libvirt's own numbers, and the words of `virsh domstate --reason`.
_RUNNING: Final = (1, 2)
_GONE: Final = (0, 5, 6)
_STATES: Final = {
    1: "running",
    2: "running",
    3: "paused",
    4: "being shut down",
    5: "shut off",
    6: "crashed",
    7: "suspended by its guest",
}
_REASONS: Final = {
    (3, 1): "user",
    (3, 5): "I/O error",
    (5, 1): "shutdown",
    (5, 2): "destroyed",
    (5, 3): "crashed",
    (5, 6): "failed",
}
_numbers = itertools.count(1)


class GuestDomain:
    """A defined domain with one VMDK disk, and the probe on a floppy; off until `start`. Use it in a `with` block."""

    def __init__(
        self,
        conn: Any,  # noqa: ANN401 - a libvirt.virConnect
        image: KnownChain | Path | str,
        folder: Path,
        *,
        controller: str = "ahci",
        name: str | None = None,
        domain_type: str = "qemu",
        check_cids: bool = True,
    ) -> None:
        """Define it on `conn`; sockets and logs go to `folder`, whose path must be short (Unix sockets: 108 bytes).

        `check_cids=False` starts it on a chain whose CIDs do not fit, too.

        Raises:
            InvalidRequest: there is no such controller, or the folder's path is too long.
            libvirt.libvirtError: libvirt refuses it.
        """
        if controller not in BUSES:
            raise InvalidRequest("controller", f"{controller!r} is not one of {', '.join(BUSES)}")
        self.known = image if isinstance(image, KnownChain) else None
        self.folder = folder
        self.name = name or f"guest{next(_numbers)}"
        self.serial = folder / f"{self.name}.serial"
        if len(str(self.serial)) > 107:
            raise InvalidRequest(folder, "is too long a path for a Unix socket: 107 bytes at most")
        folder.mkdir(parents=True, exist_ok=True)
        floppy = folder / "probe.img"
        floppy.write_bytes(floppy_image())
        top = self.known.top if self.known is not None else Path(image)
        self._check_cids = check_cids
        self._log: IO[bytes] | None = None
        self._probe: ProbeSession | None = None
        xml = domain_xml(self.name, top, floppy, self.serial, BUSES[controller], domain_type)
        self.domain: Any = conn.defineXML(xml)
        """libvirt's own object."""

    @property
    def probe(self) -> ProbeSession:
        """The session with the guest.

        Raises:
            GuestError: it was not started.
        """
        if self._probe is None:
            raise GuestError(self.name, "was not started")
        return self._probe

    def start(self) -> Self:
        """Start the guest, and return when the probe answers.

        Raises:
            CidMismatch: a parent was written after its overlay was made.
            GuestError: it does not answer.
            libvirt.libvirtError: libvirt cannot start it.
        """
        if self._check_cids:
            refuse_stale(_images(self.domain.XMLDesc()))
        self.serial.unlink(missing_ok=True)
        self.domain.create()
        self._log = (self.folder / f"{self.name}.serial.log").open("ab", buffering=0)
        self._probe = attach(
            self.serial, log=self._log, name=self.name, explain=self._why_silent, stopped=self._why_stopped
        )
        return self

    def assert_reads(self, samples: int = 8) -> int:
        """Hold the guest to the known chain that it was defined on; see `ProbeSession.assert_reads`.

        Raises:
            WrongContent, WrongSize: it reads something else.
            InvalidRequest: nothing is known of its disk.
        """
        if self.known is None:
            raise InvalidRequest("assert_reads", "needs a domain on a known chain")
        return self.probe.assert_reads(self.known.model, image=self.known.top, samples=samples)

    def shut_off(self) -> None:
        """Let the probe switch the machine off, and return when libvirt says that it is off.

        Raises:
            GuestError: it keeps running.
        """
        self.probe.power_off()
        deadline = time.monotonic() + scaled(_OFF_SECONDS)
        while self.domain.isActive():
            if time.monotonic() > deadline:
                raise GuestError(self.name, "the domain still runs after the probe switched it off")
            time.sleep(0.01)
        self._let_go()

    def close(self) -> None:
        """End the guest at once if it runs, and undefine the domain with the metadata of its snapshots."""
        self._let_go()
        if self.domain.isActive():
            self.domain.destroy()
        self.domain.undefineFlags(_UNDEFINE_SNAPSHOTS_METADATA)

    def __enter__(self) -> Self:
        """Return the domain."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End and undefine it."""
        self.close()

    def _state(self) -> tuple[int, str]:
        """Return libvirt's number of the domain's state, 0 where it does not say, and a sentence about it."""
        try:
            with libvirt_errors(self.name, "ask for its state"):
                state, reason = self.domain.state()
        except VmdkSnapError as error:
            return 0, str(error)
        why = _REASONS.get((state, reason))
        return state, f"the domain is {_STATES.get(state, 'in an unknown state')}" + (f" ({why})" if why else "")

    def _why_stopped(self) -> str | None:
        state, words = self._state()
        return None if state in _RUNNING else words

    def _why_silent(self) -> str:
        deadline = time.monotonic() + scaled(_NOTICED_SECONDS)  # libvirt hears of QEMU's end as we do, in its turn
        while (found := self._state())[0] not in _GONE and time.monotonic() < deadline:
            time.sleep(0.01)
        return f"its serial line was closed: {found[1]}"

    def _let_go(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        if self._log is not None:
            self._log.close()
            self._log = None


_UNDEFINE_SNAPSHOTS_METADATA: Final = 2  # libvirt's own number for it


def domain_xml(name: str, top: Path, floppy: Path, serial: Path, bus: str, domain_type: str = "qemu") -> str:
    """Return the XML of such a domain; every link of the chain is in it: libvirt finds none by itself."""
    below = [link.path for link in chain_info(top, lock=False)[1:]]
    scsi = "<controller type='scsi' model='virtio-scsi'/>" if bus == "scsi" else ""
    # A disk on virtio that is not in the boot order is none to the BIOS, and so to the probe.
    return f"""<domain type='{domain_type}'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='fd'/><boot dev='hd'/></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <disk type='file' device='floppy'>
      <driver name='qemu' type='raw'/><source file={quoteattr(str(floppy))}/><target dev='fda' bus='fdc'/><readonly/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='vmdk'/><source file={quoteattr(str(top.absolute()))}/>
      {_backing(below)}<target dev='{_TARGETS[bus]}' bus='{bus}'/>
    </disk>
    {scsi}<serial type='unix'><source mode='bind' path={quoteattr(str(serial))}/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>"""


def _images(xml: str) -> list[Path]:
    """Return the VMDKs that a domain's disks are on now: a snapshot has another one than it was defined with."""
    disks = ET.fromstring(xml).iterfind("devices/disk")
    sources = [disk.find("source") for disk in disks if disk.find("driver[@type='vmdk']") is not None]
    return [Path(source.attrib["file"]) for source in sources if source is not None and "file" in source.attrib]


def _backing(below: Sequence[Path]) -> str:
    if not below:
        return "<backingStore/>"
    source = quoteattr(str(below[0].absolute()))
    return f"<backingStore type='file'><format type='vmdk'/><source file={source}/>{_backing(below[1:])}</backingStore>"
