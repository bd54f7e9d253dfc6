"""Live snapshots under each cache mode, filter and driver option that libvirt's disks have, on each kind of bus."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import subprocess
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from qemu_vmdk_snap import DomainError, open_chain
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from tests.domain.lab import contents, xml_of
from tests.domain.libvirtd import Daemon
from tests.e2e.live.live_guest import REGION, STARTS, Writer, boot_disk, check_frozen, start

if TYPE_CHECKING:
    import libvirt

    from qemu_vmdk_snap.harness import ProbeSession

pytestmark = [pytest.mark.needs("libvirt", "qemu-system-x86_64", "qemu-img"), pytest.mark.timeout(300)]
_numbers = itertools.count(1)

CACHES: Final = ("default", "none", "writethrough", "writeback", "directsync", "unsafe")
DIRECT: Final = ("none", "directsync")
THROTTLE: Final = "<iotune><total_iops_sec>2000</total_iops_sec></iotune>"
BUSES: Final[dict[str, tuple[str, str]]] = {
    "virtio": ("vda", ""),
    "sata": ("sda", ""),
    "ide": ("hda", ""),
    "scsi": ("sda", "<controller type='scsi' model='lsilogic'/>"),
    "virtio-scsi": ("sda", "<controller type='scsi' model='virtio-scsi'>{driver}</controller>"),
}
"""Name -> target, and the controller that it needs."""


@dataclass(frozen=True)
class Case:
    """A disk of a domain."""

    bus: str = "virtio"
    cache: str = "default"
    iothread: bool = False
    driver: str = ""
    """More attributes of its `<driver>`."""
    extra: str = ""

    def __str__(self) -> str:
        words = [self.bus, self.cache, "iothread" if self.iothread else "", self.driver.replace("'", "")]
        return " ".join([word for word in (*words, "throttled" if self.extra else "") if word])

    def xml(self, name: str, disk: Path, serial: Path) -> str:
        target, controller = BUSES[self.bus]
        iothread = "iothread='1'" if self.iothread else ""
        on_disk, on_controller = (iothread, "") if self.bus == "virtio" else ("", iothread)
        driver = f"name='qemu' type='vmdk' cache='{self.cache}' {self.driver} {on_disk}"
        bus = self.bus.removeprefix("virtio-")
        return (
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><iothreads>1</iothreads>"
            "<os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os><features><acpi/></features><devices>"
            "<emulator>/usr/bin/qemu-system-x86_64</emulator>"
            f"<disk type='file' device='disk'><driver {driver}/><source file='{disk}'/>"
            f"<target dev='{target}' bus='{bus}'/>{self.extra}</disk>"
            f"{controller.format(driver=f'<driver {on_controller}/>')}<memballoon model='none'/>"
            f"<serial type='unix'><source mode='bind' path='{serial}'/><target port='0'/></serial></devices></domain>"
        )


OPTIONS: Final = (
    "discard='unmap'",
    "detect_zeroes='on'",
    "discard='unmap' detect_zeroes='unmap'",
    "detect_zeroes='unmap'",
    "copy_on_read='on'",
    "copy_on_read='on' discard='unmap' detect_zeroes='on'",
    "io='threads'",
    "io='io_uring'",
)


def cases() -> list[Case]:
    """Each cache mode with and without an I/O thread, each option, filter and bus; all with all where that is asked."""
    if os.environ.get("VMDK_LIVE_EACH"):
        drivers = itertools.product(CACHES, (*BUSES.items(),), (False, True), ("", *OPTIONS), ("", THROTTLE))
        return [
            Case(bus, cache, iothread, driver, extra)
            for cache, (bus, _), iothread, driver, extra in drivers
            if not iothread or bus.startswith("virtio")
        ]
    found = [
        Case(cache=cache, iothread=iothread, driver=option)
        for (cache, iothread), option in zip(
            itertools.product(CACHES, (False, True)), itertools.cycle(("", *OPTIONS)), strict=False
        )
    ]
    found += [Case(cache="none", driver=option) for option in OPTIONS if "copy_on_read" in option]
    found += [Case(cache=cache, driver="io='native'", iothread=cache == "none") for cache in DIRECT]
    found += [Case(cache="none", driver="copy_on_read='on'", iothread=True, extra=THROTTLE)]
    found += [Case(bus, cache) for bus, cache in zip(list(BUSES)[1:], DIRECT * 2, strict=True)]
    found += [
        Case(bus, driver=OPTIONS[5], iothread=bus.startswith("virtio"), extra=THROTTLE) for bus in list(BUSES)[1:]
    ]
    return found


class Guest:
    """A domain that boots the probe from such a disk, and what was added to its QEMU since it was started."""

    def __init__(self, conn: libvirt.virConnect, folder: Path, case: Case) -> None:
        self.conn, self.folder, self.serial = conn, folder, folder / "serial"
        self.name = f"opt{next(_numbers)}"
        self.target = BUSES[case.bus][0]
        self.domain = conn.defineXML(case.xml(self.name, boot_disk(folder / "a.vmdk"), self.serial))
        self.probe = self.start()

    def start(self) -> ProbeSession:
        self.probe = start(self.domain, self.serial)
        return self.probe

    def close(self) -> None:
        import libvirt

        self.probe.close()
        if self.domain.isActive():
            self.domain.destroy()
        self.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)


def blockdevs(name: str) -> dict[str, dict[str, Any]]:
    """Return the options of each block node that libvirt gave the QEMU of a domain at its start, by node name."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if f"guest={name}" in ",".join(words[:4]).split(","):
            values = (json.loads(value) for word, value in itertools.pairwise(words) if word == "-blockdev")
            return {value["node-name"]: value for value in values}
    raise AssertionError(f"no QEMU of {name}")


DEFAULTS: Final = {"cache": {"direct": False, "no-flush": False}, "discard": "ignore", "detect-zeroes": "off"}
COMPARED: Final = (*DEFAULTS, "aio")


def options(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is to be the same at the next start, as far as it is not said by default."""
    given = {**DEFAULTS, **node}
    return {name: given[name] for name in COMPARED if name in given}


def as_libvirt_opens(name: str, top: Path) -> list[dict[str, Any]]:
    """Return the options of the file node and of the format node of the top."""
    nodes = blockdevs(name)
    file = next(node for node in nodes.values() if node.get("filename") == str(top))
    form = next(node for node in nodes.values() if node["driver"] == "vmdk" and node.get("file") == file["node-name"])
    return [options(file), options(form)]


def watch_added(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the list that gets the options of each node that is added from now on.

    Whether a descriptor is passed with O_DIRECT is to be what its node says: QEMU takes no other from 9.1 on.
    """
    real = Monitor.execute
    added: list[dict[str, Any]] = []
    direct: list[bool] = []

    def watched(self: Monitor, command: str, /, *, files: Sequence[int] = (), **arguments: object) -> object:
        direct.extend(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT) for fd in files)
        if command == "blockdev-add":
            added.append(options(arguments))
            assert added[-1]["cache"]["direct"] is direct[-1]
        return real(self, command, files=files, **arguments)

    monkeypatch.setattr(Monitor, "execute", watched)
    return added


def check_both_ways(path: Path, scratch: Path) -> None:
    """Check that qemu-img and the engine read the same from the image, which a guest may have open read-only."""
    raw = scratch / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, raw], check=True, timeout=60)
    with open_chain(path) as chain:
        assert raw.read_bytes() == chain.read_at(0, chain.capacity)
    raw.unlink()


def exercise(guest: Guest, folder: Path, added: list[dict[str, Any]]) -> None:
    """Take two snapshots while the guest writes, and check all that is frozen, read and opened."""
    points, tops = [], []
    with Writer(guest.probe) as writer:
        for name in ("s1", "s2"):
            before = writer.progress
            (disk,) = create_snapshot(guest.conn, guest.name, name).disks
            points.append((disk.frozen, before, writer.progress))
            tops.append(disk.overlay)
            writer.wait(2)
    for point in points:
        assert check_frozen(*point) > 0
        check_both_ways(point[0], folder)
    live = Monitor(guest.domain).tops()[guest.target]
    assert (live.is_file(tops[1]), live.failed, live.job) == (True, 0, None)
    with open_chain(tops[1], lock=False) as chain:
        shown = {offset: zlib.crc32(chain.read_at(offset, REGION)) for offset in STARTS}
    assert {offset: guest.probe.crc(offset, REGION) for offset in STARTS} == shown
    guest.domain.destroy()
    probe = guest.start()
    assert {offset: probe.crc(offset, REGION) for offset in STARTS} == shown
    probe.pattern(99, STARTS[0], REGION)
    assert added[-2:] == added[:2] == as_libvirt_opens(guest.name, tops[1])
    guest.domain.destroy()
    check_both_ways(tops[1], folder)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_guest_writes_on(
    embed: libvirt.virConnect, scratch: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    guest = Guest(embed, scratch, case)
    try:
        exercise(guest, scratch, watch_added(monkeypatch))
    finally:
        guest.close()


@pytest.mark.needs("libvirtd", "virsh")
def test_the_same_with_a_daemon(daemon: Daemon, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(scratch / "state"))
    conn = open_connection(daemon.uri)
    case = Case(cache="none", iothread=True, driver=f"io='native' {OPTIONS[5]}", extra=THROTTLE)
    guest = Guest(conn, scratch, case)
    try:
        exercise(guest, scratch, watch_added(monkeypatch))
    finally:
        guest.close()
        conn.close()


@pytest.fixture
def guest(embed: libvirt.virConnect, scratch: Path, request: pytest.FixtureRequest) -> Iterator[Guest]:
    guest = Guest(embed, scratch, getattr(request, "param", Case()))
    yield guest
    guest.close()


def refused(guest: Guest, reason: str) -> None:
    """Check that a snapshot is refused for the reason, and changes nothing."""
    before = (xml_of(guest.domain), contents(guest.folder), Monitor(guest.domain).nodes())
    with pytest.raises(DomainError, match=reason) as error:
        create_snapshot(guest.conn, guest.name, "s1")
    assert "\n" not in str(error.value)
    assert (xml_of(guest.domain), contents(guest.folder), Monitor(guest.domain).nodes()) == before


@pytest.mark.parametrize("guest", [Case(), Case(driver="copy_on_read='on'")], ids=str, indirect=True)
def test_a_disk_with_a_block_job_is_refused(guest: Guest) -> None:
    monitor = Monitor(guest.domain)
    node = monitor.tops()[guest.target].node
    monitor.execute("blockdev-add", driver="null-co", node_name="sink", size=guest.probe.size())
    monitor.execute("blockdev-backup", job_id="copying", device=node, target="sink", sync="full", speed=4096)
    refused(guest, r"disk vda: the block job 'copying' works on it: wait for its end$")
    monitor.execute("block-job-cancel", device="copying", force=True)
    while monitor.execute("query-jobs"):
        pass
    monitor.execute("blockdev-del", node_name="sink")
    create_snapshot(guest.conn, guest.name, "s1")


def test_a_disk_whose_writes_failed_is_refused(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's count is what a fault would make it; no file system that fails on demand is needed."""
    real = Monitor.execute

    def counted(self: Monitor, command: str, /, *, files: Sequence[int] = (), **arguments: object) -> object:
        answer = real(self, command, files=files, **arguments)
        if command == "query-blockstats":
            answer[0]["stats"]["failed_wr_operations"] = 3
        return answer

    with monkeypatch.context() as failing:
        failing.setattr(Monitor, "execute", counted)
        refused(guest, r"disk vda: writes of the guest have failed since it was started \(3\): check its file ")
    create_snapshot(guest.conn, guest.name, "s1")


@pytest.mark.parametrize("running", [True, False], ids=["running", "shut off"])
@pytest.mark.parametrize("guest", [Case(cache="none")], ids=str, indirect=True)
def test_a_file_system_without_direct_io_is_refused(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    real = os.open

    def open_indirect(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, mode, dir_fd=dir_fd)

    if not running:
        guest.domain.destroy()
    before = (xml_of(guest.domain), contents(guest.folder))
    with monkeypatch.context() as without:
        without.setattr(os, "open", open_indirect)
        with pytest.raises(
            DomainError, match=r"disk vda: its cache mode needs O_DIRECT, which the file system of .*-000"
        ):
            create_snapshot(guest.conn, guest.name, "s1")
    assert (xml_of(guest.domain), contents(guest.folder)) == before
    create_snapshot(guest.conn, guest.name, "s1")
