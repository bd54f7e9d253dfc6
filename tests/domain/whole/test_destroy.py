"""Destroying a domain: every file that is its alone goes, and nothing that anybody else needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import DomainError, LockBusy, StillNeeded, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import clone_domain, destroy_domain
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.destroy import run as destroy_module
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.revert.run import revert
from tests.domain.delete.test_delete import read, seen, tops, write
from tests.domain.lab import MIB, Lab, contents, xml_of
from tests.support.schemas import check

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")

ISO = (
    "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{iso}'/>"
    "<target dev='hda' bus='ide'/></disk>"
)


@pytest.fixture
def domain(lab: Lab) -> libvirt.virDomain:
    """Return a domain with a branch that a revert has kept."""
    domain = lab.define(lab.disk("a", size=2 * MIB))
    for number in (1, 2):
        write(domain, number)
        create_snapshot(lab.conn, domain.name(), f"s{number}")
    write(domain, 3)
    revert(lab.conn, domain.name(), "s1")
    return domain


def names(lab: Lab) -> list[str]:
    return sorted(path.name for path in lab.folder.iterdir())


def known(lab: Lab) -> list[str]:
    return [domain.name() for domain in lab.conn.listAllDomains()]


def test_everything_that_is_its_alone(lab: Lab, domain: libvirt.virDomain) -> None:
    (lab.folder / "cd.iso").write_bytes(b"iso")
    (lab.folder / "notes.txt").write_text("mine")
    lab.conn.defineXML(xml_of(domain).replace("</devices>", ISO.format(iso=lab.folder / "cd.iso") + "</devices>"))
    before = contents(lab.folder)
    plan = destroy_domain(lab.conn, domain.name(), dry_run=True)
    assert (contents(lab.folder), plan.changed) == (before, False)
    report = destroy_domain(lab.conn, domain.name())
    assert report.deleted == plan.deleted
    assert sorted(path.name for path, _ in report.deleted) == [
        f"a{end}.vmdk" for end in ("-000001", "-000002", "-000003", "")
    ]
    assert names(lab) == ["cd.iso", "notes.txt"]
    assert report.uuid not in {one.UUIDString() for one in lab.conn.listAllDomains()}
    assert report.snapshots == ("s1", "s2")
    assert IntentStore.of(lab.conn).uuids() == []


def test_a_clone_goes_and_its_original_stays(lab: Lab, domain: libvirt.virDomain) -> None:
    before, files = seen(lab, domain), contents(lab.folder)
    clone_domain(lab.conn, domain.name(), "s1", "test")
    lab.adopt("test")
    create_snapshot(lab.conn, "test", "own")
    with pytest.raises(StillNeeded, match=r"a.vmdk: is still needed: domain test has it below its disk vda"):
        destroy_domain(lab.conn, domain.name())
    report = destroy_domain(lab.conn, "test")
    assert [path.name for path, _ in report.deleted] == ["test-vda-000001.vmdk", "test-vda.vmdk"]
    assert [(path.name, reason) for path, reason in report.kept] == [
        ("a.vmdk", "is only below its disks: it was never written by the domain")
    ]
    assert (seen(lab, domain), contents(lab.folder)) == (before, files)


def test_what_is_refused_changes_nothing(lab: Lab, domain: libvirt.virDomain) -> None:
    create_overlay(lab.folder / "hand.vmdk", lab.folder / "a-000001.vmdk")
    before = (contents(lab.folder), xml_of(domain), domain.snapshotListNames())
    with pytest.raises(StillNeeded, match=r"hand.vmdk names it as its parent .*--orphan FILE"):
        destroy_domain(lab.conn, domain.name())
    hand = [lab.folder / "hand.vmdk"]
    with (
        open_chain(tops(domain)[0], writable=True),
        pytest.raises(LockBusy),
    ):
        destroy_domain(lab.conn, domain.name(), orphans=hand)
    domain.create()
    with pytest.raises(DomainError, match=r"runs: shut it off first"):
        destroy_domain(lab.conn, domain.name(), orphans=hand)
    domain.destroy()
    other = lab.define(tops(domain)[0])
    with pytest.raises(StillNeeded, match=rf"domain {other.name()} has it as its disk vda"):
        destroy_domain(lab.conn, domain.name(), orphans=hand)
    assert (contents(lab.folder), xml_of(domain), domain.snapshotListNames()) == before
    other.undefine()
    destroy_domain(lab.conn, domain.name(), orphans=hand)
    assert names(lab) == ["hand.vmdk"]


@pytest.mark.parametrize("step", ["undefine", "unlink"])
def test_interrupted(lab: Lab, domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Before libvirt has forgotten it the domain is whole again; after it the files go."""
    held, uuid = seen(lab, domain), domain.UUIDString()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    def half_undefined() -> None:
        domain.snapshotLookupByName("s2").delete(2)  # as libvirt leaves it when it is killed in the middle
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        if step == "undefine":
            dying.setattr(destroy_module, "_undefine_flags", half_undefined)
            dying.setattr(destroy_module, "settle", dies)
        else:
            dying.setattr(destroy_module, "_unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            destroy_domain(lab.conn, domain.name())
    assert IntentStore.of(lab.conn).uuids() == [uuid]
    (result,) = recover(lab.conn)
    assert (result.operation, result.finished) == ("destroy", step == "unlink")
    assert IntentStore.of(lab.conn).uuids() == []
    if step == "unlink":
        assert names(lab) == []
    else:
        assert seen(lab, domain) == held
        assert domain.snapshotCurrent().getName() == "s1"


def test_what_came_to_be_needed_stays(lab: Lab, domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(destroy_module, "_unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            destroy_domain(lab.conn, domain.name())
    other = lab.define(lab.folder / "a.vmdk")
    held = read(lab.folder / "a.vmdk")
    (result,) = recover(lab.conn)
    assert [path.name for path in result.left] == ["a.vmdk"]
    assert names(lab) == ["a.vmdk"]
    assert read(tops(other)[0]) == held


def test_the_command(lab: Lab, domain: libvirt.virDomain, capsys: pytest.CaptureFixture[str]) -> None:
    name = domain.name()
    line = ["snapshot", "destroy", "-c", lab.uri, name]
    assert main(line) == 64
    assert "give --storage to delete its files; `virsh undefine" in capsys.readouterr().err
    assert main([*line, "--storage", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"Domain {name} would be undefined, with 2 snapshots\n")
    assert main([*line, "--storage", "--output=json"]) == 0
    assert name not in known(lab)
    answer = check("snapshot destroy", capsys.readouterr().out)
    assert sorted(Path(one["filename"]).name for one in answer["deleted"])[-1] == "a.vmdk"
