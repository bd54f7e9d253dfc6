"""Live snapshots on a real daemon, asked by virsh, and killed in the middle."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.qemu import switch as live
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.harness import ProbeSession, attach
from tests.domain.libvirtd import Daemon
from tests.e2e.live.live_guest import MIB, REGION, STARTS, Progress, Writer, boot_disk, check_frozen, domain_xml, start

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64"),
    pytest.mark.timeout(300),
]
_numbers = itertools.count(1)


class Guest:
    """A domain of the daemon with the probe in it."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.daemon, self.folder, self.serial = daemon, folder, folder / "serial"
        self.name = f"real{next(_numbers)}"
        self.conn = open_connection(daemon.uri)
        disk = boot_disk(folder / "a.vmdk")
        self.domain = self.conn.defineXML(domain_xml(self.name, [disk], self.serial))
        self.probe = start(self.domain, self.serial)

    def reconnect(self) -> None:
        """Restart the daemon, as a crash would, and connect again."""
        self.daemon.restart()
        self.conn = open_connection(self.daemon.uri)
        self.domain = self.conn.lookupByName(self.name)

    def restart(self) -> ProbeSession:
        """Start the guest anew from the persistent XML."""
        if self.domain.isActive():
            self.domain.destroy()
        self.probe.close()
        self.probe = start(self.domain, self.serial)
        return self.probe

    def close(self) -> None:
        import libvirt

        self.probe.close()
        if self.domain.isActive():
            self.domain.destroy()
        self.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
        self.conn.close()


@pytest.fixture
def guest(daemon: Daemon, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(scratch / "state"))
    guest = Guest(daemon, scratch)
    yield guest
    guest.close()


def test_a_tree_of_live_snapshots_as_virsh_sees_it(guest: Guest) -> None:
    points: list[tuple[Path, Progress, Progress]] = []
    with Writer(guest.probe) as writer:
        for number in range(9):
            before = writer.progress
            report = create_snapshot(guest.conn, guest.name, f"s{number}")
            points.append((report.disks[0].frozen, before, writer.progress))
            writer.wait(1)
    for point in points:
        check_frozen(*point)
    virsh = guest.daemon.virsh
    tree = virsh("snapshot-list", guest.name, "--tree")
    assert [line.split()[-1] for line in tree.splitlines() if "s" in line] == [f"s{number}" for number in range(9)]
    assert "disk-snapshot" in virsh("snapshot-info", guest.name, "s4")
    inactive = virsh("dumpxml", guest.name, "--inactive")
    assert inactive.count("<backingStore type='file'>") == 9
    virsh("destroy", guest.name)
    virsh("start", guest.name)
    guest.probe.close()
    guest.probe = attach(guest.serial, seconds=40)
    last = writer.progress.ended
    check_frozen(guest.folder / "a-000009.vmdk", Progress(last, last), Progress(last, last))


def test_the_daemon_dies_between_two_snapshots(guest: Guest) -> None:
    points: list[tuple[Path, Progress, Progress]] = []
    with Writer(guest.probe) as writer:
        for number in range(4):
            before = writer.progress
            report = create_snapshot(guest.conn, guest.name, f"s{number}")
            points.append((report.disks[0].frozen, before, writer.progress))
            guest.reconnect()
            writer.wait(1)
    for point in points:
        check_frozen(*point)
    assert guest.daemon.virsh("snapshot-list", guest.name, "--name").split() == [f"s{number}" for number in range(4)]
    assert guest.restart().crc(STARTS[0], REGION)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_daemon_dies_in_the_middle(guest: Guest, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """It is killed around the transaction: our command fails, the guest goes on, the next command settles it."""
    real = live._try

    def killed(run: live._Run) -> bool:
        if moment == "after":
            assert real(run)
        guest.daemon.restart()
        return real(run)

    with Writer(guest.probe) as writer:
        with monkeypatch.context() as dying:
            dying.setattr(live, "_try", killed)
            with pytest.raises(Exception, match=r"libvirt|QEMU|connection|socket|internal"):
                create_snapshot(guest.conn, guest.name, "s1")
        guest.reconnect()
        writer.wait(2)
        (result,) = recover(guest.conn)
        assert result.finished is (moment == "after")
        assert result.left == ()
        assert guest.domain.snapshotNum() == (1 if moment == "after" else 0)
        create_snapshot(guest.conn, guest.name, "s2")
        writer.wait(1)
    last = writer.progress.ended
    guest.domain.destroy()
    (top,) = sorted(guest.folder.glob("a-*.vmdk"))[-1:]
    check_frozen(top, Progress(last, last), Progress(last, last))
    assert guest.restart().crc(STARTS[0], REGION)


VICTIM = """
import os, signal, sys
from qemu_vmdk_snap.domain.qemu import switch as live
from qemu_vmdk_snap.domain.create import run as snapshot
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.qemu.monitor import Monitor

uri, domain, name, at = sys.argv[1:]
homes = {"write": IntentStore, "remove": IntentStore, "make_overlay": snapshot, "_define": snapshot,
         "register": snapshot, "_add": live, "execute": Monitor}
real, seen = getattr(homes.get(name, Monitor), name if name in homes else "execute"), 0

def dies(*args, **options):
    global seen
    result = real(*args, **options)
    seen += name in homes or args[1] == name
    if seen == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(homes.get(name, Monitor), name if name in homes else "execute", dies)
snapshot.create_snapshot(open_connection(uri), domain, "s2")
"""

KILLS = {
    ("write", 1): False,
    ("make_overlay", 1): False,
    ("write", 2): False,
    ("_define", 1): False,
    ("register", 1): False,
    ("add-fd", 1): False,
    ("remove-fd", 1): False,
    ("blockdev-add", 1): False,
    ("blockdev-add", 2): False,
    ("stop", 1): False,
    ("transaction", 1): True,
    ("cont", 1): True,
    ("remove", 1): None,
}
"""(after which call of what the command is killed): whether the snapshot is finished then; None: there is no record."""


@pytest.mark.parametrize("after", KILLS, ids=lambda after: f"{after[0]}-{after[1]}")
def test_a_command_that_is_killed_is_settled_by_the_next(guest: Guest, after: tuple[str, int]) -> None:
    create_snapshot(guest.conn, guest.name, "s1")  # nothing is written since: the next one has to stop the vCPUs
    before, finished = guest.domain.XMLDesc(2), KILLS[after]
    words = [sys.executable, "-c", VICTIM, guest.daemon.uri, guest.name, after[0], str(after[1])]
    assert subprocess.run(words, check=False, timeout=60).returncode == -9
    assert [(result.finished, result.left) for result in recover(guest.conn)] == (
        [] if finished is None else [(finished, ())]
    )
    complete = finished is not False
    assert guest.domain.snapshotNum() == (2 if complete else 1)
    assert (guest.domain.XMLDesc(2) == before) is not complete
    assert (guest.folder / "a-000002.vmdk").exists() is complete
    with Writer(guest.probe) as writer:  # it runs on
        create_snapshot(guest.conn, guest.name, "s3")
        writer.wait(1)
    last = writer.progress.ended
    guest.domain.destroy()
    top = sorted(guest.folder.glob("a-*.vmdk"))[-1]
    check_frozen(top, Progress(last, last), Progress(last, last))


def test_back_to_a_live_snapshot_and_deleting_it(guest: Guest) -> None:
    guest.probe.pattern(1, STARTS[0], REGION)
    first = guest.probe.crc(STARTS[0], REGION)
    create_snapshot(guest.conn, guest.name, "s1")
    guest.probe.pattern(2, STARTS[0], REGION)
    second = guest.probe.crc(STARTS[0], REGION)
    create_snapshot(guest.conn, guest.name, "s2")
    guest.probe.pattern(3, STARTS[0], REGION)
    guest.probe.close()
    guest.serial.unlink(missing_ok=True)
    revert(guest.conn, guest.name, "s1", after="running", discard=True)
    guest.probe = attach(guest.serial, seconds=40)
    assert guest.probe.crc(STARTS[0], REGION) == first
    guest.probe.close()
    guest.serial.unlink(missing_ok=True)
    revert(guest.conn, guest.name, "s2", after="running", discard=True)
    guest.probe = attach(guest.serial, seconds=40)
    assert guest.probe.crc(STARTS[0], REGION) == second
    guest.domain.destroy()
    delete(guest.conn, guest.name, "s1")
    assert guest.restart().crc(STARTS[0], REGION) == second


def test_a_volume_and_its_pool(daemon: Daemon, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import libvirt

    monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(scratch / "state"))
    conn = open_connection(daemon.uri)
    folder = scratch / "pool"
    folder.mkdir()
    create_image(folder / "v.vmdk", MIB)
    pool = conn.storagePoolCreateXML(
        f"<pool type='dir'><name>{scratch.name}</name><target><path>{folder}</path></target></pool>"
    )
    extra = (
        f"<disk type='volume' device='disk'><driver name='qemu' type='vmdk'/><source pool='{scratch.name}' "
        "volume='v.vmdk'/><target dev='vdb' bus='virtio'/></disk>"
    )
    domain = conn.defineXML(domain_xml("volume", [boot_disk(scratch / "a.vmdk")], scratch / "serial", extra=extra))
    probe = start(domain, scratch / "serial")
    try:
        report = create_snapshot(conn, "volume", "s1")
        assert [disk.target for disk in report.disks] == ["sda", "vdb"]
        create_snapshot(conn, "volume", "s2")
        assert "v-000002.vmdk" in daemon.virsh("vol-list", scratch.name)
        probe.pattern(1, STARTS[0], REGION)
    finally:
        probe.close()
        domain.destroy()
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
        pool.destroy()
        conn.close()
    with open_chain(folder / "v-000002.vmdk") as chain:
        assert chain.depth == 3


def test_the_command_tells_the_pause_and_refuses_memory(guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["snapshot", "create", "-c", guest.daemon.uri, guest.name]
    assert main([*words, "s1", "--disk-only"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Domain snapshot s1 created"
    assert out[2].startswith("  the guest kept running: disk requests waited ")
    assert main([*words, "s2", "--memspec", "/nowhere"]) != 0
    assert capsys.readouterr().err == (
        f"qemu-vmdk-snap: domain {guest.name}: disk sda: QEMU's vmdk driver cannot save the guest's memory: "
        f"`serve attach {guest.name} sda`, while it is shut off, lets our server serve it\n"
    )
    assert guest.domain.snapshotNum() == 1
