"""The modules of the collection, each on a real domain of a private libvirtd."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qemu_vmdk_snap.domain import create_snapshot, list_snapshots
from qemu_vmdk_snap.domain.attach.run import attach
from qemu_vmdk_snap.domain.served.commands import start_servers, stop_servers
from tests.domain.fleet.playbooks import Ansible
from tests.domain.lab import Lab, contents, xml_of

pytestmark = [pytest.mark.needs("libvirtd", "ansible-playbook"), pytest.mark.timeout(300)]
PROGRAM = str(Path(sys.executable).parent / "qemu-vmdk-snap")


def task(module: str, **parameters: object) -> dict[str, Any]:
    return {f"qemu_vmdk_snap.vmdk.{module}": {"executable": PROGRAM, **parameters}}


def names(result: dict[str, Any]) -> list[str]:
    return [one["name"] for one in result["snapshot_results"]["snapshots"]]


def test_each_state_changes_once(daemon_lab: Lab, ansible: Ansible) -> None:
    """The second run changes nothing. And what check mode announces is what the run does."""
    lab = daemon_lab
    name = lab.define(lab.disk("a")).name()
    about = {"connect": lab.uri, "name": name}

    def snapshot(**parameters: object) -> dict[str, Any]:
        return task("vmdk_snapshot", **about, **parameters)

    states: list[dict[str, Any]] = [
        {"snapshot_name": "s1", "description": "first"},
        {"snapshot_name": "s2", "quiesce": "auto"},
        {"snapshot_name": "s1", "new_description": "the first"},
        {"snapshot_name": "s1", "new_snapshot_name": "one"},
        {"snapshot_name": "one", "state": "revert"},
        {"snapshot_name": "one", "state": "absent", "remove_children": False},
        {"state": "remove_all"},
    ]
    tasks = []
    for state in states:
        tasks += [{**snapshot(**state), "check_mode": True}, *[snapshot(**state)] * 2]
    results = ansible.play(*tasks)
    for at, state in enumerate(states):
        announced, first, second = results[3 * at : 3 * at + 3]
        assert not any(one["failed"] for one in (announced, first, second)), (state, announced, first)
        assert [one["changed"] for one in (announced, first, second)] == [True, True, False], state
        assert announced["diff"] == first["diff"], state
    assert names(results[1]) == ["s1"]
    assert results[1]["snapshot_results"]["current_snapshot"]["description"] == "first"
    assert names(results[10]) == ["one", "s2"]
    assert results[10]["diff"]["after"] == {"snapshots": ["one", "s2"], "current": "s2"}
    assert names(results[16]) == ["s2"]
    assert results[19]["snapshot_results"] == {"current_snapshot": {}, "snapshots": []}
    assert list_snapshots(lab.conn, name) == []


def test_check_mode_writes_nothing(daemon_lab: Lab, ansible: Ansible) -> None:
    lab = daemon_lab
    domain = lab.define(lab.disk("a"))
    create_snapshot(lab.conn, domain.name(), "s1")
    create_snapshot(lab.conn, domain.name(), "s2")
    about = {"connect": lab.uri, "name": domain.name()}
    before = (contents(lab.folder), xml_of(domain), [one.getXMLDesc(0) for one in domain.listAllSnapshots()])
    results = ansible.play(
        task("vmdk_snapshot", **about, snapshot_name="s3"),
        task("vmdk_snapshot", **about, snapshot_name="s1", new_snapshot_name="other", new_description="d"),
        task("vmdk_snapshot", **about, snapshot_name="s1", state="reverted"),
        task("vmdk_snapshot", **about, snapshot_name="s1", state="absent"),
        task("vmdk_snapshot", **about, state="remove_all"),
        task("vmdk_snapshot_prune", **about, keep_last=1),
        flags=("--check", "--diff"),
    )
    assert [(one["failed"], one["changed"]) for one in results] == [(False, True)] * 6
    assert results[5]["deleted"] == ["s1"]
    after = (contents(lab.folder), xml_of(domain), [one.getXMLDesc(0) for one in domain.listAllSnapshots()])
    assert after == before


def test_failures_have_the_programs_code(daemon_lab: Lab, ansible: Ansible, tmp_path: Path) -> None:
    lab = daemon_lab
    name = lab.define(lab.disk("a")).name()
    about = {"connect": lab.uri, "name": name}
    results = ansible.play(
        task("vmdk_snapshot", connect=lab.uri, name="nobody", snapshot_name="s1"),
        task("vmdk_snapshot", **about, snapshot_name="none", state="reverted"),
        task("vmdk_snapshot", **about, snapshot_name="s1", memory_dump=True),
        task("vmdk_snapshot", **about, snapshot_name="a/b"),
        task("vmdk_snapshot_prune", **about),
        task("vmdk_image_info", path=str(tmp_path / "none.vmdk")),
        {"qemu_vmdk_snap.vmdk.vmdk_facts": {"executable": "no-such-program"}},
    )
    assert [one["failed"] for one in results] == [True] * 7
    found = [(one["code"], one.get("exit_status")) for one in results]
    assert found == [
        ("no-domain", 69),
        ("no-snapshot", 69),
        ("domain", 69),  # its disk is not served: never silently without the memory
        ("invalid-request", 64),
        ("invalid-request", 64),
        ("system", 74),
        ("not-installed", None),
    ]
    assert list_snapshots(lab.conn, name) == []


def test_a_playbook_for_vmware_runs(daemon_lab: Lab, ansible: Ansible) -> None:
    """Parameters that mean nothing here are accepted with one warning; ids, names and results are VMware's."""
    lab = daemon_lab
    name = lab.define(lab.disk("a")).name()
    login = {
        "connect": lab.uri,
        "hostname": "{{ vcenter_hostname }}",
        "username": "{{ vcenter_username }}",
        "password": "{{ vcenter_password }}",
        "datacenter": "dc",
        "folder": "/dc/vm/",
        "validate_certs": False,
        "name": name,
    }
    create, second, info, back, gone, everything = ansible.play(
        task("vmdk_snapshot", **login, state="present", snapshot_name="snap1", description="d", quiesce=True),
        task("vmdk_snapshot", **login, state="present", snapshot_name="snap2", memory_dump=False),
        task("vmdk_snapshot_info", **login),
        task("vmdk_snapshot", **login, state="revert", snapshot_id=1),
        task("vmdk_snapshot", **login, state="absent", snapshot_name="snap1", remove_children=True),
        task("vmdk_snapshot", **login, state="remove_all"),
        vcenter_hostname="vc",
        vcenter_username="u",
        vcenter_password="geheim",
    )
    assert [one["failed"] for one in (create, second, info, back, gone, everything)] == [False] * 6
    (warning,) = create["warnings"]
    assert "are ignored: datacenter, folder, hostname, password, username, validate_certs" in warning
    assert create["snapshot_results"]["current_snapshot"]["name"] == "snap1"
    rows = info["guest_snapshots"]["snapshots"]
    assert [(row["id"], row["name"], row["description"]) for row in rows] == [(1, "snap1", "d"), (2, "snap2", "")]
    assert back["snapshot_results"]["current_snapshot"]["name"] == "snap1"
    assert gone["changed"]
    assert (everything["changed"], everything["snapshot_results"]["snapshots"]) == (False, [])


def test_info_doctor_and_facts_of_a_host_with_a_broken_domain(daemon_lab: Lab, ansible: Ansible) -> None:
    lab = daemon_lab
    good, broken = lab.define(lab.disk("a")).name(), lab.define(lab.disk("b")).name()
    create_snapshot(lab.conn, good, "s1")
    create_snapshot(lab.conn, broken, "s1")
    (lab.folder / "b.vmdk").unlink()
    top = str(lab.folder / "a-000001.vmdk")
    listed, facts, sound, unsound, image, cut, verified = ansible.play(
        task("vmdk_snapshot_info", connect=lab.uri),
        task("vmdk_facts", connect=lab.uri),
        task("vmdk_doctor", connect=lab.uri, name=good),
        task("vmdk_doctor", connect=lab.uri, all=True),
        task("vmdk_image_info", path=top, backing_chain=True, check=True),
        task("vmdk_image_info", path=str(lab.folder / "b-000001.vmdk"), backing_chain=True),
        task("vmdk_verify", path=top, samples=1),
    )
    assert [one["name"] for one in listed["domains"][good]["snapshots"]] == ["s1"]
    assert facts["ansible_facts"]["qemu_vmdk_snap"]["domains"].keys() >= {good, broken}
    assert (sound["failed"], sound["good"]) == (False, True)
    assert (unsound["failed"], unsound["code"], unsound["exit_status"]) == (True, "bad-findings", 1)
    assert any(line.startswith(f"{broken}: ") for line in unsound["bad"])
    assert [one["filename"] for one in image["images"]] == [top, str(lab.folder / "a.vmdk")]
    assert image["check"]["status"] == "good"
    assert (cut["failed"], cut["code"]) == (True, "missing-file")
    assert (verified["failed"], verified["identical"], verified["changed"]) == (False, True, False)


@pytest.mark.needs("qemu-system-x86_64")
def test_memory_dump_saves_the_memory_of_a_guest_with_served_disks(daemon_lab: Lab, ansible: Ansible) -> None:
    lab = daemon_lab
    domain = lab.define(lab.disk("a"))
    attach(lab.conn, domain.name(), [])
    start_servers(lab.conn, domain.name())
    try:
        domain.create()
        about = {"connect": lab.uri, "name": domain.name(), "snapshot_name": "m1"}
        file = lab.folder / "m1.memory"
        dump = task("vmdk_snapshot", **about, memory_dump=True, memory_file=str(file))
        announced, made, again = ansible.play({**dump, "check_mode": True}, dump, dump)
        assert [one["failed"] for one in (announced, made, again)] == [False] * 3, (announced, made, again)
        assert [one["changed"] for one in (announced, made, again)] == [True, True, False]
        assert file.stat().st_size > 1 << 16
        (row,) = again["snapshot_results"]["snapshots"]
        assert (row["name"], row["state"]) == ("m1", "running")
        assert f"<memory snapshot='external' file='{file}'/>" in domain.snapshotLookupByName("m1").getXMLDesc()
        assert domain.isActive()
    finally:
        if domain.isActive():
            domain.destroy()
        stop_servers(lab.conn, domain.name())
