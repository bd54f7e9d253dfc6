"""Clones: another identity, the same bytes, and an original that knows of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import DomainError, DomainExists, InvalidRequest, StillNeeded, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import clone_domain
from qemu_vmdk_snap.domain.clone.plan import Mode
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.xml.nvram import nvram_of
from tests.domain.delete.test_delete import chain_in_xml_fits, read, seen, tops, write
from tests.domain.lab import MIB, Lab, contents, xml_of
from tests.support.schemas import check

MODES: tuple[Mode, ...] = ("linked", "full")

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")

CDROM = (
    "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><target dev='hda' bus='ide'/><readonly/></disk>"
)
EXTRA = "<interface type='user'><mac address='52:54:00:11:22:33'/></interface><interface type='user'/>"


@pytest.fixture
def domain(lab: Lab) -> libvirt.virDomain:
    """Return a domain of two disks with the snapshots s1 and s2, each with data of its own."""
    domain = lab.define(lab.disk("a", size=2 * MIB), lab.disk("b", size=2 * MIB), extra=EXTRA)
    for number in (1, 2):
        write(domain, number)
        create_snapshot(lab.conn, domain.name(), f"s{number}")
    write(domain, 3)
    return domain


def identity(domain: libvirt.virDomain) -> tuple[str, str, set[str]]:
    root = ET.fromstring(xml_of(domain))
    macs = {one.get("address", "") for one in root.findall("./devices/interface/mac")}
    assert len(macs) == 2
    return root.findtext("name", ""), root.findtext("uuid", ""), macs


@pytest.mark.parametrize("mode", MODES)
def test_a_clone_of_a_snapshot(lab: Lab, domain: libvirt.virDomain, mode: Mode) -> None:
    before, images = seen(lab, domain), contents(lab.folder)
    plan = clone_domain(lab.conn, domain.name(), "s1", "copy", mode=mode, dry_run=True)
    assert not plan.changed
    assert contents(lab.folder) == images
    assert plan.as_dict() | {"dry-run": True} == plan.as_dict()
    report = clone_domain(lab.conn, domain.name(), "s1", "copy", mode=mode)
    lab.adopt("copy")
    assert report.disks == plan.disks
    made = lab.conn.lookupByName("copy")
    assert made.UUIDString() == report.uuid
    mine, others = identity(domain), identity(made)
    assert (mine[0] != others[0], mine[1] != others[1], mine[2] & others[2]) == (True, True, set())
    assert set(report.macs) == others[2]
    assert [read(path) for path in tops(made)] == before["s1"]
    assert tops(made) == [lab.folder / "copy-vda.vmdk", lab.folder / "copy-vdb.vmdk"]
    chain_in_xml_fits(made)
    with open_chain(lab.folder / "copy-vda.vmdk") as chain:
        assert chain.depth == (2 if mode == "linked" else 1)
    assert {name: text for name, text in contents(lab.folder).items() if name in images} == images
    write(made, 9)
    assert seen(lab, domain) == before
    assert IntentStore.of(lab.conn).uuids() == []
    assert not list(lab.folder.glob(".*"))
    made.create()
    made.destroy()
    for one in (domain.name(), "copy"):
        assert [c for c in check_domain(lab.conn, one) if c.verdict == "bad"] == []


def test_the_original_knows_of_a_linked_clone(lab: Lab, domain: libvirt.virDomain) -> None:
    clone_domain(lab.conn, domain.name(), "s1", "linked")
    lab.adopt("linked")
    held = [read(path) for path in tops(lab.conn.lookupByName("linked"))]
    with pytest.raises(StillNeeded, match=r"a.vmdk: is still needed: domain linked has it below its disk vda"):
        delete(lab.conn, domain.name(), "s1")
    delete(lab.conn, domain.name(), "s2")
    assert [read(path) for path in tops(lab.conn.lookupByName("linked"))] == held
    create_snapshot(lab.conn, "linked", "own")
    delete(lab.conn, "linked", "own")
    assert [read(path) for path in tops(lab.conn.lookupByName("linked"))] == held


def test_a_domain_as_it_is(lab: Lab, domain: libvirt.virDomain) -> None:
    before = seen(lab, domain)["now"]
    folder = lab.folder / "other"
    folder.mkdir()
    report = clone_domain(lab.conn, domain.name(), None, "whole", folder=folder)
    lab.adopt("whole")
    made = lab.conn.lookupByName("whole")
    assert (report.mode, tops(made)) == ("full", [folder / "whole-vda.vmdk", folder / "whole-vdb.vmdk"])
    assert [read(path) for path in tops(made)] == before
    assert made.snapshotNum() == 0
    write(made, 7)
    assert seen(lab, domain)["now"] == before


def test_a_running_domain(lab: Lab, domain: libvirt.virDomain) -> None:
    held = seen(lab, domain)["s2"]
    domain.create()
    with pytest.raises(DomainError, match=r"runs, so its disks change: `snapshot create` one and clone that"):
        clone_domain(lab.conn, domain.name(), None, "whole")
    for mode in MODES:
        clone_domain(lab.conn, domain.name(), "s2", mode, mode=mode)
        lab.adopt(mode)
        assert [read(path) for path in tops(lab.conn.lookupByName(mode))] == held
    lab.conn.lookupByName("linked").create()
    lab.conn.lookupByName("linked").destroy()


def test_what_is_refused_changes_nothing(lab: Lab, domain: libvirt.virDomain) -> None:
    other = lab.define(lab.disk("q"), disk_xml={"vda": "<transient/>"})
    (lab.folder / "busy-vdb.vmdk").write_bytes(b"mine")
    before = (contents(lab.folder), xml_of(domain))
    for snapshot, name, error, reason in (
        ("s1", domain.name(), DomainExists, "exists already"),
        ("s1", "../x", InvalidRequest, "must not be empty, contain '/'"),
        ("s1", "busy", DomainError, "disk vdb: .*busy-vdb.vmdk exists already"),
        ("s9", "new", DomainError, "has no snapshot 's9'"),
    ):
        with pytest.raises(error, match=reason):
            clone_domain(lab.conn, domain.name(), snapshot, name)
    with pytest.raises(InvalidRequest, match="a linked clone is on frozen files: name a snapshot"):
        clone_domain(lab.conn, domain.name(), None, "new", mode="linked")
    with pytest.raises(DomainError, match=r"disk vda is transient.*: the clone would write into that of the original"):
        clone_domain(lab.conn, other.name(), None, "new")
    assert (contents(lab.folder), xml_of(domain)) == before
    assert IntentStore.of(lab.conn).uuids() == []


@pytest.mark.parametrize("form", ["<nvram>{}</nvram>", "<nvram type='file'><source file='{}'/></nvram>"])
def test_the_uefi_variables_are_copied_and_a_cdrom_is_shared(lab: Lab, form: str) -> None:
    domain = lab.define(lab.disk("a"), extra=CDROM + EXTRA)
    nvram = lab.folder / "d_VARS.fd"
    nvram.write_bytes(b"variables" * 100)
    code = lab.folder / "CODE.fd"
    code.write_bytes(bytes(4096))
    text = xml_of(domain).replace(
        "</os>",
        f"<loader readonly='yes' type='pflash'>{code}</loader>{form.format(nvram)}</os><features><acpi/></features>",
    )
    lab.conn.defineXML(text)
    report = clone_domain(lab.conn, domain.name(), None, "uefi")
    lab.adopt("uefi")
    assert report.nvram == lab.folder / "uefi_VARS.fd"
    assert report.nvram.read_bytes() == nvram.read_bytes()
    variables = nvram_of(xml_of(lab.conn.lookupByName("uefi")))
    assert variables is not None
    assert variables.path == report.nvram


def test_the_command(lab: Lab, domain: libvirt.virDomain, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["snapshot", "clone", "-c", lab.uri, domain.name()]
    assert main([*line, "--dry-run", "s1", "--linked", "new"]) == 0
    assert capsys.readouterr().out.startswith(
        f"Domain new would be made: a linked clone of snapshot s1 of {domain.name()}\n"
    )
    assert main([*line, "s1", "new", "--output=json"]) == 0
    lab.adopt("new")
    answer = check("snapshot clone", capsys.readouterr().out)
    assert [Path(disk["filename"]).name for disk in answer["disks"]] == ["new-vda.vmdk", "new-vdb.vmdk"]
    assert main([*line, "new", "--output=json"]) == 69
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "domain-exists"
