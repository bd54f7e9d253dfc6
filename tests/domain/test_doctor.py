"""The doctor: a healthy host and domain are good, and everything that is wrong is told by name."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qemu_vmdk_snap import DomainError, LockBusy, StillNeeded, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.connect import find_domain
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.doctor.host import check_host
from qemu_vmdk_snap.domain.needs.orphans import find_orphans, remove_orphan
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.xml.kept import kept_branches
from tests.domain.lab import Lab, contents, xml_of

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


class Patient:
    """A domain with two snapshots, and the doctor's answer about it."""

    def __init__(self, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
        self.lab, self.capsys = lab, capsys
        self.domain = lab.define(lab.disk("a"))
        self.name: str = self.domain.name()
        for name in ("s1", "s2"):
            create_snapshot(lab.conn, self.name, name)

    def file(self, number: int) -> Path:
        return self.lab.folder / ("a.vmdk" if not number else f"a-{number:06d}.vmdk")

    def ask(self, *options: str) -> tuple[int, dict[str, Any]]:
        status = main(["doctor", "-c", self.lab.uri, self.name, "--output=json", *options])
        printed = self.capsys.readouterr()
        assert printed.err == ""
        return status, json.loads(printed.out)

    def bad(self, *options: str) -> dict[str, str]:
        status, answer = self.ask(*options)
        bad = {check["subject"]: check["text"] for check in answer["checks"] if check["verdict"] == "bad"}
        assert (status, answer["good"]) == ((1, False) if bad else (0, True))
        return bad


@pytest.fixture
def patient(lab: Lab, capsys: pytest.CaptureFixture[str]) -> Patient:
    return Patient(lab, capsys)


def write(path: Path, data: bytes = b"x") -> None:
    with open_chain(path, writable=True) as chain:
        chain.write_at(8192, data.ljust(512))


def test_a_healthy_domain_is_good(patient: Patient) -> None:
    before = contents(patient.lab.folder)
    status, answer = patient.ask()
    assert (status, answer["good"], answer["done"]) == (0, True, [])
    assert {check["subject"]: check["verdict"] for check in answer["checks"]} == {
        "disk vda": "good",
        "snapshot s1": "good",
        "snapshot s2": "good",
    }
    assert contents(patient.lab.folder) == before
    assert main(["doctor", "-c", patient.lab.uri, patient.name]) == 0
    assert "[good] disk vda: " in patient.capsys.readouterr().out


def test_a_healthy_running_domain_is_good(patient: Patient) -> None:
    patient.domain.create()
    assert patient.bad() == {}
    create_snapshot(patient.lab.conn, patient.name, "live")
    assert patient.bad() == {}
    patient.domain.destroy()
    assert patient.bad() == {}


def test_what_reverts_have_kept_is_told_apart(patient: Patient) -> None:
    """Of each revert after the first the kept top is in no snapshot; only the doctor can tell whose it is."""
    for _ in range(3):
        revert(patient.lab.conn, patient.name, "s1")
    write(patient.file(3))
    stranger = patient.lab.folder / "stranger.vmdk"
    create_overlay(stranger, patient.file(1))
    status, answer = patient.ask()
    told = {check["subject"]: (check["verdict"], check["text"]) for check in answer["checks"]}
    assert status == 1
    assert told[f"orphan {stranger}"][0] == "bad"
    stranger.unlink()
    assert patient.bad() == {}
    for number, holds in ((3, "holds 76 KiB:"), (4, "holds nothing:")):
        verdict, text = told[f"kept {patient.file(number)}"]
        assert verdict == "note"
        assert text.startswith(f"was kept by the revert to 's1', is backed by {patient.file(0)} and {holds}")
        assert f"`doctor {patient.name} --discard {patient.file(number)}` removes it" in text
    assert sum(subject.startswith("kept ") for subject in told) == 2
    # What it says can be done is done.
    patient.ask("--discard", str(patient.file(3)))
    assert not patient.file(3).exists()
    _, answer = patient.ask("--adopt")
    assert [one["path"] for one in answer["done"]] == [str(patient.file(4))]
    assert not any(check["subject"].startswith(("kept ", "orphan ")) for check in answer["checks"])
    # Metadata of other programs is still there, and a file that is gone is forgotten by the next revert.
    # (The second overlay, too, was kept; snapshot s2 names it as the one that it was made with.)
    text = xml_of(patient.domain)
    assert "<app:by who='me'/>" in text or '<app:by who="me"/>' in text
    revert(patient.lab.conn, patient.name, "s1", discard=True)
    assert set(kept_branches(xml_of(patient.domain))) == {patient.file(2), patient.file(4)}


def test_a_kept_branch_that_has_become_a_base_is_still_told(patient: Patient) -> None:
    for _ in range(2):
        revert(patient.lab.conn, patient.name, "s1")
    write(patient.file(3))  # a kept branch without data goes with its snapshot
    delete(patient.lab.conn, patient.name, ["s2", "s1"])
    assert patient.bad() == {}
    _, answer = patient.ask()
    told = {check["subject"]: check["text"] for check in answer["checks"]}
    assert told[f"kept {patient.file(3)}"] == (
        "was kept by the revert to 's1' and is backed by no file of the domain any more: delete the file, or use it as "
        "a disk of its own"
    )
    patient.file(3).unlink()
    assert not any(
        subject == f"kept {patient.file(3)}" for subject in {c["subject"] for c in patient.ask()[1]["checks"]}
    )


def lose_base(patient: Patient) -> None:
    patient.file(0).unlink()


def write_frozen(patient: Patient) -> None:
    write(patient.file(1))


def shorten_xml(patient: Patient) -> None:
    patient.lab.conn.defineXML(
        edited(patient, f"<source file='{patient.file(1)}'/>", f"<source file='{patient.file(0)}'/>")
    )


def forget_chain(patient: Patient) -> None:
    text = patient.domain.XMLDesc(0)
    begin, end = text.index("<backingStore"), text.rindex("</backingStore>") + len("</backingStore>")
    patient.lab.conn.defineXML(text[:begin] + text[end:])


def other_top(patient: Patient) -> None:
    elsewhere = patient.lab.disk("b")
    text = patient.domain.XMLDesc(0)
    begin, end = text.index("<backingStore"), text.rindex("</backingStore>") + len("</backingStore>")
    patient.lab.conn.defineXML((text[:begin] + text[end:]).replace(str(patient.file(2)), str(elsewhere)))


def edited(patient: Patient, old: str, new: str) -> str:
    text: str = patient.domain.XMLDesc(0)
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("damage", "subject", "text"),
    [
        (lose_base, "disk vda", "its parent 'a.vmdk' does not exist"),
        (lose_base, "snapshot s1", "a.vmdk"),
        (write_frozen, "disk vda", "the parent was modified after the overlay was made"),
        (shorten_xml, "disk vda", "its files another chain"),
        (forget_chain, "disk vda", "has 3 links that the XML does not spell out: libvirt refuses to start it"),
        (other_top, "snapshot s2", "is the current one, but disk vda is not backed by its "),
    ],
)
def test_what_does_not_agree_is_told(
    patient: Patient, damage: Callable[[Patient], None], subject: str, text: str
) -> None:
    damage(patient)
    assert text in patient.bad()[subject]


def test_a_drive_with_an_iso_is_not_bad(patient: Patient) -> None:
    """What is no VMDK disk has a line with the reason, and is not opened as one."""
    iso = patient.lab.folder / "install.iso"
    iso.write_bytes(b"no VMDK")
    text = xml_of(patient.domain)
    drives = (
        f"<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{iso}'/>"
        "<target dev='sda' bus='sata'/><readonly/></disk>"
        "<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk></devices>"
    )
    patient.lab.conn.defineXML(text.replace("</devices>", drives))
    assert patient.bad() == {}
    _, answer = patient.ask()
    told = {check["subject"]: (check["verdict"], check["text"]) for check in answer["checks"]}
    reason = "takes no part in snapshots: it is a cdrom, not a disk"
    assert told["disk sda"] == told["disk sdb"] == ("note", reason)


@pytest.mark.needs("qemu-img")
def test_a_qcow2_top_on_a_vmdk_is_described(patient: Patient) -> None:
    top = patient.lab.folder / "virsh.s3"
    words = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", str(patient.file(2)), "-F", "vmdk", str(top), "4M"]
    subprocess.run(words, check=True)
    text = xml_of(patient.domain)
    start, end = text.index("<driver name='qemu' type='vmdk'/>"), text.index("<target dev='vda'")
    named = f"<driver name='qemu' type='qcow2'/><source file='{top}'/>"
    patient.lab.conn.defineXML(text[:start] + named + text[end:])
    _, answer = patient.ask()
    told = {check["subject"]: (check["verdict"], check["text"]) for check in answer["checks"]}
    assert told["disk vda"][0] == "bad"  # no snapshot of virsh's is the reason for it
    assert f"its top {top} is backed by the VMDK {patient.file(2)}, which must stay as it is" in told["disk vda"][1]
    with open_chain(patient.file(2)) as chain:
        shown = chain.read_at(0, chain.capacity)
    for name in ("s1", "s2"):
        with contextlib.suppress(StillNeeded):
            delete(patient.lab.conn, patient.name, name)
    with open_chain(patient.file(2)) as chain:  # it is there, and reads as before
        assert chain.read_at(0, chain.capacity) == shown


def test_a_top_that_something_reads_is_bad(patient: Patient) -> None:
    above = orphan(patient, "above.snap1", patient.file(2))
    text = patient.bad()["disk vda"]
    assert text.startswith(f"its top {patient.file(2)} backs {above}, and what the guest writes changes")
    assert text.endswith(f"`snapshot create {patient.name}` puts a new top on it")


def test_a_frozen_file_as_the_top_is_bad(patient: Patient) -> None:
    text = xml_of(patient.domain)
    start = text.index("<source file=")
    end = text.index("<target dev='vda'")
    top = (
        f"<source file='{patient.file(1)}'/><backingStore type='file'><format type='vmdk'/>"
        f"<source file='{patient.file(0)}'/><backingStore/></backingStore>"
    )
    patient.lab.conn.defineXML(text[:start] + top + text[end:])
    _, answer = patient.ask()
    lines = [check["text"] for check in answer["checks"] if (check["subject"], check["verdict"]) == ("disk vda", "bad")]
    what = f"its top {patient.file(1)} is what snapshot 's2' froze, and what the guest writes changes that"
    ways = (
        f"`doctor {patient.name} --repair` lets the XML name the top of before",
        f"or `snapshot revert {patient.name} s2` puts an overlay on it",
    )
    assert lines == [f"{what}: {', '.join(ways)}"]
    revert(patient.lab.conn, patient.name, "s2")
    assert patient.bad() == {}


def test_a_frozen_file_that_does_not_fit_its_overlays_is_bad(patient: Patient) -> None:
    revert(patient.lab.conn, patient.name, "s1")
    write(patient.file(1))  # not in the active chain
    assert "--relink-cids" in patient.bad()["snapshot s2"]


def test_who_else_needs_a_file_is_told(patient: Patient) -> None:
    clone = orphan(patient, "clone.vmdk", patient.file(0))
    other = patient.lab.define(clone).name()
    _, answer = patient.ask()
    told = {check["subject"]: (check["verdict"], check["text"]) for check in answer["checks"]}
    line = f"is needed: domain {other} has it below its disk vda ({clone}) (`--orphan FILE` gives a file up)"
    assert told[f"file {patient.file(0)}"] == ("note", line)


def test_an_unfinished_snapshot_is_told(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore

    store = IntentStore.of(patient.lab.conn)
    uuid = patient.domain.UUIDString()
    store.write(Intent(uuid, patient.name, "s3", (), "", "", ""))
    try:
        ways = f"`recover --abandon -c '{patient.lab.uri}' --domain {patient.name}` gives it up"
        assert patient.bad()["snapshots"].startswith("the create of snapshot 's3' is not finished: `recover -c ")
        assert patient.bad()["snapshots"].endswith(ways)
        texts = [check.text for check in check_host(patient.lab.uri) if check.verdict == "bad"]
        assert any(text.endswith(ways) for text in texts)
    finally:
        store.remove(uuid)


def orphan(patient: Patient, name: str, parent: Path, *, empty: bool = False) -> Path:
    path = patient.lab.folder / name
    create_overlay(path, parent, durable=False)
    if not empty:
        write(path)
    return path


def kib(path: Path) -> str:
    return f"{path.stat().st_blocks // 2} KiB"


def test_orphans_are_told_and_removed_only_when_they_hold_nothing(patient: Patient) -> None:
    empty = orphan(patient, "lost.vmdk", patient.file(1), empty=True)
    full = orphan(patient, "work.vmdk", patient.file(0))
    before, unnamed = contents(patient.lab.folder), "is named by no domain and no snapshot"
    ways = f"`doctor {patient.name} --adopt` makes it a snapshot, `doctor {patient.name}"
    assert patient.bad() == {
        f"orphan {empty}": f"is backed by {patient.file(1)}, {unnamed}, and holds nothing: {ways} --remove` removes it",
        f"orphan {full}": (
            f"is backed by {patient.file(0)}, {unnamed}, and holds {kib(full)}: {ways} --discard {full}` removes it"
        ),
    }
    assert contents(patient.lab.folder) == before
    status, answer = patient.ask("--remove")
    assert (status, answer["done"]) == (1, [{"path": str(empty), "snapshot": None}])
    assert not empty.exists()
    assert full.exists()
    assert patient.bad("--discard", str(full)) == {}
    assert not full.exists()
    del before[str(empty)], before[str(full)]
    assert contents(patient.lab.folder) == before


def test_what_is_in_use_named_or_stood_upon_is_not_removed(patient: Patient) -> None:
    lab, domain = patient.lab, patient.domain
    first = orphan(patient, "first.vmdk", patient.file(0))
    second = orphan(patient, "second.vmdk", first)
    with pytest.raises(DomainError, match=r"first\.vmdk is the parent of .*second\.vmdk: remove that first"):
        remove_orphan(lab.conn, domain, first, with_data=True)
    with pytest.raises(DomainError, match="contains data: it is removed only if it is named"):
        remove_orphan(lab.conn, domain, second)
    with open_chain(second), pytest.raises(LockBusy):
        remove_orphan(lab.conn, domain, second, with_data=True)
    for path in (patient.file(0), patient.file(2), lab.folder / "none.vmdk"):
        with pytest.raises(DomainError, match="is not an orphan of it"):
            remove_orphan(lab.conn, domain, path, with_data=True)
    assert {path.name for path in lab.folder.glob("*.vmdk")} == {
        "a.vmdk",
        "a-000001.vmdk",
        "a-000002.vmdk",
        "first.vmdk",
        "second.vmdk",
    }
    assert patient.bad("--discard", str(second), "--discard", str(first)) == {}


def test_the_disk_of_another_domain_is_no_orphan(patient: Patient) -> None:
    clone = orphan(patient, "clone.vmdk", patient.file(0))
    above = orphan(patient, "above.vmdk", clone)
    patient.lab.define(above)
    assert patient.bad() == {}


def test_orphans_are_adopted_as_snapshots(patient: Patient) -> None:
    first = orphan(patient, "first.vmdk", patient.file(0))
    second = orphan(patient, "second.vmdk", first)
    status, answer = patient.ask("--adopt")
    # The first has what stands on it for its overlay, so that is named now too.
    assert (status, answer["done"]) == (0, [{"path": str(first), "snapshot": "first"}])
    (found,) = [info for info in list_snapshots(patient.lab.conn, patient.name) if info.name == "first"]
    assert (found.parent, found.current) == ("s1", False)
    assert [(disk.frozen, disk.overlay, disk.problem) for disk in found.disks] == [(first, second, None)]
    assert find_orphans(patient.lab.conn, find_domain(patient.lab.conn, patient.name)) == []


def test_a_host_is_told_part_by_part(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "-c", lab.uri, "--output=json"])
    answer = json.loads(capsys.readouterr().out)
    verdicts = {check["subject"]: check["verdict"] for check in answer["checks"]}
    assert {"libvirt library", "libvirt daemon", "QEMU", "connection", "hook", "drop-ins", "KVM", "state"} <= set(
        verdicts
    )
    assert verdicts["libvirt library"] == verdicts["QEMU"] == "good"
    assert verdicts["qemu-system-x86_64"] == "good"
    assert (status == 0) is answer["good"] is ("bad" not in verdicts.values())


def test_what_is_wrong_with_a_host_is_bad(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks_d = tmp_path / "hooks.d"
    hooks_d.mkdir()
    (hooks_d / "10-a").write_text("#!/bin/sh\n")
    (hooks_d / "10-a").chmod(0o777)
    monkeypatch.setenv("QEMU_VMDK_SNAP_HOOKS", str(hooks_d))
    monkeypatch.setenv("PATH", "/nowhere")
    checks = {check.subject: check for check in check_host(lab.uri, os.environ)}
    assert checks["drop-ins"].verdict == "bad"
    assert "may be written by others" in checks["drop-ins"].text
    assert checks["qemu-img"].verdict == "note"
    assert main(["doctor", "-c", lab.uri]) == 1
    assert "[bad ] drop-ins" in capsys.readouterr().out.replace("[ bad]", "[bad ]")


def test_a_connection_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    checks = {check.subject: check for check in check_host("qemu+unix:///system?socket=/nowhere")}
    assert checks["connection"].verdict == "bad"
    assert "/nowhere" in checks["connection"].text


def test_removal_needs_a_domain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--remove"]) == 64
    assert "need a domain" in capsys.readouterr().err
