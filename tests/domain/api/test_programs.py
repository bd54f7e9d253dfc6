"""What programs get: plans without a change, all domains at once, errors with a code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qemu_vmdk_snap.cli.commands import COMMANDS
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.errors import NoSnapshot
from tests.domain.lab import Lab, contents, xml_of
from tests.support.schemas import check

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


@pytest.fixture
def domain(lab: Lab) -> str:
    name: str = lab.define(lab.disk("a"), lab.disk("b")).name()
    return name


def run(capsys: pytest.CaptureFixture[str], lab: Lab, *words: str) -> tuple[int, Any]:
    capsys.readouterr()
    status = main([*words, "-c", lab.uri, "--output=json"])
    out = capsys.readouterr().out
    failed = isinstance(json.loads(out), dict) and "error" in json.loads(out)
    return status, check("error" if failed else " ".join(words[: 2 if words[0] in COMMANDS else 1]), out)


def test_the_answers_are_as_documented(lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("s1", "s2"):
        create_snapshot(lab.conn, domain, name)
    for words in (
        ["snapshot", "list", domain],
        ["snapshot", "list", "--all"],
        ["snapshot", "info", domain, "s2"],
        ["snapshot", "current", domain],
        ["snapshot", "describe", domain, "s1", "text"],
        ["snapshot", "rename", domain, "s1", "s3"],
        ["snapshot", "adopt", domain],
        ["snapshot", "adopt", domain, "--dry-run"],
        ["recover", "--domains"],
        ["doctor"],
        ["doctor", domain],
        ["doctor", "--all"],
    ):
        assert run(capsys, lab, *words)[0] == 0, words


def _sizeless(answer: object) -> str:
    return re.sub(r"\(\d+ bytes|\"bytes\": \d+", "(", json.dumps(answer))


@pytest.mark.parametrize("snapshot", ["create", "revert", "discard", "delete", "prune"])
def test_a_dry_run_plans_what_the_run_does(
    snapshot: str, lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("s1", "s2"):
        create_snapshot(lab.conn, domain, name)
    words = {
        "create": ["snapshot", "create", domain, "s3"],
        "revert": ["snapshot", "revert", domain, "s1"],
        "discard": ["snapshot", "revert", domain, "s1", "--discard"],
        "delete": ["snapshot", "delete", domain, "s1", "--children"],
        "prune": ["snapshot", "prune", domain, "--keep-last=1"],
    }[snapshot]
    before = contents(lab.folder), xml_of(lab.conn.lookupByName(domain))
    status, plan = run(capsys, lab, *words, "--dry-run")
    assert (status, plan.pop("dry-run")) == (0, True)
    assert (contents(lab.folder), xml_of(lab.conn.lookupByName(domain))) == before
    assert main([*words, "-c", lab.uri, "--dry-run"]) == 0
    assert "would be" in capsys.readouterr().out
    status, done = run(capsys, lab, *words)
    assert status == 0
    assert done.pop("dry-run", False) is False
    for answer in (plan, done):
        answer.pop("creation-time", None)
    assert plan.pop("already", False) is False  # said of a plan alone
    # How many bytes a later delete copies is an estimate, as the earlier ones have not happened.
    assert _sizeless(plan) == _sizeless(done)
    assert (contents(lab.folder), xml_of(lab.conn.lookupByName(domain))) != before


def test_there_is_no_plan_beside_an_unfinished_operation(
    lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = IntentStore.of(lab.conn).path(lab.conn.lookupByName(domain).UUIDString())
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("{}")
    try:
        status, answer = run(capsys, lab, "snapshot", "create", domain, "s1", "--dry-run")
    finally:
        record.unlink()
    assert status == 69
    assert "is unfinished" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (["snapshot", "create", "{d}", "s1"], 69, "snapshot-exists"),
        (["snapshot", "rename", "{d}", "s2", "s1"], 69, "snapshot-exists"),
        (["snapshot", "revert", "{d}", "s9"], 69, "no-snapshot"),
        (["snapshot", "delete", "{d}", "s9"], 69, "no-snapshot"),
        (["snapshot", "info", "{d}", "s9"], 69, "no-snapshot"),
        (["snapshot", "current", "{d}", "s9"], 69, "no-snapshot"),
        (["snapshot", "describe", "{d}", "s9", "text"], 69, "no-snapshot"),
        (["snapshot", "list", "nobody"], 69, "no-domain"),
        (["doctor", "nobody"], 69, "no-domain"),
        (["snapshot", "create", "{d}", "--name", ""], 64, "invalid-request"),
        (["snapshot", "list"], 64, "invalid-request"),
        (["doctor", "{d}", "--all"], 64, "invalid-request"),
    ],
)
def test_errors_have_a_code(
    lab: Lab, domain: str, words: list[str], status: int, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("s1", "s2"):
        create_snapshot(lab.conn, domain, name)
    found, answer = run(capsys, lab, *(word.format(d=domain) for word in words))
    error = answer["error"]
    assert (found, error["exit-status"], error["code"]) == (status, status, code)
    if code in ("no-snapshot", "snapshot-exists"):
        assert (error["domain"], error["snapshot"]) == (domain, "s9" if code == "no-snapshot" else "s1")


def test_another_command_at_work_is_locked(lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    with IntentStore.of(lab.conn).locked(lab.conn.lookupByName(domain).UUIDString(), domain):
        status, answer = run(capsys, lab, "snapshot", "create", domain, "s1")
    assert (status, answer["error"]["code"]) == (69, "locked")


def test_all_domains_and_one_that_is_broken(
    lab: Lab, domain: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qemu_vmdk_snap.domain import registry
    from qemu_vmdk_snap.domain.doctor import domain as doctor

    create_snapshot(lab.conn, domain, "s1")
    other: str = lab.define(lab.disk("c")).name()
    create_snapshot(lab.conn, other, "s1")
    looked_for: list[str] = []

    def find(conn: object, name: str) -> libvirt.virDomain:
        looked_for.append(name)
        if name == domain:
            raise NoSnapshot(name, "is gone meanwhile")
        found: libvirt.virDomain = lab.conn.lookupByName(name)
        return found

    monkeypatch.setattr(registry, "find_domain", find)
    monkeypatch.setattr(doctor, "find_domain", find)
    status, answer = run(capsys, lab, "snapshot", "list", "--all")
    rows = {one["domain"]: one for one in answer}
    assert (status, rows[domain]["error"]["code"]) == (69, "no-snapshot")
    assert [one["name"] for one in rows[other]["snapshots"]] == ["s1"]
    status, answer = run(capsys, lab, "doctor", "--all")
    rows = {one["domain"]: one for one in answer["domains"]}
    assert (status, answer["good"], rows[domain]["good"], rows[other]["good"]) == (1, False, False, True)
    assert rows[domain]["error"]["message"] == f"domain {domain}: is gone meanwhile"
    assert rows[other]["checks"]
    assert main(["snapshot", "list", "--all", "--name", "-c", lab.uri]) == 69
    printed = capsys.readouterr()
    assert f"Domain {other}:\ns1\n" in printed.out
    assert printed.err == f"qemu-vmdk-snap: domain {domain}: is gone meanwhile\n"
    assert looked_for.count(other) == 3


def test_one_plan_of_a_broken_chain_fails_as_the_run_does(
    lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    create_snapshot(lab.conn, domain, "s1")
    Path(lab.folder / "a.vmdk").rename(lab.folder / "gone.vmdk")
    status, answer = run(capsys, lab, "snapshot", "create", domain, "s2", "--dry-run")
    assert (status, answer["error"]["code"]) == (66, "missing-file")
    assert answer["error"]["path"].startswith(str(lab.folder))
