"""Live snapshots of a guest whose QEMU is another user, who may not open what we make; and what follows of the base."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap import DomainError, open_chain
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from tests.domain.libvirtd import Daemon
from tests.e2e.live.live_guest import Progress, Writer, boot_disk, check_frozen, domain_xml, start

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64", "setfacl", "getfacl"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can let QEMU be another user"),
    pytest.mark.timeout(300),
]

NOBODY = 65534
LABEL = f"<seclabel type='static' model='dac' relabel='no'><label>+{NOBODY}:+{NOBODY}</label></seclabel>"


class Guest:
    """A running guest whose QEMU is nobody; `locked` is a folder that only root may enter."""

    def __init__(self, daemon: Daemon, scratch: Path) -> None:
        self.folder, self.locked = scratch / "img", scratch / "locked"
        self.folder.mkdir(mode=0o755)
        self.locked.mkdir(mode=0o700)
        serials = scratch / "serial"
        serials.mkdir()
        os.chown(serials, NOBODY, NOBODY)
        self.base = boot_disk(self.folder / "a.vmdk")
        os.chown(self.base, NOBODY, NOBODY)
        self.conn = open_connection(daemon.uri)
        text = domain_xml(f"nobody-{scratch.name}", [self.base], serials / "s")
        self.domain = self.conn.defineXML(text.replace("</domain>", f"{LABEL}</domain>"))
        self.name: str = self.domain.name()
        self.probe = start(self.domain, serials / "s")
        self.pid = int((daemon.folder / f"run/qemu/{self.name}.pid").read_text())

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


def acl(path: Path) -> str:
    return subprocess.run(
        ["getfacl", "--absolute-names", "--omit-header", path], capture_output=True, text=True, check=True
    ).stdout


def test_qemu_gets_what_it_may_not_open(guest: Guest) -> None:
    status = Path(f"/proc/{guest.pid}/status").read_text()
    assert f"Uid:\t{NOBODY}\t{NOBODY}" in status
    overlay = guest.locked / "o.vmdk"
    with Writer(guest.probe) as writer:
        before = writer.progress
        report = create_snapshot(guest.conn, guest.name, "s1", overlays={"sda": overlay})
        point = (report.disks[0].frozen, before, writer.progress)
        writer.wait(2)
        # By name it cannot be had: it is the descriptor that did it.
        with pytest.raises(DomainError, match=r"QEMU refuses blockdev-add: .*Permission denied"):
            Monitor(guest.domain).execute("blockdev-add", driver="file", filename=str(overlay), node_name="mine")
        second = create_snapshot(guest.conn, guest.name, "s2", overlays={"sda": guest.locked / "p.vmdk"})
        writer.wait(2)
    check_frozen(*point)
    last = writer.progress.ended
    guest.domain.destroy()
    check_frozen(second.disks[0].overlay, Progress(last, last), Progress(last, last), [guest.folder])
    with open_chain(second.disks[0].overlay, trusted_dirs=[guest.folder]) as chain:
        assert chain.depth == 3


@pytest.mark.parametrize("running", [True, False], ids=["running", "shut off"])
def test_owner_mode_and_access_list_are_those_of_the_base(guest: Guest, running: bool) -> None:
    os.chown(guest.base, NOBODY, 4)
    guest.base.chmod(0o600)
    subprocess.run(["setfacl", "-m", "u:daemon:rw,u:2:r,g:5:r,m::rw", guest.base], check=True)
    if not running:
        guest.domain.destroy()
    overlay = create_snapshot(guest.conn, guest.name, "s1").disks[0].overlay
    assert "user:daemon:rw-" in acl(overlay)
    assert acl(overlay) == acl(guest.base)
    name = "system.posix_acl_access"
    assert os.getxattr(overlay, name) == os.getxattr(guest.base, name)
    there, here = guest.base.stat(), overlay.stat()
    assert (here.st_uid, here.st_gid, here.st_mode) == (there.st_uid, there.st_gid, there.st_mode)
    assert (here.st_uid, here.st_gid) == (NOBODY, 4)
    # The kernel agrees: whom the list names may write, whom it does not name may not read.
    for uid, may in ((1, True), (2, False), (3, False)):
        done = subprocess.run(["setpriv", f"--reuid={uid}", "--clear-groups", "test", "-w", overlay], check=False)
        assert (done.returncode == 0) is may, uid
