"""The demo: a domain, two snapshots, writes by guest and engine, and a boot on each point of the chain."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from qemu_vmdk_snap import create_image, open_chain
from qemu_vmdk_snap.domain.connect import find_domain, libvirt_errors, open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.registry import SnapshotInfo, list_snapshots
from qemu_vmdk_snap.errors import GuestError
from qemu_vmdk_snap.harness import attach, boot, disk_image, pattern
from qemu_vmdk_snap.harness.deadlines import scaled
from qemu_vmdk_snap.units import KIB, MIB, SECTOR_SIZE

if TYPE_CHECKING:
    from qemu_vmdk_snap.harness import ProbeSession

DOMAIN: Final = "demo"
DISK_BYTES: Final = 64 * MIB
_BASE_SEED, _GUEST_SEED, _ENGINE_SEED = 0x2006, 0xB007, 0xE61E
_SHUT_OFF_SECONDS: Final = 20.0


@dataclass
class Region:
    """A range of the disk that the demo checks, and its expected content."""

    name: str
    offset: int
    content: bytearray

    @property
    def crc(self) -> int:
        """CRC-32 of its expected content."""
        return zlib.crc32(self.content)


class Seen(NamedTuple):
    """What a guest saw of one region at one point of the chain."""

    point: str
    image: str
    region: str
    offset: int
    length: int
    expected: int
    seen: int

    @property
    def same(self) -> bool:
        """Whether the guest saw what was expected."""
        return self.expected == self.seen


@dataclass
class Point:
    """A snapshot, or the present: its image, and the expected content of each region."""

    name: str
    image: Path
    expected: dict[str, int]


@dataclass
class Demo:
    """The state of a running demo; `say` is called with a line for each step."""

    folder: Path
    say: Callable[[str], None]
    regions: list[Region] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    snapshots: list[SnapshotInfo] = field(default_factory=list)
    chain: list[tuple[str, int, int]] = field(default_factory=list)
    """(file name, CID, parentCID) from the top down, at the end."""

    def run(self) -> bool:
        """Run the demo and return whether every guest saw what was expected everywhere.

        Raises:
            GuestError, PluginError, DomainError, OSError: something needed is missing or failed.
        """
        self._make_base()
        self._define()
        self._snapshot("before-guest")
        self._run_guest("the guest reads through the chain, then writes", self._guest_writes)
        self._snapshot("after-guest")
        self._engine_writes()
        self._run_guest("the guest reads what the engine wrote", lambda _: None)
        self.points.append(Point("now", self._top(), self._expected()))
        for point in self.points:
            self._boot_read_only(point)
        self.snapshots = list_snapshots(self._conn, DOMAIN)
        self._note_chain()
        return all(row.same for row in self.seen)

    def _note_chain(self) -> None:
        with open_chain(self.points[-1].image) as chain:
            self.chain = [(link.path.name, link.cid, link.parent_cid) for link in chain.links]

    def _make_base(self) -> None:
        self.base = self.folder / "disk.vmdk"
        create_image(self.base, DISK_BYTES)
        self.regions = [
            Region("boot sectors", 0, bytearray(disk_image())),
            Region("never changed", 1 * MIB, bytearray(pattern(_BASE_SEED, 1 * MIB, MIB))),
            Region("guest: whole grains", 8 * MIB, bytearray(pattern(_BASE_SEED, 8 * MIB, MIB))),
            Region("guest: inside a grain", 16 * MIB, bytearray(pattern(_BASE_SEED, 16 * MIB, 192 * KIB))),
            Region("nothing stored", 24 * MIB, bytearray(4 * MIB)),
            Region("engine: odd bytes", 40 * MIB, bytearray(pattern(_BASE_SEED, 40 * MIB, 512 * KIB))),
            Region("both, into a hole", 50 * MIB, bytearray(256 * KIB)),
            Region("end of the disk", DISK_BYTES - MIB, bytearray(MIB)),
        ]
        with open_chain(self.base, writable=True) as chain:
            for region in self.regions:
                if any(region.content):
                    chain.write_at(region.offset, region.content)
        self.say(f"engine: wrote {self.base.name}, {DISK_BYTES // MIB} MiB, the probe and a pattern on it")

    def _define(self) -> None:
        root = self.folder / "libvirt"
        self._conn = open_connection(f"qemu:///embed?root={root}")
        self.serial = self.folder / "serial"
        with libvirt_errors(DOMAIN, "define"):
            self._conn.defineXML(_domain_xml(self.base, self.serial))
        self.say(f"libvirt: defined domain {DOMAIN!r} in this process, no daemon (qemu:///embed?root={root})")

    def _snapshot(self, name: str) -> None:
        frozen = self._top()
        report = create_snapshot(self._conn, DOMAIN, name)
        self.points.append(Point(name, frozen, self._expected()))
        self.say(f"snapshot {name}: froze {frozen.name}, the domain continues in {report.disks[0].overlay.name}")

    def _top(self) -> Path:
        from qemu_vmdk_snap.domain.xml import list_disks

        path = list_disks(find_domain(self._conn, DOMAIN).XMLDesc(0))[0].path
        assert path is not None
        return path

    def _run_guest(self, what: str, work: Callable[[ProbeSession], None]) -> None:
        started = time.monotonic()
        domain = find_domain(self._conn, DOMAIN)
        self.serial.unlink(missing_ok=True)
        with libvirt_errors(DOMAIN, "start"):
            domain.create()
        try:
            with (self.folder / "serial.log").open("ab", buffering=0) as log:
                probe = attach(self.serial, log=log)
                self._compare("domain", self._top().name, probe)
                work(probe)
                self._compare("domain", self._top().name, probe)
                probe.power_off()
                self._wait_until_off()
                probe.close()
        finally:
            if domain.isActive():
                domain.destroy()
        self.say(f"domain {DOMAIN!r}: {what}; shut down after {time.monotonic() - started:.1f} s")

    def _wait_until_off(self) -> None:
        deadline = time.monotonic() + scaled(_SHUT_OFF_SECONDS)
        while find_domain(self._conn, DOMAIN).isActive():
            if time.monotonic() > deadline:
                raise GuestError(DOMAIN, "the domain still runs after the probe switched it off")
            time.sleep(0.01)

    def _guest_writes(self, probe: ProbeSession) -> None:
        for name, start, length in (
            ("guest: whole grains", 128 * KIB, 512 * KIB),
            ("guest: inside a grain", 20 * KIB, 3 * SECTOR_SIZE),
            ("both, into a hole", 60 * KIB, 64 * KIB),
            ("end of the disk", MIB - SECTOR_SIZE, SECTOR_SIZE),
        ):
            region = self._region(name)
            probe.pattern(_GUEST_SEED, region.offset + start, length)
            region.content[start : start + length] = pattern(_GUEST_SEED, region.offset + start, length)

    def _engine_writes(self) -> None:
        top = self.points[-1].image.with_name("disk-000002.vmdk")
        with open_chain(top, writable=True) as chain:
            for name, start, length in (("engine: odd bytes", 70_001, 200_003), ("both, into a hole", 100_000, 50_000)):
                region = self._region(name)
                data = pattern(_ENGINE_SEED, 0, -(-length // SECTOR_SIZE) * SECTOR_SIZE)[:length]
                chain.write_at(region.offset + start, data)
                region.content[start : start + length] = data
        self.say(f"engine: wrote into {top.name}")

    def _boot_read_only(self, point: Point) -> None:
        with boot(point.image, from_disk=True, log_dir=self.folder / f"boot-{point.name}") as machine:
            self._compare(point.name, point.image.name, machine.probe, point.expected)
            machine.power_off()
        self.say(f"booted {point.image.name} read-only: {point.name}")

    def _compare(self, point: str, image: str, probe: ProbeSession, expected: dict[str, int] | None = None) -> None:
        for region in self.regions:
            seen = probe.crc(region.offset, len(region.content))
            wanted = region.crc if expected is None else expected[region.name]
            self.seen.append(Seen(point, image, region.name, region.offset, len(region.content), wanted, seen))

    def _expected(self) -> dict[str, int]:
        return {region.name: region.crc for region in self.regions}

    def _region(self, name: str) -> Region:
        return next(region for region in self.regions if region.name == name)


def _domain_xml(disk: Path, serial: Path) -> str:
    return f"""<domain type='qemu'>
  <name>{DOMAIN}</name>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='vmdk'/><source file='{disk}'/><target dev='sda' bus='sata'/>
    </disk>
    <serial type='unix'><source mode='bind' path='{serial}'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>"""
