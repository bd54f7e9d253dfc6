"""Consolidation: links that no snapshot has are merged, and everything reads what it read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import DomainError, create_overlay
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import clone_domain, consolidate_domain
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete import run as delete_module
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from tests.domain.delete.test_delete import chain_in_xml_fits, read, seen, tops, write
from tests.domain.lab import MIB, Lab, contents, xml_of
from tests.support.schemas import check

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


@pytest.fixture
def domain(lab: Lab) -> libvirt.virDomain:
    """Return a domain of two disks whose snapshots s1 and s3 are known, and s2 and s4 left their links behind."""
    domain = lab.define(lab.disk("a", size=2 * MIB), lab.disk("b", size=2 * MIB))
    for number in (1, 2, 3, 4):
        write(domain, number)
        create_snapshot(lab.conn, domain.name(), f"s{number}")
    write(domain, 5)
    for name in ("s2", "s4"):
        delete(lab.conn, domain.name(), name, metadata=True)
    return domain


def test_what_snapshots_left_behind(lab: Lab, domain: libvirt.virDomain) -> None:
    held, files = seen(lab, domain), contents(lab.folder)
    plan = consolidate_domain(lab.conn, domain.name(), dry_run=True)
    assert (contents(lab.folder), plan.changed) == (files, False)
    report = consolidate_domain(lab.conn, domain.name())
    assert [(one.target, one.path) for one in report.merged] == [(one.target, one.path) for one in plan.merged]
    assert sorted(one.path.name for one in report.merged) == [
        "a-000001.vmdk", "a-000003.vmdk", "b-000001.vmdk", "b-000003.vmdk",
    ]  # fmt: skip
    assert (report.kept, report.orphans) == ((), ())
    assert seen(lab, domain) == held
    chain_in_xml_fits(domain)
    assert len([*lab.folder.glob("a*.vmdk")]) == 3
    assert IntentStore.of(lab.conn).uuids() == []
    assert [c for c in check_domain(lab.conn, domain.name()) if c.verdict == "bad"] == []
    assert not consolidate_domain(lab.conn, domain.name()).changed
    domain.create()
    domain.destroy()


def test_a_template_and_what_others_need_stay(lab: Lab, domain: libvirt.virDomain) -> None:
    template = lab.disk("template")
    create_overlay(lab.folder / "vm.vmdk", template)
    other = lab.define(lab.folder / "vm.vmdk")
    write(other, 1)
    held, before = read(tops(other)[0]), read(template)
    report = consolidate_domain(lab.conn, other.name())
    assert [(path.name, reason) for path, reason in report.kept] == [
        (
            "template.vmdk",
            "the name of vm.vmdk is not that of an overlay on it: it may be a template (--include merges it)",
        )
    ]
    assert (read(tops(other)[0]), read(template)) == (held, before)
    report = consolidate_domain(lab.conn, other.name(), include=[template])
    assert ([one.path for one in report.merged], tops(other)) == ([template], [template])
    assert read(template) == held

    delete(lab.conn, domain.name(), "s1", metadata=True)  # its link is the base of a clone by now
    create_overlay(lab.folder / "hand.vmdk", lab.folder / "a.vmdk")
    everything = seen(lab, domain)
    clone_domain(lab.conn, domain.name(), "s3", "test")
    lab.adopt("test")
    report = consolidate_domain(lab.conn, domain.name())
    kept = {path.name: reason for path, reason in report.kept}
    assert "domain test has it below its disk vda" in kept["a-000001.vmdk"]
    assert {path.name for path in report.orphans} == {"hand.vmdk"}
    assert sorted(one.path.name for one in report.merged) == ["a-000003.vmdk", "b-000003.vmdk"]
    assert seen(lab, domain) == everything


def test_a_running_domain_is_refused(lab: Lab, domain: libvirt.virDomain) -> None:
    domain.create()
    before = (contents(lab.folder), xml_of(domain))
    for dry_run in (True, False):
        with pytest.raises(DomainError, match="runs: shut it off first"):
            consolidate_domain(lab.conn, domain.name(), dry_run=dry_run)
    assert (contents(lab.folder), xml_of(domain)) == before


@pytest.mark.parametrize("step", ["_merge_down", "_move", "_change_xml"])
def test_interrupted(lab: Lab, domain: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    held, real = seen(lab, domain), getattr(delete_module, step)

    def dies(*words: object) -> None:
        real(*words)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(delete_module, step, dies)
        with pytest.raises(KeyboardInterrupt):
            consolidate_domain(lab.conn, domain.name())
    (result,) = recover(lab.conn, [domain.name()])
    assert (result.operation, result.finished) == ("consolidate", True)
    assert seen(lab, domain) == held
    assert len(consolidate_domain(lab.conn, domain.name()).merged) == 3
    assert seen(lab, domain) == held


def test_the_command(lab: Lab, domain: libvirt.virDomain, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["snapshot", "consolidate", "-c", lab.uri, domain.name()]
    assert main([*line, "--dry-run"]) == 0
    assert "a-000003.vmdk would be merged\n  vda: merge " in capsys.readouterr().out
    assert main([*line, "--output=json"]) == 0
    answer = check("snapshot consolidate", capsys.readouterr().out)
    assert {Path(one["filename"]).name[:2] for one in answer["merged"]} == {"a-", "b-"}
    assert main(line) == 0
    assert capsys.readouterr().out == f"Domain {domain.name()} needs no consolidation\n"
