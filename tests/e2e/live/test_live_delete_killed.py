"""A delete under a running guest, killed for real after each thing that it changes: nothing is lost, the next ends it.

Our process, QEMU and libvirtd die, by turns. One guest goes through all of it, so that a boot is paid for once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.registry import list_snapshots
from tests.domain.libvirtd import Daemon
from tests.e2e.live.live_chain import ChainGuest, both
from tests.e2e.live.live_guest import Writer
from tests.e2e.live.test_live_delete import check_sound, frozen_files

pytestmark = [pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64", "qemu-img")]

VICTIM = """
import os, pathlib, signal, sys
import libvirt
import qemu_vmdk_snap
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.qemu.monitor import Monitor

at, seen = int(sys.argv[1]), 0
CHANGES = ("add-fd", "remove-fd", "blockdev-add", "blockdev-del", "blockdev-reopen", "transaction", "stop", "cont")

def dying(home, name, counts=lambda *_: True):
    real = getattr(home, name)
    def dies(*args, **options):
        global seen
        result = real(*args, **options)
        seen += counts(*args)
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(home, name, dies)

for name in ("write", "remove"):
    dying(IntentStore, name)
for name in ("create_overlay", "merge_links", "link_over"):
    dying(qemu_vmdk_snap, name)
dying(Monitor, "execute", lambda _, command: command in CHANGES)
dying(libvirt.virConnect, "defineXML")
dying(libvirt.virDomain, "snapshotCreateXML")
dying(libvirt.virDomainSnapshot, "delete")
dying(pathlib.Path, "unlink")
sys.exit(main(sys.argv[2:]))
"""
EACH = bool(os.environ.get("VMDK_KILL_EACH"))
FEWEST = 25
"""So many changes at least that a delete of the newest makes: else they are not seen any more."""


@pytest.fixture
def guest(daemon: Daemon, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChainGuest]:
    monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(scratch / "state"))
    guest = ChainGuest(open_connection(daemon.uri), scratch, links=2, disks=2)
    yield guest
    guest.close()


def killed(daemon: Daemon, guest: ChainGuest, at: int, *names: str) -> int:
    """Delete snapshots in a process that dies after so many changes; return its status."""
    line = ["snapshot", "delete", "-c", daemon.uri, guest.name, *names]
    words = [sys.executable, "-c", VICTIM, str(at), *line]
    done = subprocess.run(words, check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["newest", "middle"])
def test_killed_after_each_change(daemon: Daemon, guest: ChainGuest, which: str) -> None:
    expected = {name: list(both(files).values()) for name, files in frozen_files(guest).items()}
    stride = 1 if EACH else 16
    at = 1 if EACH else {"newest": 18, "middle": 5}[which]
    for number in range(200):
        with Writer(guest.probe) as writer:
            for name in (f"a{number}", f"b{number}"):
                create_snapshot(guest.conn, guest.name, name)
                expected[name] = list(both(frozen_files(guest)[name]).values())
                writer.wait(1)
            victim = f"{'b' if which == 'newest' else 'a'}{number}"
            status = killed(daemon, guest, at, victim)
            if not guest.monitor.execute("query-status")["running"]:
                recover(guest.conn)  # its top was never written: it was stopped for the freeze, and runs on now
            writer.wait(1)
        if number % 3 == 1:
            guest.domain.destroy()  # SIGTERM, then SIGKILL: the chain of the XML must be whole
        if number % 3 == 2:
            daemon.restart()
            guest.conn = open_connection(daemon.uri)
            guest.domain = guest.conn.lookupByName(guest.name)
        recover(guest.conn)
        if victim in {info.name for info in list_snapshots(guest.conn, guest.name)}:
            check_sound(guest, expected, by_qemu=False)
            delete(guest.conn, guest.name, victim)
        del expected[victim]
        check_sound(guest, expected)
        assert [check for check in check_domain(guest.conn, guest.name) if check.verdict == "bad"] == []
        if not guest.domain.isActive():
            guest.probe.close()
            guest.start()
        delete(guest.conn, guest.name, [name for name in (f"a{number}", f"b{number}") if name in expected])
        expected = {name: told for name, told in expected.items() if name not in (f"a{number}", f"b{number}")}
        if status == 0:
            assert at >= FEWEST
            break
        at += stride
    else:
        raise AssertionError("it never ends")
