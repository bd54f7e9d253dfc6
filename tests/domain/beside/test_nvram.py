"""UEFI variables are frozen, reverted and deleted with the disks; where they cannot be, `snapshot create` says so.

The firmware is a file of zeros, which QEMU maps and runs: who writes the variables does not matter here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import DomainError
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.clone.run import clone
from qemu_vmdk_snap.domain.create import run as create_run
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.destroy.run import destroy
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.nvram import plan_nvram
from qemu_vmdk_snap.domain.revert import run as revert_run
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.xml import domain_of
from qemu_vmdk_snap.domain.xml.nvram import frozen_nvram, with_nvram
from tests.domain.lab import Lab, xml_of

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")

SIZE = 256 * 1024


class Uefi:
    """A domain with one VMDK disk and UEFI variables."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.vars, firmware = lab.folder / "web_VARS.fd", lab.folder / "CODE.fd"
        firmware.write_bytes(bytes(SIZE))
        self.write(b"first")
        self.vars.chmod(0o640)
        text = xml_of(lab.define(lab.disk("a")))
        loader = f"<loader readonly='yes' type='pflash'>{firmware}</loader><nvram>{self.vars}</nvram>"
        text = text.replace("</os>", f"{loader}</os><features><acpi/></features>")
        self.domain: libvirt.virDomain = lab.conn.defineXML(text)
        self.name: str = self.domain.name()

    def write(self, data: bytes) -> None:
        self.vars.write_bytes(data.ljust(SIZE, b"\xff"))

    def read(self, path: Path | None = None) -> bytes:
        return (path or self.vars).read_bytes().rstrip(b"\xff")

    def copies(self) -> list[str]:
        return sorted(path.name for path in self.lab.folder.iterdir() if "VARS" in path.name and path != self.vars)


@pytest.fixture
def uefi(lab: Lab) -> Uefi:
    return Uefi(lab)


def test_they_are_frozen_reverted_and_deleted(uefi: Uefi, capsys: pytest.CaptureFixture[str]) -> None:
    conn, name = uefi.lab.conn, uefi.name
    first = create_snapshot(conn, name, "s1")
    uefi.domain.create()
    uefi.write(b"second")  # QEMU has the file open, and would have written it so
    live = create_snapshot(conn, name, "s2")
    assert first.nvram is not None
    assert live.nvram is not None
    assert (uefi.read(first.nvram), uefi.read(live.nvram)) == (b"first", b"second")
    assert first.nvram.stat().st_mode & 0o777 == 0o640
    uefi.write(b"third")
    assert main(["snapshot", "revert", name, "s1", "-c", uefi.lab.uri]) == 0
    assert "UEFI" not in capsys.readouterr().err
    assert uefi.read() == b"first"
    assert str(uefi.vars) in xml_of(uefi.domain)
    assert ".snapshot-" not in xml_of(uefi.domain)
    uefi.domain.create()
    uefi.domain.destroy()
    revert(conn, name, "s2")
    assert uefi.read() == b"second"
    assert main(["doctor", name, "-c", uefi.lab.uri]) == 0
    delete(conn, name, "s1")
    assert uefi.copies() == [live.nvram.name]
    revert(conn, name, "s2")
    delete(conn, name, "s2")
    assert (uefi.copies(), uefi.read()) == ([], b"second")


def test_a_clone_gets_the_frozen_ones_and_destroy_leaves_none(uefi: Uefi) -> None:
    conn, name = uefi.lab.conn, uefi.name
    create_snapshot(conn, name, "s1")
    uefi.write(b"second")
    create_snapshot(conn, name, "s2")
    report = clone(conn, name, "s1", f"{name}-clone")
    uefi.lab.adopt(f"{name}-clone")
    assert report.nvram is not None
    assert (report.nvram != uefi.vars, uefi.read(report.nvram)) == (True, b"first")
    assert destroy(conn, f"{name}-clone").changed
    assert len(uefi.copies()) == 2
    uefi.domain.create()
    assert main(["snapshot", "delete", name, "s1", "--children", "-c", uefi.lab.uri]) == 0  # in one step, beneath it
    assert uefi.copies() == []
    uefi.domain.destroy()
    create_snapshot(conn, name, "s3")
    destroy(conn, name)
    assert uefi.copies() == []


def test_what_is_taken_back_leaves_no_copy(uefi: Uefi, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DomainError(uefi.name, "is edited by somebody")

    with monkeypatch.context() as patched:
        patched.setattr(create_run, "_define", fail)
        with pytest.raises(DomainError):
            create_snapshot(uefi.lab.conn, uefi.name, "s1")
    assert uefi.copies() == []

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(create_run, "_define", die)
        patched.setattr(create_run, "_undo", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            create_snapshot(uefi.lab.conn, uefi.name, "s1")
    assert len(uefi.copies()) == 1
    (settled,) = recover(uefi.lab.conn, [uefi.name])
    assert (settled.finished, uefi.copies()) == (False, [])


def test_an_interrupted_revert_is_finished_with_them(uefi: Uefi, monkeypatch: pytest.MonkeyPatch) -> None:
    create_snapshot(uefi.lab.conn, uefi.name, "s1")
    uefi.write(b"later")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(revert_run, "restore_nvram", die)
        with pytest.raises(KeyboardInterrupt):
            revert(uefi.lab.conn, uefi.name, "s1")
    assert uefi.read() == b"later"
    assert IntentStore.of(uefi.lab.conn).has(uefi.domain.UUIDString())
    (settled,) = recover(uefi.lab.conn, [uefi.name])
    assert (settled.finished, uefi.read()) == (True, b"first")


def test_where_they_cannot_be_frozen_it_is_said(uefi: Uefi, capsys: pytest.CaptureFixture[str]) -> None:
    uefi.vars.unlink()
    report = create_snapshot(uefi.lab.conn, uefi.name, "s1")
    assert report.nvram is None
    what = "the UEFI variables stay what they are when the domain is reverted"
    assert report.skipped == (("nvram", f"{uefi.vars} does not exist yet: {what}"),)
    uefi.write(b"now")
    assert revert(uefi.lab.conn, uefi.name, "s1").notes == (
        "the snapshot has no UEFI variables: they stay what they are",
    )
    assert uefi.read() == b"now"
    assert main(["snapshot", "create", uefi.name, "s2", "--dry-run", "-c", uefi.lab.uri]) == 0
    assert f"nvram: {uefi.vars}.snapshot-000001" in capsys.readouterr().out
    assert uefi.copies() == []


@pytest.mark.parametrize(
    ("elements", "left_out"),
    [
        ("<os/>", []),
        ("<os><loader type='rom'>/x</loader></os>", []),
        ("<os firmware='efi'/>", ["nvram: the XML names no file of UEFI variables"]),
        ("<os><nvram format='qcow2'>/x/vars.qcow2</nvram></os>", ["nvram: /x/vars.qcow2 is no raw file"]),
        ("<os><nvram type='network'><source protocol='nbd'/></nvram></os>", ["nvram: the XML names no file"]),
        ("<devices><tpm><backend type='emulator'/></tpm></devices>", ["tpm: its state is swtpm's, and stays"]),
        ("<devices><tpm><backend type='passthrough'/></tpm></devices>", []),
    ],
)
def test_what_is_left_out(elements: str, left_out: list[str]) -> None:
    copy, found = plan_nvram(f"<domain>{elements}</domain>")
    assert copy is None
    assert [f"{what}: {why}".startswith(start) for (what, why), start in zip(found, left_out, strict=True)] == [
        True for _ in left_out
    ]


def test_the_xml_in_each_form() -> None:
    for inner in ("<nvram>/v.fd</nvram>", "<nvram type='file'><source file='/v.fd'/></nvram>"):
        domain = f"<domain><os>{inner}</os><devices/></domain>"
        snapshot = with_nvram(f"<domainsnapshot><disks/>{domain}</domainsnapshot>", Path("/v.fd.snapshot-000007"))
        assert frozen_nvram(snapshot) == Path("/v.fd.snapshot-000007")
        assert "/v.fd<" in domain_of(snapshot) or '"/v.fd"' in domain_of(snapshot)
        assert frozen_nvram(f"<domainsnapshot>{domain}</domainsnapshot>") is None
