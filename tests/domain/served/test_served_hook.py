"""Served disks under a real libvirtd: the hook starts and stops the servers, and a dead one is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap.domain.attach.run import attach
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.served import server
from qemu_vmdk_snap.domain.state import inactive_xml
from qemu_vmdk_snap.harness import attach as attach_probe
from tests.domain.hooks.test_hooks_daemon import HookedDaemon, wait_for
from tests.domain.libvirtd import obstacle
from tests.domain.served.guests import wait_until_gone

pytestmark = [pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64"), pytest.mark.timeout(300)]
AT, LENGTH = 2 << 20, 64 * 1024


@pytest.fixture
def hooked(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HookedDaemon]:
    if reason := obstacle():
        pytest.skip(reason)
    if os.geteuid():
        pytest.skip("libvirt runs hooks from /etc/libvirt alone: only root can put a folder of its own over that")
    monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(scratch / "state"))
    monkeypatch.setenv("QEMU_VMDK_SNAP_RUN", str(scratch / "s"))
    hooked = HookedDaemon(scratch)
    yield hooked
    hooked.close()


def refused(hooked: HookedDaemon, *words: str) -> str:
    done = subprocess.run(
        ["virsh", "-c", hooked.daemon.uri, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode
    return done.stderr


def test_started_at_prepare_restarted_when_killed_stopped_at_release(hooked: HookedDaemon, scratch: Path) -> None:
    domain, virsh = hooked.domain(), hooked.daemon.virsh
    name = domain.name()
    hooked.policy(domain, 'verify = "chain"')
    attach(hooked.conn, name, [])

    def pid() -> int:
        status = server.statuses(name, inactive_xml(domain))["sda"]
        return 0 if status is None else int(status["pid"])

    assert not pid()
    probe = hooked.start(domain)
    probe.pattern(1, AT, LENGTH)
    first = probe.crc(AT, LENGTH)

    # Killed: started again, and the guest, which QEMU pauses at its next request, writes on.
    killed = pid()
    create_snapshot(hooked.conn, name, "s1")
    os.kill(killed, signal.SIGKILL)
    writing = threading.Thread(target=probe.pattern, args=(2, AT + LENGTH, LENGTH))
    writing.start()
    writing.join()
    assert pid() not in (0, killed)
    assert probe.crc(AT, LENGTH) == first
    create_snapshot(hooked.conn, name, "m1", memory=scratch / "m1.memory")

    # Saved and restored: the server goes with the guest, and comes back with it.
    probe.close()
    served = pid()
    virsh("save", name, str(scratch / "saved"))
    wait_until_gone(served)
    virsh("restore", str(scratch / "saved"))
    assert attach_probe(hooked.serial(name), seconds=40).crc(AT, LENGTH) == first
    virsh("managedsave", name)
    assert not pid()
    virsh("start", name)
    assert attach_probe(hooked.serial(name), seconds=40).crc(AT, LENGTH) == first

    # Memory that belongs to another state of the disk is refused: it would write what is frozen.
    virsh("save", name, str(scratch / "saved"))
    create_snapshot(hooked.conn, name, "s2")
    assert "this state was saved when its file was" in refused(hooked, "restore", str(scratch / "saved"))

    assert revert(hooked.conn, name, "m1").state == "running"
    probe = attach_probe(hooked.serial(name), seconds=40)
    assert probe.crc(AT, LENGTH) == first
    probe.close()
    served = pid()
    virsh("destroy", name)
    wait_until_gone(served)
    wait_for(lambda: not list((scratch / "s").glob("*.sock")))
