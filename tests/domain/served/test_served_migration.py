"""A guest on a served disk moves, running, to another daemon; the server serves both, and goes with the last."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from qemu_vmdk_snap.domain.attach.run import attach
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.served.commands import served_status
from qemu_vmdk_snap.harness import attach as attach_probe
from tests.domain.hooks.test_hooks_daemon import wait_for
from tests.domain.libvirtd import obstacle
from tests.domain.served.migrating import host
from tests.e2e.live.live_guest import boot_disk, domain_xml

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64"),
    pytest.mark.skipif(obstacle() is not None or os.geteuid() != 0, reason="needs two system daemons of its own"),
    pytest.mark.timeout(300),
]
AT, LENGTH = 2 << 20, 64 * 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if os.environ.get("VMDK_MIGRATE"):  # 20 seconds

    def test_a_running_guest_moves_to_another_daemon(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import libvirt

        monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(scratch / "state"))
        monkeypatch.setenv("QEMU_VMDK_SNAP_RUN", str(scratch / "s"))
        daemons = []
        try:
            daemons += [host(scratch / "h1", 1, scratch / "state")]
            daemons += [host(scratch / "h2", 2, scratch / "state")]
            here, there = (open_connection(daemon.uri) for daemon in daemons)
            domain = here.defineXML(domain_xml("moving", [boot_disk(scratch / "a.vmdk")], scratch / "one"))
            attach(here, "moving", [])
            domain.create()
            probe = attach_probe(scratch / "one", seconds=40)
            probe.pattern(1, AT, LENGTH)
            seen = probe.crc(AT, LENGTH)
            probe.close()

            def moved(flags: int) -> str:
                text = domain.XMLDesc(flags | libvirt.VIR_DOMAIN_XML_MIGRATABLE)
                return str(text.replace(str(scratch / "one"), str(scratch / "two")))

            parameters = {
                libvirt.VIR_MIGRATE_PARAM_URI: f"tcp:127.0.0.1:{free_port()}",
                libvirt.VIR_MIGRATE_PARAM_DEST_XML: moved(0),
                libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: moved(libvirt.VIR_DOMAIN_XML_INACTIVE),
            }
            flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
            arrived = domain.migrate3(there, parameters, flags)
            probe = attach_probe(scratch / "two", seconds=40)
            assert probe.crc(AT, LENGTH) == seen
            probe.pattern(2, AT + LENGTH, LENGTH)
            probe.close()
            assert create_snapshot(there, "moving", "s1").pause is not None
            arrived.destroy()
            wait_for(lambda: served_status(there, "moving")[0].server is None)
        finally:
            for daemon in daemons:
                with open_connection(daemon.uri) as conn:
                    for left in conn.listAllDomains():
                        if left.isActive():
                            left.destroy()
                daemon.stop()
