"""A guest whose QEMU is another user, who may not open the images: the server does, and QEMU reaches its socket."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_vmdk_snap.domain.attach.run import attach
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.served.commands import start_servers, stop_servers
from qemu_vmdk_snap.harness import attach as attach_probe
from tests.domain.libvirtd import Daemon
from tests.e2e.live.live_guest import boot_disk, domain_xml

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can let QEMU be another user"),
    pytest.mark.timeout(300),
]

NOBODY = 65534
LABEL = f"<seclabel type='static' model='dac' relabel='no'><label>+{NOBODY}:+{NOBODY}</label></seclabel>"


def test_nobody_runs_on_images_of_root_alone(daemon: Daemon, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import libvirt

    monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(scratch / "state"))
    monkeypatch.setenv("QEMU_VMDK_SNAP_RUN", str(scratch / "s"))
    (scratch / "img").mkdir(mode=0o700)
    (scratch / "serial").mkdir()
    os.chown(scratch / "serial", NOBODY, NOBODY)
    serial = scratch / "serial" / "s"
    conn = open_connection(daemon.uri)
    text = domain_xml(f"served-{scratch.name}", [boot_disk(scratch / "img" / "a.vmdk")], serial)
    domain = conn.defineXML(text.replace("</domain>", f"{LABEL}</domain>"))
    try:
        (disk,) = attach(conn, domain.name(), []).disks
        start_servers(conn, domain.name())
        assert (disk.socket.stat().st_uid, disk.socket.stat().st_mode & 0o777) == (NOBODY, 0o600)
        domain.create()
        probe = attach_probe(serial, seconds=40)
        probe.pattern(1, 2 << 20, 4096)
        seen = probe.crc(2 << 20, 4096)
        create_snapshot(conn, domain.name(), "m1", memory=scratch / "img" / "m1.memory")
        probe.pattern(2, 2 << 20, 4096)
        probe.close()
        revert(conn, domain.name(), "m1")
        probe = attach_probe(serial, seconds=40)
        assert probe.crc(2 << 20, 4096) == seen
        probe.close()
    finally:
        if domain.isActive():
            domain.destroy()
        stop_servers(conn, domain.name())
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
        conn.close()
