"""An unfinished operation, or a record that cannot be followed, leaves no domain that no command can deal with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create import run as create_run
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete import run as delete_run
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.registry import list_snapshots
from tests.domain.lab import Lab, contents, xml_of

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")

READING = {
    "list": ["snapshot", "list"],
    "tree": ["snapshot", "list", "--tree"],
    "info": ["snapshot", "info", "--current"],
    "current": ["snapshot", "current"],
    "dry-run": ["snapshot", "prune", "--dry-run", "--keep-last=9"],
}
WRITING = {
    "create": ["snapshot", "create"],
    "revert": ["snapshot", "revert", "s1"],
    "delete": ["snapshot", "delete", "s1"],
    "delete --metadata": ["snapshot", "delete", "s1", "--metadata"],
    "prune": ["snapshot", "prune", "--keep-last=1"],
    "rename": ["snapshot", "rename", "s1", "other"],
    "describe": ["snapshot", "describe", "s1", "text"],
    "current": ["snapshot", "current", "s1"],
    "recover": ["recover"],
}


class Patient:
    """A domain with the snapshots s1 and s2, and the record of its unfinished operation, or what stands for one."""

    def __init__(self, lab: Lab, capsys: pytest.CaptureFixture[str], disks: str = "ab") -> None:
        self.lab, self.capsys = lab, capsys
        self.domain = lab.define(*map(lab.disk, disks))
        self.name = self.domain.name()
        create_snapshot(lab.conn, self.name, "s1")
        create_snapshot(lab.conn, self.name, "s2")
        self.store = IntentStore.of(lab.conn)
        self.record = self.store.path(self.domain.UUIDString())

    def run(self, words: list[str]) -> tuple[int, str, str]:
        """Run a command on the domain; return its status, its answer, and its lines on standard error."""
        at = 1 if words[0] == "recover" else 2
        status = main([*words[:at], "-c", self.lab.uri, self.name, *words[at:]])
        printed = self.capsys.readouterr()
        return status, printed.out, printed.err

    def state(self) -> tuple[str, dict[str, str], list[str]]:
        names = sorted(one.getName() for one in self.domain.listAllSnapshots())
        return xml_of(self.domain), contents(self.lab.folder), names


@pytest.fixture
def patient(lab: Lab, capsys: pytest.CaptureFixture[str]) -> Iterator[Patient]:
    patient = Patient(lab, capsys)
    yield patient
    if patient.record.is_dir() and not patient.record.is_symlink():
        patient.record.rmdir()
    else:
        patient.record.unlink(missing_ok=True)


def damaged(record: Path) -> None:
    record.write_text('{"version": 1, "uuid": ')


def future(record: Path) -> None:
    record.write_text(json.dumps({"version": 99, "what": "nobody knows"}))


def writable_by_others(record: Path) -> None:
    record.write_text("{}")
    record.chmod(0o666)


def of_another_user(record: Path) -> None:
    record.write_text("{}")
    os.chown(record, 12345, 12345)


def link(record: Path) -> None:
    record.symlink_to("/etc/hostname")


def dangling(record: Path) -> None:
    record.symlink_to("/nowhere")


def pipe(record: Path) -> None:
    os.mkfifo(record)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "damaged": (damaged, "is damaged"),
    "future": (future, "has version 99, not 1: another version wrote it"),
    "writable": (writable_by_others, "is another user's, or may be written by others"),
    "link": (link, "cannot be read: Too many levels of symbolic links"),
    "dangling": (dangling, "cannot be read: Too many levels of symbolic links"),
    "pipe": (pipe, "is another user's, or may be written by others"),
}
if os.geteuid() == 0:
    BAD["foreign"] = (of_another_user, "is another user's, or may be written by others")


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_holds_up_its_own_writers_alone(patient: Patient, kind: str) -> None:
    spoil, text = BAD[kind]
    spoil(patient.record)
    other = patient.lab.define(patient.lab.disk("c"))
    before = patient.state()
    for words in READING.values():
        status, _, errors = patient.run(words)
        assert status == 0
        (line,) = errors.splitlines()
        assert line.startswith(f"qemu-vmdk-snap: warning: domain {patient.name}: the record {patient.record} ")
        assert text in line
        assert line.endswith(f"`recover --abandon -c '{patient.lab.uri}' --domain {patient.name}` gives it up")
    assert {check.subject for check in check_domain(patient.lab.conn, patient.name) if check.verdict == "bad"} == {
        "snapshots"
    }
    for words in WRITING.values():
        status, answer, errors = patient.run(words)
        assert (status, answer) == (69, "")
        (line,) = errors.splitlines()
        assert str(patient.record) in line
        assert text in line
        assert "`recover --abandon -c " in line
    assert patient.state() == before
    create_snapshot(patient.lab.conn, other.name(), "s1")  # another domain's go on
    status, answer, _ = patient.run(["recover", "--abandon"])
    assert status == 0
    assert answer.startswith(f"domain {patient.name}: abandoned the record {patient.record} (the record ")
    assert patient.run(WRITING["create"])[0] == 0


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720])
def test_a_folder_of_records_that_others_may_write_is_refused(patient: Patient, mode: int) -> None:
    folder = patient.store.folder
    damaged(patient.record)
    before = patient.state()
    folder.chmod(mode)
    try:
        for words in READING.values():
            status, _, errors = patient.run(words)
            assert status == 0
            assert errors.count("\n") == 1
            assert f"{folder}: may be written by others" in errors
        for words in WRITING.values():
            status, answer, errors = patient.run(words)
            assert (status, answer) == (64, "")
            assert errors.count("\n") == 1
            assert f"{folder}: may be written by others, who could plant records there" in errors
        bad = [check for check in check_domain(patient.lab.conn, patient.name) if check.verdict == "bad"]
        assert [check.subject for check in bad] == ["state"]
    finally:
        folder.chmod(0o700)
    assert patient.state() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_a_folder_of_records_of_another_user_is_refused(patient: Patient) -> None:
    folder = patient.store.folder
    os.chown(folder, 12345, 12345)
    try:
        status, _, errors = patient.run(WRITING["create"])
        assert (status, errors.count("\n")) == (64, 1)
        assert f"{folder}: belongs to another user" in errors
    finally:
        os.chown(folder, 0, 0)


def interrupt_create(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as dying:
        dying.setattr(create_run, "register", dies)
        dying.setattr(create_run, "_undo", lambda *_: None)
        assert patient.run(["snapshot", "create", "--name", "s3"])[0] == 130


def interrupt_delete(patient: Patient, monkeypatch: pytest.MonkeyPatch, name: str = "s1") -> None:
    with monkeypatch.context() as dying:
        dying.setattr(delete_run, "_change_xml", dies)
        assert patient.run(["snapshot", "delete", name])[0] == 130
    assert patient.record.exists()


def dies(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("interrupt", [interrupt_create, interrupt_delete])
def test_reading_commands_report_what_is_unfinished_and_settle_nothing(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[Patient, pytest.MonkeyPatch], None]
) -> None:
    interrupt(patient, monkeypatch)
    before, record = patient.state(), patient.record.read_bytes()
    what = "create of snapshot 's3'" if interrupt is interrupt_create else "delete of snapshot 's1'"
    for words in READING.values():
        status, _, errors = patient.run(words)
        assert status == 0
        (line,) = errors.splitlines()
        assert line.startswith(f"qemu-vmdk-snap: warning: domain {patient.name}: the {what} is not finished: `recover ")
        assert "`recover --abandon -c " in line
    assert (patient.state(), patient.record.read_bytes()) == (before, record)


@pytest.mark.parametrize("name", ["s1", "s2"])
@pytest.mark.parametrize("step", ["_merge_down", "_move", "_define", "_change_xml"])
def test_reading_commands_work_wherever_a_delete_was_interrupted(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, step: str, name: str
) -> None:
    for disk in "ab":
        with open_chain(patient.lab.folder / f"{disk}-000002.vmdk", writable=True) as chain:
            chain.write_at(1 << 16, b"x" * 65536)
    real = getattr(delete_run, step)

    def works_and_dies(*words: object) -> None:
        real(*words)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(delete_run, step, works_and_dies)
        dying.setattr(IntentStore, "remove", lambda *_: None)  # a process that was killed takes nothing back
        assert patient.run(["snapshot", "delete", name])[0] == 130
    assert patient.record.exists()
    for words in READING.values():
        status, _, errors = patient.run(words)
        assert (status, errors.count("\n")) == (0, 1), errors
    assert [*check_domain(patient.lab.conn, patient.name)]
    assert patient.run(["recover"])[0] == 0
    assert [check.text for check in check_domain(patient.lab.conn, patient.name) if check.verdict == "bad"] == []


@pytest.mark.parametrize("words", WRITING.values(), ids=WRITING)
@pytest.mark.parametrize("interrupt", [interrupt_create, interrupt_delete])
def test_a_writing_command_settles_first(
    patient: Patient,
    monkeypatch: pytest.MonkeyPatch,
    interrupt: Callable[[Patient, pytest.MonkeyPatch], None],
    words: list[str],
) -> None:
    interrupt(patient, monkeypatch)
    status, _, errors = patient.run(words)
    gone = (
        interrupt is interrupt_delete
        and words[0] == "snapshot"
        and words[1] in ("revert", "rename", "describe", "current")
    )
    assert status == (69 if gone else 0), errors
    assert not patient.record.exists()
    assert [check.text for check in check_domain(patient.lab.conn, patient.name) if check.verdict == "bad"] == []


def test_a_delete_that_is_run_again_says_that_it_succeeded(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_delete(patient, monkeypatch)
    status, answer, errors = patient.run(["snapshot", "delete", "s1"])
    assert status == 0
    assert errors == (
        f"qemu-vmdk-snap: warning: domain {patient.name}: the interrupted delete of snapshot 's1' was finished\n"
    )
    assert [info.name for info in list_snapshots(patient.lab.conn, patient.name)] == ["s2"]
    assert patient.run(["snapshot", "delete", "s1"])[0] == 69
    del answer


@pytest.mark.parametrize("step", ["_define", "_change_xml"])
def test_a_delete_of_the_current_one_that_is_run_again_deletes_no_other(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    words, real = ["snapshot", "delete", "--current"], getattr(delete_run, step)

    def works_and_dies(*words: object) -> None:
        real(*words)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(delete_run, step, works_and_dies)
        assert patient.run(words)[0] == 130
    assert patient.run(words)[0] == 0
    assert [info.name for info in list_snapshots(patient.lab.conn, patient.name)] == ["s1"]


def test_recover_settles_the_domain_that_is_named(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_create(patient, monkeypatch)
    other = Patient(patient.lab, patient.capsys, "cd")
    interrupt_delete(other, monkeypatch)
    assert main(["recover", "-c", patient.lab.uri, "--domain", patient.domain.UUIDString()]) == 0
    told = f"domain {patient.name}: finished the interrupted create of snapshot s3\n"
    assert patient.capsys.readouterr() == (told, "")
    assert other.record.exists()
    assert other.run(["recover"])[:2] == (0, f"domain {other.name}: finished the interrupted delete of snapshot s1\n")
    assert other.run(["recover"])[:2] == (0, "Nothing to recover.\n")


def test_abandon_shows_what_is_pending_and_changes_nothing_else(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_delete(patient, monkeypatch)
    before = patient.state()
    status, answer, errors = patient.run(["recover", "--abandon"])
    assert (status, errors) == (0, "")
    first, *files = answer.splitlines()
    assert first == f"domain {patient.name}: abandoned the delete of snapshot s1"
    for disk in "ab":
        for name in (f"{disk}.vmdk", f"{disk}-000001.vmdk"):
            assert f"  left as it is: {patient.lab.folder / name}" in files
    assert patient.state() == before
    assert not patient.record.exists()
    assert patient.run(["recover", "--abandon", "--output=json"])[:2] == (0, "[]\n")


def test_abandon_leaves_a_command_at_work_alone(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_create(patient, monkeypatch)
    with patient.store.locked(patient.domain.UUIDString(), patient.name):
        status, _, errors = patient.run(["recover", "--abandon"])
        assert status == 69
        assert "another command is changing its snapshots" in errors
        assert patient.run(READING["list"])[2].endswith("another command is changing its snapshots now\n")
    assert patient.record.exists()


def test_the_record_of_a_domain_that_is_gone_can_be_given_up(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import libvirt

    interrupt_create(patient, monkeypatch)
    uuid = patient.domain.UUIDString()
    patient.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
    assert main(["recover", "-c", patient.lab.uri]) == 69
    line = capsys.readouterr().err
    assert f"`recover --abandon -c '{patient.lab.uri}' --domain {uuid}` gives it up" in line
    assert main(["recover", "--abandon", "-c", patient.lab.uri, "--domain", uuid]) == 0
    assert f"domain {uuid}: abandoned the create of snapshot s3" in capsys.readouterr().out
    assert main(["recover", "-c", patient.lab.uri]) == 0


def test_what_cannot_be_settled_is_one_line_with_both_ways_out(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_delete(patient, monkeypatch)
    shutil.move(patient.lab.folder / "a-000001.vmdk", patient.lab.folder / "aside")
    (patient.lab.folder / "a-000001.vmdk").write_text("something else")
    for words in WRITING.values():
        status, _, errors = patient.run(words)
        assert status != 0
        (line,) = errors.splitlines()
        assert "; the delete of snapshot 's1' is not finished: `recover -c " in line
        assert line.endswith(f"`recover --abandon -c '{patient.lab.uri}' --domain {patient.name}` gives it up")
    assert patient.run(READING["list"])[0] == 0


def test_a_record_whose_parts_are_of_no_use_is_one_line(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_delete(patient, monkeypatch)
    record = json.loads(patient.record.read_text())
    record["work"] = [{"target": 7, "colour": "blue"}]
    patient.record.write_text(json.dumps(record))
    status, _, errors = patient.run(["recover"])
    assert (status, errors.count("\n")) == (69, 1)
    assert f"its record {patient.record} is damaged (" in errors
