"""A domain whose disks are served, with the probe in it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu_vmdk_snap import create_image, open_chain
from qemu_vmdk_snap.domain.attach.run import attach
from qemu_vmdk_snap.domain.served import server
from qemu_vmdk_snap.domain.served.commands import start_servers, stop_servers
from qemu_vmdk_snap.domain.state import inactive_xml
from qemu_vmdk_snap.harness import ProbeSession, pattern
from qemu_vmdk_snap.harness import attach as attach_probe
from tests.e2e.live.live_guest import MIB, SECTOR, boot_disk, domain_xml

if TYPE_CHECKING:
    import libvirt

_numbers = itertools.count(1)


class ServedGuest:
    """A domain with a boot disk and, if wanted, a second one, both served."""

    def __init__(self, conn: libvirt.virConnect, folder: Path, *, second: bool = False, size: int = 16 * MIB) -> None:
        self.conn, self.folder = conn, folder
        self.name = f"served{next(_numbers)}"
        self.serial = folder / f"{self.name}.serial"
        disks = [boot_disk(folder / "a.vmdk", size)]
        if second:
            disks.append(create(folder / "b.vmdk"))
        self.domain = conn.defineXML(domain_xml(self.name, disks, self.serial))
        self.uri = conn.getURI()
        attach(conn, self.name, [])

    def start(self) -> ProbeSession:
        """Start it, by hand: an in-process libvirt has no hook of ours."""
        self.serial.unlink(missing_ok=True)
        start_servers(self.conn, self.name)
        self.domain.create()
        return self.probe()

    def probe(self) -> ProbeSession:
        return attach_probe(self.serial, seconds=40)

    def server_pid(self, target: str = "sda") -> int:
        return int(self._status(target)["pid"])

    def writes(self, target: str = "sda") -> int:
        """Return how many requests to write its server has done."""
        return int(self._status(target)["statistics"]["writes"])

    def _status(self, target: str) -> dict[str, Any]:
        status = server.statuses(self.name, inactive_xml(self.domain))[target]
        assert status is not None
        return status

    def close(self) -> None:
        import libvirt

        if self.domain.isActive():
            self.domain.destroy()
        stop_servers(self.conn, self.name)
        self.domain.undefineFlags(
            libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        )


def create(path: Path, size: int = 8 * MIB) -> Path:
    """Return a new empty disk."""
    create_image(path, size, durable=False)
    return path


def written_by(path: Path, seed: int, start: int, length: int) -> int:
    """Return how many sectors from `start` on are those of the pattern; what follows them must not be."""
    with open_chain(path, lock=False) as chain:
        data = chain.read_at(start, length)
    wanted = pattern(seed, start, length)
    same = [data[at : at + SECTOR] == wanted[at : at + SECTOR] for at in range(0, length, SECTOR)]
    count = same.index(False) if False in same else len(same)
    assert not any(same[count:])
    return count


def wait_until_gone(pid: int, seconds: float = 60.0) -> None:
    """Return once the process has ended."""
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)
