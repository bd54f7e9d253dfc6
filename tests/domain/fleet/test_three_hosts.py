"""Playbooks over ssh on three hosts, each with a libvirtd of its own: in parallel, and with each kind of failure.

The first host is reached as root, the second and the third as a user who becomes root, the third without pipelining.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_vmdk_snap.domain import connection, create_snapshot, list_snapshots
from qemu_vmdk_snap.domain.journal.record import STATE_VARIABLE, IntentStore
from tests.domain.fleet.bed import NOBODYS_ADDRESS, PROGRAM, Host, Switch, bed
from tests.domain.fleet.playbooks import Ansible, chosen_core
from tests.domain.lab import Lab
from tests.domain.libvirtd import obstacle

pytestmark = [
    pytest.mark.needs("libvirtd", "virsh", "ansible-playbook", "ssh", "sshd", "ssh-keygen", "ip", "sudo"),
    pytest.mark.timeout(900),
]
MODULE = "qemu_vmdk_snap.vmdk.vmdk_snapshot"
STATE = "var/lib/qemu-vmdk-snap"
HOOKS = "etc/qemu-vmdk-snap/hooks.d"


@pytest.fixture(scope="module")
def network(scratch_root: Path) -> Iterator[tuple[Switch, list[Host]]]:
    if os.geteuid() != 0 or (reason := obstacle()):
        pytest.skip("hosts in namespaces need root" if os.geteuid() else str(reason))
    (scratch_root / "bed").mkdir()
    with bed(scratch_root / "bed", "h1", "h2", "h3") as made:
        yield made


@pytest.fixture
def hosts(network: tuple[Switch, list[Host]]) -> list[Host]:
    return network[1]


@pytest.fixture
def controller(network: tuple[Switch, list[Host]], scratch: Path) -> Callable[[str, str], Ansible]:
    def make(name: str, core: str = "current") -> Ansible:
        return Ansible(scratch / name, chosen_core(core), network[0].inside())

    return make


@pytest.fixture
def labs(hosts: list[Host], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Lab]]:
    """Two domains on each host, `NAMEa` and `NAMEb`."""
    with contextlib.ExitStack() as opened:
        found = {}
        for one in hosts:
            lab = Lab(opened.enter_context(connection(one.uri)), one.images, one.uri)
            opened.callback(shutil.rmtree, one.images)
            opened.callback(lab.close)
            one.images.mkdir(exist_ok=True)
            monkeypatch.setenv(STATE_VARIABLE, str(one.root(STATE)))  # what is created from here is recorded there
            for letter in "ab":
                define(lab, f"{one.name}{letter}", lab.disk(letter))
                create_snapshot(lab.conn, f"{one.name}{letter}", "s0")
            found[one.name] = lab
        yield found


def define(lab: Lab, name: str, disk: Path) -> None:
    lab.adopt(name)
    lab.conn.defineXML(
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><os><type arch='x86_64'>hvm</type></os>"
        "<devices><disk type='file' device='disk'><driver name='qemu' type='vmdk'/>"
        f"<source file='{disk}'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
    )


class Played:
    """One run of the playbook: its status, what it said, and the results of each host."""

    def __init__(self, status: int, said: str, results: dict[str, Any]) -> None:
        self.status, self.said, self.results = status, said, results

    def recap(self, host: str) -> dict[str, int]:
        """Return the counts of Ansible's last line about the host."""
        lines = self.said[self.said.index("PLAY RECAP") :].splitlines()
        (line,) = [line for line in lines if line.split()[:1] == [host]]
        return {name: int(count) for name, _, count in (word.partition("=") for word in line.split()[2:])}


def inventory(hosts: list[Host]) -> dict[str, dict[str, object]]:
    ways = {"h1": (False, True), "h2": (True, True), "h3": (True, False)}
    return {one.name: one.variables(*ways[one.name]) for one in hosts}


def play(ansible: Ansible, inventory: dict[str, dict[str, object]], letters: str = "a") -> Played:
    """Snapshot, prune and revert these domains of each host."""
    source = ansible.folder / "hosts.json"
    source.write_text(json.dumps({"all": {"hosts": inventory}}))
    results = ansible.folder / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    about = {"name": "{{ inventory_hostname }}{{ item }}"}
    loop = {"loop": list(letters)}
    tasks = [
        {MODULE: {**about, "snapshot_name": "s1"}, **loop, "register": "made"},
        {MODULE: {**about, "snapshot_name": "s2"}, **loop},
        {"qemu_vmdk_snap.vmdk.vmdk_snapshot_prune": {**about, "keep_last": 2}, **loop, "register": "pruned"},
        {MODULE: {**about, "snapshot_name": "s1", "state": "reverted"}, **loop, "register": "reverted"},
    ]
    kept = ", ".join(f"'{name}': {name} | default({{}})" for name in ("made", "pruned", "reverted"))
    report = {
        "ansible.builtin.copy": {
            "content": "{{ {" + kept + ", 'failed': ansible_failed_result | default({})} | to_json }}",
            "dest": f"{results}/{{{{ inventory_hostname }}}}.json",
        },
        "delegate_to": "localhost",
        "vars": {"ansible_connection": "local", "ansible_become": False},
    }
    fail = {"ansible.builtin.fail": {"msg": "{{ ansible_failed_result.msg }}"}}
    book = ansible.folder / "fleet.yml"
    block = {"block": [*tasks, report], "rescue": [report, fail]}
    book.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": [block]}]))
    done = ansible.run("ansible-playbook", "-i", str(source), "-f", "4", str(book))
    found = {path.stem: json.loads(path.read_text()) for path in results.iterdir()}
    return Played(done.returncode, done.stdout + done.stderr, found)


def names(lab: Lab, domain: str) -> list[str]:
    return [one.name for one in list_snapshots(lab.conn, domain)]


def assert_sound(host: Host, *domains: str) -> None:
    for domain in domains:
        done = host.run(str(PROGRAM), "doctor", domain, "--output=json")
        findings = [one for one in json.loads(done.stdout)["checks"] if one["verdict"] == "bad"]
        assert (done.returncode, findings) == (0, []), done.stdout


def until(what: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + 240
    while not what():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


def is_over(host: Host, pattern: str) -> bool:
    return host.run("pgrep", "-f", pattern).returncode == 1


RENDEZVOUS = """\
#!/bin/sh
case $3 in h?a) ;; *) exit 0 ;; esac
echo "$1 $(date +%s.%N)" >>"{folder}/$2-$3"
[ "$1" = before ] || exit 0
for i in $(seq 2300); do
    [ "$(ls "{folder}" | grep -c "^$2-")" -lt 3 ] || exit 0
    sleep 0.1
done
echo "the other hosts did not begin meanwhile"
exit 1
"""


@contextlib.contextmanager
def hook(hosts: list[Host], script: str) -> Iterator[None]:
    """Have this drop-in on the hosts for the length of the block."""
    for one in hosts:
        one.root(HOOKS).mkdir()
        (one.root(HOOKS) / "probe").write_text(script)
        (one.root(HOOKS) / "probe").chmod(0o755)
    try:
        yield
    finally:
        for one in hosts:
            shutil.rmtree(one.root(HOOKS))


@pytest.mark.needs("distribution-ansible")
def test_all_hosts_at_once(
    controller: Callable[..., Ansible], hosts: list[Host], labs: dict[str, Lab], scratch: Path
) -> None:
    """In parallel: of each operation none ends before it has begun on each host. With the distribution's Ansible."""
    (scratch / "times").mkdir()
    with hook(hosts, RENDEZVOUS.format(folder=scratch / "times")):
        played = play(controller("c", "distribution"), inventory(hosts))
    assert played.status == 0, played.said
    for operation in ("create", "delete", "revert"):
        logs = [
            [line.split() for line in (scratch / "times" / f"{operation}-{one.name}a").read_text().splitlines()]
            for one in hosts
        ]
        # The rendezvous is that of the first; create is called twice.
        begun = max(float(log[0][1]) for log in logs)
        ended = min(float(log[1][1]) for log in logs)
        assert [[phase for phase, _ in log[:2]] for log in logs] == [["before", "after"]] * 3
        assert begun < ended, (operation, logs)
    for one in hosts:
        assert names(labs[one.name], f"{one.name}a") == ["s1", "s2"]
        assert [row["changed"] for row in played.results[one.name]["reverted"]["results"]] == [True]
        assert_sound(one, f"{one.name}a")


def test_hosts_in_trouble_do_not_hold_up_the_others(
    controller: Callable[..., Ansible], hosts: list[Host], labs: dict[str, Lab]
) -> None:
    """One host is down; on one a domain is locked, and the chain of the other is broken: each is named, with why."""
    first, second, third = hosts
    everyone = {**inventory(hosts), "h0": {**first.variables(), "ansible_host": NOBODYS_ADDRESS}}
    ansible = controller("c")
    (third.images / "a.vmdk").replace(third.folder / "a.vmdk")
    uuid = labs["h2"].conn.lookupByName("h2a").UUIDString()
    with IntentStore.of(labs["h2"].conn, {STATE_VARIABLE: str(second.root(STATE))}).locked(uuid, "h2a"):
        played = play(ansible, everyone, "ab")
    assert played.status != 0
    assert (played.recap("h0")["unreachable"], "h0" in played.results) == (1, False)
    assert NOBODYS_ADDRESS in played.said
    assert (played.recap("h1")["failed"], played.recap("h1")["rescued"]) == (0, 0)
    assert names(labs["h1"], "h1b") == ["s1", "s2"]
    locked = played.results["h2"]["failed"]["results"]
    assert [row.get("code") for row in locked] == ["locked", None]
    assert (locked[1]["changed"], names(labs["h2"], "h2b")) == (True, ["s0", "s1"])
    broken = played.results["h3"]["failed"]["results"]
    assert broken[0]["code"] in ("missing-file", "system")
    assert "a.vmdk" in broken[0]["msg"]
    assert broken[0]["msg"] in played.said
    assert broken[1]["changed"]
    # What went wrong is put right, and the same play is run again: all hosts come to the same state.
    (third.folder / "a.vmdk").replace(third.images / "a.vmdk")
    played = play(ansible, inventory(hosts))
    assert played.status == 0, played.said
    assert [names(labs[one.name], f"{one.name}a") for one in hosts] == [["s1", "s2"]] * 3


STOPS = """\
#!{python}
# Stops in the middle: the overlay is there, and no XML names it.
import pathlib, socket, sys, time
import qemu_vmdk_snap
from qemu_vmdk_snap.cli.main import main

folder, real = pathlib.Path("{folder}"), qemu_vmdk_snap.create_overlay

def stops(*args, **options):
    result = real(*args, **options)
    (folder / f"reached-{{socket.gethostname()}}").touch()
    deadline = time.monotonic() + 300
    while not (folder / f"go-{{socket.gethostname()}}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return result

qemu_vmdk_snap.create_overlay = stops
sys.exit(main(sys.argv[1:]))
"""


def test_a_connection_cut_in_the_middle_of_a_create(
    controller: Callable[..., Ansible], hosts: list[Host], labs: dict[str, Lab], scratch: Path
) -> None:
    """The program goes on without a listener, is killed, or is hung up: run again there is one snapshot, whole."""
    ansible = controller("c")
    program = "usr/local/bin/qemu-vmdk-snap"
    whole = hosts[0].root(program).read_text()
    for one in hosts:
        one.root(program).write_text(STOPS.format(python=PROGRAM.with_name("python"), folder=scratch))
    played: list[Played] = []
    thread = threading.Thread(target=lambda: played.append(play(ansible, inventory(hosts))))
    thread.start()
    try:
        for one in hosts:
            until((scratch / f"reached-{one.name}").exists, f"{one.name} did not begin")
            one.cut()
        (scratch / "go-h1").touch()
        assert hosts[1].run("pkill", "-KILL", "-f", f"^[^ ]*python /{program}").returncode == 0
    except BaseException:
        for one in hosts:
            (scratch / f"go-{one.name}").touch()
        raise
    finally:
        thread.join()
    for one in hosts:
        until(functools.partial(is_over, one, f"^[^ ]*python /{program}"), f"{one.name} goes on")
        one.root(program).write_text(whole)
    assert [played[0].recap(one.name)["unreachable"] for one in hosts] == [1, 1, 1], played[0].said
    assert names(labs["h1"], "h1a") == ["s0", "s1"]  # nobody heard of it
    again = play(ansible, inventory(hosts))
    assert again.status == 0, again.said
    for one in hosts:
        assert names(labs[one.name], f"{one.name}a") == ["s1", "s2"]
        assert_sound(one, f"{one.name}a")
        assert [path.name for path in one.images.iterdir() if path.suffix != ".vmdk" or path.name[0] == "."] == []


WAITS = """\
#!/bin/sh
[ "$1 $2 $3" = "before create h1a" ] || exit 0
: >"{folder}/reached"
for i in $(seq 2300); do
    [ ! -e "{folder}/go" ] || exit 0
    sleep 0.1
done
exit 1
"""


def test_two_controllers_at_once(
    controller: Callable[..., Ansible], hosts: list[Host], labs: dict[str, Lab], scratch: Path
) -> None:
    """Both ask for the same snapshot: the second one is told that the first is at it, and finds it later."""
    first, other = controller("c"), controller("d")
    played: list[Played] = []
    thread = threading.Thread(target=lambda: played.append(play(first, inventory(hosts[:1]))))
    with hook(hosts[:1], WAITS.format(folder=scratch)):
        thread.start()
        try:
            until((scratch / "reached").exists, "the first controller did not begin")
            second = play(other, inventory(hosts[:1]))
        finally:
            (scratch / "go").touch()
            thread.join()
    assert second.status != 0
    assert [row["code"] for row in second.results["h1"]["failed"]["results"]] == ["locked"], second.said
    assert played[0].status == 0, played[0].said
    later = play(other, inventory(hosts[:1]))
    assert later.status == 0, later.said
    assert [row["changed"] for row in later.results["h1"]["made"]["results"]] == [False]
    assert names(labs["h1"], "h1a") == ["s1", "s2"]
    assert_sound(hosts[0], "h1a")


def plain(value: object) -> object:
    """Return the text that ansible-inventory may show as what it does not trust."""
    return value["__ansible_unsafe"] if isinstance(value, dict) else value


def test_an_inventory_of_domains(controller: Callable[..., Ansible], hosts: list[Host], labs: dict[str, Lab]) -> None:
    one, ansible = hosts[0], controller("c")
    source = ansible.folder / "domains.vmdk_snap.yml"
    config = {
        "plugin": "qemu_vmdk_snap.vmdk.domains",
        "hypervisors": [f"root@{one.address}", f"root@{NOBODYS_ADDRESS}"],
        "ssh_options": ["-F", f"{one.keys}/ssh_config", "-i", str(one.keys / "key")],
        "older_than_days": [0, 1],
    }
    source.write_text(json.dumps(config))
    done = ansible.run("ansible-inventory", "-i", str(source), "--list")
    assert done.returncode == 0, done.stderr
    groups = json.loads(done.stdout)
    assert sorted(groups["has_vmdk"]["hosts"]) == ["h1a", "h1b"]
    assert sorted(groups["snapshot_older_than_0"]["hosts"]) == ["h1a", "h1b"]
    assert "snapshot_older_than_1" not in groups
    assert sorted(groups[f"on_{one.address.replace('.', '_')}"]["hosts"]) == ["h1a", "h1b"]
    facts = groups["_meta"]["hostvars"]["h1a"]
    assert [plain(facts["vmdk_domain"]), *(plain(row["name"]) for row in facts["vmdk_snapshots"])] == ["h1a", "s0"]
    assert f"root@{NOBODYS_ADDRESS} is left out" in done.stderr
