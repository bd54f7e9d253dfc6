"""`guest verify` of a domain and of its snapshots, and of what a disk's own system says when it boots."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import create_snapshot, hardware_of
from tests.domain.lab import Lab
from tests.support.schemas import check

pytestmark = pytest.mark.needs("qemu-system-x86_64", "libvirt")

MIB = 1 << 20
# mov si, text; mov dx, COM1; next: lodsb; test al, al; jz end; out dx, al; jmp next; end: cli; hlt
SAYS = b"\xbe\x10\x7c\xba\xf8\x03\xac\x84\xc0\x74\x03\xee\xeb\xf8\xfa\xf4"


def bootable(path: Path, text: bytes) -> Path:
    create_image(path, 4 * MIB, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, (SAYS + text + b"\r\n\0").ljust(510, b"\0") + b"\x55\xaa")
    return path


def verify(lab: Lab, *words: str) -> int:
    return main(["guest", "verify", "-c", lab.uri, *words])


def test_a_domain_now_and_at_a_snapshot(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    name = domain.name()
    create_snapshot(lab.conn, name, "one")
    before = {path: path.read_bytes() for path in lab.folder.glob("*.vmdk")}
    assert verify(lab, name) == 0
    out = capsys.readouterr().out
    assert "Disk vda:\n" in out
    assert out.count("2 links") == 2
    assert out.count("(virtio-blk)") == 2
    assert out.count("guest and engine agree") == 2
    assert verify(lab, name, "--snapshot", "one", "--output=json") == 0
    value = check("guest verify", capsys.readouterr().out)
    assert (value["domain"], value["snapshot"], value["identical"]) == (name, "one", True)
    assert [(disk["target"], Path(disk["path"]).name, disk["depth"]) for disk in value["disks"]] == [
        ("vda", "a.vmdk", 1),
        ("vdb", "b.vmdk", 1),
    ]
    assert {path: path.read_bytes() for path in lab.folder.glob("*.vmdk")} == before


def test_what_is_refused(lab: Lab, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    domain = lab.define(lab.disk("a"))
    name = domain.name()
    assert verify(lab, name, "--snapshot", "none") == 69
    assert verify(lab, "no-such-domain") == 69
    assert verify(lab, name, "--record", "r") == 64
    assert main(["guest", "verify", "--expect", "(", str(lab.disk("c"))]) == 64
    assert main(["guest", "verify", "--timeout", "3", str(lab.disk("d"))]) == 64
    assert main(["guest", "verify", "--expect", "x", "--against", "r", str(lab.disk("e"))]) == 64
    assert main(["guest", "verify", str(tmp_path / "missing.vmdk")]) == 74
    domain.create()
    capsys.readouterr()
    assert verify(lab, name) == 69
    assert "runs, and writes to its disks: shut it off, or name one of its snapshots" in capsys.readouterr().err


def test_a_parent_that_changed_is_refused(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    domain = lab.define(lab.disk("a"))
    create_snapshot(lab.conn, domain.name(), "one")
    with open_chain(lab.folder / "a.vmdk", writable=True) as chain:
        chain.write_at(0, b"x")
    for words in ([], ["--expect", "x"]):
        assert verify(lab, domain.name(), *words) == 67
        assert "the parent was modified after the overlay was made" in capsys.readouterr().err


def test_the_system_on_the_disk(lab: Lab, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = bootable(lab.folder / "base.vmdk", b"example login: ")
    create_overlay(lab.folder / "top.vmdk", base, durable=False)
    domain = lab.define(lab.folder / "top.vmdk", lab.disk("b"))
    before = (lab.folder / "top.vmdk").read_bytes()
    assert verify(lab, domain.name(), "--expect", r"\w+ login:", "--output=json") == 0
    value = check("guest verify", capsys.readouterr().out)
    assert (value["domain"], value["found"]) == (domain.name(), "example login:")
    assert main(["guest", "verify", "--expect", "login:", str(base)]) == 0
    assert "the system on it wrote 'login:' after " in capsys.readouterr().out
    assert main(["guest", "verify", "--expect", "login:", "--output=json", str(base)]) == 0
    check("guest verify", capsys.readouterr().out)
    assert (lab.folder / "top.vmdk").read_bytes() == before
    words = ["guest", "verify", "--expect", "never", "--log", str(tmp_path / "logs"), str(base)]
    assert main(words) == 71
    (line,) = capsys.readouterr().err.splitlines()
    assert "waiting for 'never': the guest hangs: " in line
    assert "with interrupts off" in line
    assert (tmp_path / "logs/report.txt").exists()


def test_a_machine_like_that_of_the_domain(lab: Lab) -> None:
    import libvirt

    disk = "<disk type='file'><driver name='qemu' type='{}'/><source file='{}'/><target dev='{}' bus='{}'/></disk>"
    disks = disk.format("vmdk", lab.disk("a"), "sda", "scsi") + disk.format("qcow2", "/b.qcow2", "vda", "virtio")
    domain = lab.conn.defineXML(
        "<domain type='qemu'><name>like</name><memory unit='MiB'>200</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type><loader type='pflash' readonly='yes'>/code.fd</loader></os>"
        "<features><acpi/></features>"
        f"<devices>{disks}<controller type='scsi' model='lsilogic'/></devices></domain>"
    )
    try:
        found = hardware_of(lab.conn, "like")
    finally:
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
    assert (found.machine, found.memory_mib, found.uefi) == ("q35", 200, True)
    assert [(one.target, one.path.name, one.controller) for one in found.disks] == [("sda", "a.vmdk", "lsi")]
    assert found.left_out == ("disk vda has the format qcow2, not vmdk",)
    assert lab.folder in found.folders
