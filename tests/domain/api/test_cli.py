"""The commands, as a user types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.cli.snapshot.create import DiskSpec, parse_diskspec
from qemu_vmdk_snap.domain.create import run as snapshot
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.errors import InvalidRequest
from tests.domain.lab import Lab, contents

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


@pytest.fixture
def domain(lab: Lab) -> str:
    name: str = lab.define(lab.disk("a"), lab.disk("b")).name()
    return name


def test_create_says_what_it_did(lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["snapshot", "create", "-c", lab.uri, domain, "s1", "--disk-only", "--diskspec", "vdb,snapshot=no"]) == 0
    )
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "Domain snapshot s1 created",
        f"  vda: {lab.folder}/a-000001.vmdk, backed by {lab.folder}/a.vmdk (chain of 2)",
        "  vdb: not in the snapshot: was left out",
    ]
    assert printed.err == ""


def test_create_as_json(lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["snapshot", "create", "--connect", lab.uri, domain, "--name", "s1", "--output=json"]
    assert main([*words, "--diskspec", f"vda,file={lab.folder}/t,,op.vmdk", "--diskspec", f"{lab.folder}/b.vmdk"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("creation-time") > 0
    assert answer == {
        "domain": domain,
        "snapshot": "s1",
        "parent": None,
        "disks": [
            {
                "target": target,
                "frozen": f"{lab.folder}/{frozen}",
                "overlay": f"{lab.folder}/{overlay}",
                "chain": [f"{lab.folder}/{overlay}", f"{lab.folder}/{frozen}"],
            }
            for target, frozen, overlay in (("vda", "a.vmdk", "t,op.vmdk"), ("vdb", "b.vmdk", "b-000001.vmdk"))
        ],
        "pause": None,
        "nvram": None,
        "live-xml-stale": False,
        "notes": [],
        "skipped": [],
    }


def test_overlays_can_be_named_by_uuids(lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-c", lab.uri, domain]
    assert main(["snapshot", "create", *words, "s1", "--naming", "uuid"]) == 0
    found = re.findall(rf"  vd([ab]): {lab.folder}/([0-9a-f-]{{36}})\.vmdk, backed by", capsys.readouterr().out)
    assert [disk for disk, _ in found] == ["a", "b"]
    assert found[0][1] != found[1][1]
    tops = [lab.folder / f"{name}.vmdk" for _, name in found]
    assert all(top.exists() for top in tops)
    assert main(["snapshot", "create", *words, "s2", "--naming=number"]) == 0
    assert (lab.folder / f"{found[0][1]}-000001.vmdk").exists()
    assert main(["snapshot", "delete", *words, "s2"]) == 0
    assert main(["snapshot", "revert", *words, "s1"]) == 0
    assert main(["snapshot", "delete", *words, "s1"]) == 0


def test_a_name_is_made_from_the_clock(lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["snapshot", "create", "-c", lab.uri, domain]) == 0
    first, second = re.findall(r"Domain snapshot (\d{10}) created", capsys.readouterr().out)
    assert int(second) > int(first)


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["create", "nobody"], 69, "domain nobody: there is no domain of that name"),
        (["create", "{d}", "s1", "--name", "s2"], 64, "the snapshot has two names: 's1' and 's2': give one"),
        (["create", "{d}", "--name", ""], 64, "snapshot name '': must not be empty"),
        (["create", "{d}", "--diskspec", "vdz"], 69, "domain {d}: has no disk 'vdz'"),
        (["info", "{d}"], 64, "domain {d}: needs either a snapshot or --current"),
        (["info", "{d}", "--current"], 69, "domain {d}: has no current snapshot"),
        (["info", "{d}", "s9"], 69, "domain {d}: has no snapshot 's9'"),
        (["list", "nobody"], 69, "domain nobody: there is no domain of that name"),
    ],
)
def test_what_cannot_be_is_one_line_and_a_status(
    lab: Lab, domain: str, words: list[str], status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(lab.folder)
    assert main(["snapshot", *(word.format(d=domain) for word in words), "-c", lab.uri]) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"qemu-vmdk-snap: {line.format(d=domain)}\n")
    assert contents(lab.folder) == before


def test_list_filters_and_shapes(lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b1", "A2", "c3"):
        create_snapshot(lab.conn, domain, name)
    lab.conn.lookupByName(domain).snapshotLookupByName("A2")

    def listed(*options: str) -> list[str]:
        assert main(["snapshot", "list", "-c", lab.uri, domain, *options]) == 0
        return capsys.readouterr().out.splitlines()

    assert listed("--name") == ["b1", "A2", "c3"]
    assert listed("--name", "--roots") == ["b1"]
    assert listed("--name", "--leaves") == ["c3"]
    assert listed("--name", "--current") == []
    assert listed("--tree") == ["b1", "  |", "  +- A2", "      |", "      +- c3", ""]
    header, _rule, *rows = listed("--parent")
    assert header.split() == ["Name", "Creation", "Time", "State", "Parent"]
    assert [(row.split()[0], row.split()[4:]) for row in rows] == [
        ("b1", ["shutoff"]),
        ("A2", ["shutoff", "b1"]),
        ("c3", ["shutoff", "A2"]),
    ]
    (shown,) = [item for item in json.loads("\n".join(listed("--output=json"))) if item["current"]]
    assert (shown["name"], shown["parent"], shown["disks"][0]["chain-depth"]) == ("c3", "A2", 3)


def test_info_tells_of_each_disk(lab: Lab, domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    create_snapshot(lab.conn, domain, "s1", "two\nlines")
    (lab.folder / "b.vmdk").unlink()
    assert main(["snapshot", "info", "-c", lab.uri, domain, "--current"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Description: two lines" in lines
    assert "Current:     yes" in lines
    assert re.fullmatch(rf"Disk vda: frozen {lab.folder}/a.vmdk \([0-9.]+ KiB, chain of 1\)", lines[10])
    assert lines[12] == f"Disk vdb: frozen {lab.folder}/b.vmdk (missing)"
    assert lines[14] == f"  problem: {lab.folder}/b.vmdk: No such file or directory"


def test_an_interrupted_snapshot_is_reported_and_settled_by_a_command_that_writes(
    lab: Lab, domain: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(snapshot, "register", die)
        dying.setattr(snapshot, "_undo", lambda *_: None)
        assert main(["snapshot", "create", "-c", lab.uri, domain, "s1"]) == 130
    capsys.readouterr()
    words = ["-c", lab.uri, domain]
    here = f"-c '{lab.uri}' --domain {domain}`"
    pending = (
        f"qemu-vmdk-snap: warning: domain {domain}: the create of snapshot 's1' is not finished: "
        f"`recover {here} finishes or undoes it, `recover --abandon {here} gives it up\n"
    )
    before = contents(lab.folder)
    for _ in range(2):
        assert main(["snapshot", "list", *words, "--name"]) == 0
        assert capsys.readouterr() == ("", pending)
    assert contents(lab.folder) == before
    assert main(["snapshot", "create", *words, "s2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"qemu-vmdk-snap: warning: domain {domain}: the interrupted snapshot 's1' was finished\n"
    assert main(["snapshot", "list", *words, "--name"]) == 0
    assert capsys.readouterr() == ("s1\ns2\n", "")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("vda", DiskSpec("vda", True, None)),
        ("vda,snapshot=no", DiskSpec("vda", False, None)),
        ("/a,,b.vmdk,snapshot=external,driver=vmdk,file=/x,,y", DiskSpec("/a,b.vmdk", True, Path("/x,y"))),
    ],
)
def test_diskspec_is_read_as_virsh_reads_it(text: str, spec: DiskSpec) -> None:
    assert parse_diskspec(text) == spec


@pytest.mark.parametrize(
    "text", ["", ",file=/x", "vda,snapshot=internal", "vda,driver=qcow2", "vda,file=", "vda,snapshot=no,file=/x"]
)
def test_a_diskspec_that_vmdk_cannot_do_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="diskspec"):
        parse_diskspec(text)
