"""Playbooks over ssh on three hosts, each with a libvirtd of its own: in parallel, and with each kind of failure."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_vmdk_snap.domain import check_domain, connection, create_snapshot, list_snapshots
from qemu_vmdk_snap.domain.journal.record import STATE_VARIABLE, IntentStore
from tests.domain.fleet.playbooks import Ansible
from tests.domain.lab import Lab
from tests.domain.libvirtd import Daemon, private_daemon
from tests.domain.sshd import Host

pytestmark = [
    pytest.mark.needs("libvirtd", "ansible-playbook", "ssh", "sshd", "ssh-keygen"),
    pytest.mark.timeout(300),
]
BIN = Path(sys.executable).parent
MODULE = "qemu_vmdk_snap.vmdk.vmdk_snapshot"


class Hypervisor:
    """One host: a libvirtd, an sshd, a state folder, domains of its own."""

    def __init__(self, name: str, folder: Path, daemon: Daemon) -> None:
        self.name, self.daemon, self.state = name, daemon, folder / "state"
        self.bin = folder / "bin"
        """What is here is found before what is installed."""
        self.host = Host(folder / "sshd", f"{self.bin}:{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", self.state)
        (folder / "img").mkdir()
        self.folder = folder / "img"

    def variables(self) -> dict[str, object]:
        """Return what the inventory says of it."""
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.host.port,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.host.key),
            "ansible_ssh_common_args": f"-F {self.host.folder}/ssh_config",
            "ansible_python_interpreter": "/usr/bin/python3",
            "libvirt": self.daemon.uri,
        }


@pytest.fixture(scope="module")
def hypervisors(scratch_root: Path) -> Iterator[list[Hypervisor]]:
    if os.geteuid() != 0:
        pytest.skip("three system daemons need root")
    with contextlib.ExitStack() as running:
        found = []
        for name in ("h1", "h2", "h3"):
            (scratch_root / name).mkdir()
            daemon = running.enter_context(private_daemon(scratch_root / name / "v")).ensure()
            found.append(Hypervisor(name, scratch_root / name, daemon))
            running.enter_context(found[-1].host.running())
        yield found


@pytest.fixture
def labs(hypervisors: list[Hypervisor]) -> Iterator[dict[str, Lab]]:
    """Two domains on each host, `NAMEa` and `NAMEb`."""
    with contextlib.ExitStack() as opened:
        found = {}
        for one in hypervisors:
            lab = Lab(opened.enter_context(connection(one.daemon.uri)), one.folder, one.daemon.uri)
            opened.callback(shutil.rmtree, one.folder)
            opened.callback(lab.close)
            one.folder.mkdir(exist_ok=True)
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


def play(ansible: Ansible, hypervisors: list[Hypervisor], letters: str = "ab") -> tuple[int, str, dict[str, Any]]:
    """Snapshot, prune and revert these domains of each host; return status, output and each host's results."""
    inventory = ansible.folder / "hosts.json"
    hosts = {one.name: one.variables() for one in hypervisors}
    inventory.write_text(json.dumps({"all": {"hosts": hosts}}))
    results = ansible.folder / "results"
    results.mkdir(exist_ok=True)
    about = {"connect": "{{ libvirt }}", "name": "{{ inventory_hostname }}{{ item }}"}
    loop = {"loop": list(letters)}
    tasks = [
        {MODULE: {**about, "snapshot_name": "s1"}, **loop, "register": "made"},
        {MODULE: {**about, "snapshot_name": "s2"}, **loop},
        {"qemu_vmdk_snap.vmdk.vmdk_snapshot_prune": {**about, "keep_last": 2}, **loop, "register": "pruned"},
        {MODULE: {**about, "snapshot_name": "s2", "state": "reverted"}, **loop},
    ]
    report = {
        "ansible.builtin.copy": {
            "content": "{{ {'made': made | default({}), 'pruned': pruned | default({}), "
            "'failed': ansible_failed_result | default({})} | to_json }}",
            "dest": f"{results}/{{{{ inventory_hostname }}}}.json",
        },
        "delegate_to": "localhost",
        "vars": {"ansible_connection": "local"},
    }
    fail = {"ansible.builtin.fail": {"msg": "{{ ansible_failed_result.msg }}"}}
    block = {"block": [*tasks, report], "rescue": [report, fail]}
    book = ansible.folder / "fleet.yml"
    book.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": [block]}]))
    done = ansible.run("ansible-playbook", "-i", str(inventory), "-f", "4", str(book))
    found = {path.stem: json.loads(path.read_text()) for path in results.iterdir()}
    return done.returncode, done.stdout + done.stderr, found


def names(lab: Lab, domain: str) -> list[str]:
    return [one.name for one in list_snapshots(lab.conn, domain)]


RENDEZVOUS = """\
#!/bin/sh
[ "$1 $2" = "before create" ] || exit 0
case $3 in h?a) ;; *) exit 0 ;; esac
: >"{folder}/$3"
for i in $(seq 2000); do
    [ "$(ls "{folder}" | wc -l)" -lt 3 ] || exit 0
    sleep 0.1
done
echo "the other hosts did not begin meanwhile"
exit 1
"""


def test_all_hosts_at_once(
    ansible: Ansible, hypervisors: list[Hypervisor], labs: dict[str, Lab], tmp_path: Path
) -> None:
    """In parallel: no create ends before one has begun on each host."""
    scripts = [one.host.folder / "hooks.d" / "rendezvous" for one in hypervisors]
    for script in scripts:
        script.parent.mkdir()
        script.write_text(RENDEZVOUS.format(folder=tmp_path))
        script.chmod(0o755)
    try:
        status, said, _ = play(ansible, hypervisors)
    finally:
        for script in scripts:
            shutil.rmtree(script.parent)
    assert status == 0, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h1a", "h2a", "h3a"]
    for one in hypervisors:
        for letter in "ab":
            assert names(labs[one.name], f"{one.name}{letter}") == ["s1", "s2"]
            checks = check_domain(labs[one.name].conn, f"{one.name}{letter}")
            assert [check.text for check in checks if check.verdict == "bad"] == []


def test_hosts_in_trouble_do_not_hold_up_the_others(
    ansible: Ansible, hypervisors: list[Hypervisor], labs: dict[str, Lab], tmp_path: Path
) -> None:
    """One host is down; on one a domain is locked, and the chain of the other is broken: each is named, with why."""
    first, second, third = hypervisors
    (tmp_path / "h0").mkdir()
    extra = Hypervisor("h0", tmp_path / "h0", first.daemon)  # never started: nobody listens on its port
    (third.folder / "a.vmdk").replace(third.folder.parent / "a.vmdk")
    uuid = labs["h2"].conn.lookupByName("h2a").UUIDString()
    with IntentStore.of(labs["h2"].conn, {STATE_VARIABLE: str(second.state)}).locked(uuid, "h2a"):
        status, said, found = play(ansible, [extra, *hypervisors])
    assert status != 0
    recap = {line.split()[0]: line for line in said[said.index("PLAY RECAP") :].splitlines()[1:] if line.strip()}
    assert "unreachable=1" in recap["h0"]
    assert "failed=0" in recap["h1"]
    assert names(labs["h1"], "h1b") == ["s1", "s2"]
    locked = found["h2"]["failed"]["results"]
    assert [row.get("code") for row in locked] == ["locked", None]
    assert (locked[1]["changed"], names(labs["h2"], "h2b")) == (True, ["s0", "s1"])
    broken = found["h3"]["failed"]["results"]
    assert broken[0]["code"] in ("missing-file", "system")
    assert "a.vmdk" in broken[0]["msg"]
    # What went wrong is put right, and the same play is run again: all hosts come to the same state.
    (third.folder.parent / "a.vmdk").replace(third.folder / "a.vmdk")
    status, said, _ = play(ansible, hypervisors)
    assert status == 0, said
    assert [names(labs[one.name], f"{one.name}a") for one in hypervisors] == [["s1", "s2"]] * 3


CUT = """\
#!{python}
import os, pathlib, signal, sys
import libvirt
from qemu_vmdk_snap.cli.main import main

define = libvirt.virConnect.defineXML

def cut(*args):
    define(*args)
    pathlib.Path({mark!r}).touch()
    for listed in pathlib.Path("/proc/{sshd}/task").glob("*/children"):
        for pid in listed.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1:3] == ["snapshot", "create"]:
    libvirt.virConnect.defineXML = cut
sys.exit(main())
"""


def test_a_connection_cut_in_the_middle_of_a_create(
    ansible: Ansible,
    hypervisors: list[Hypervisor],
    labs: dict[str, Lab],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Run again there is one snapshot, whole, and nothing is left over."""
    one, lab = hypervisors[0], labs["h1"]
    monkeypatch.setenv(STATE_VARIABLE, str(one.state))  # for what is checked here
    program, mark = one.bin / "qemu-vmdk-snap", tmp_path / "cut"
    one.bin.mkdir()
    try:
        program.write_text(CUT.format(python=sys.executable, mark=str(mark), sshd=one.host.pid))
        program.chmod(0o755)
        status, said, _ = play(ansible, [one], "a")
    finally:
        shutil.rmtree(one.bin)
    assert mark.exists(), said
    assert status != 0, said
    assert IntentStore.of(lab.conn, {STATE_VARIABLE: str(one.state)}).uuids()
    status, said, _ = play(ansible, [one], "a")
    assert status == 0, said
    assert names(lab, "h1a") == ["s1", "s2"]
    assert [check.text for check in check_domain(lab.conn, "h1a") if check.verdict == "bad"] == []
    assert [path.name for path in one.folder.iterdir() if path.suffix != ".vmdk" or path.name.startswith(".")] == []


def test_two_controllers_at_once(
    ansible: Ansible,
    hypervisors: list[Hypervisor],
    labs: dict[str, Lab],
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ask for the same snapshot: there is one in the end, and whoever came second found it or was told why not."""
    monkeypatch.setenv(STATE_VARIABLE, str(hypervisors[0].state))  # for what is checked here
    other = Ansible(scratch / "other")
    ends: list[tuple[int, str, dict[str, Any]]] = []
    thread = threading.Thread(target=lambda: ends.append(play(other, hypervisors[:1], "a")))
    thread.start()
    ends.append(play(ansible, hypervisors[:1], "a"))
    thread.join()
    assert 0 in [status for status, _, _ in ends] or all("locked" in said for _, said, _ in ends)
    status, said, _ = play(ansible, hypervisors[:1], "a")
    assert status == 0, said
    assert names(labs["h1"], "h1a") == ["s1", "s2"]
    assert [check.text for check in check_domain(labs["h1"].conn, "h1a") if check.verdict == "bad"] == []


def plain(value: object) -> object:
    """Return the text that ansible-inventory may show as what it does not trust."""
    return value["__ansible_unsafe"] if isinstance(value, dict) else value


def test_an_inventory_of_domains(ansible: Ansible, hypervisors: list[Hypervisor], labs: dict[str, Lab]) -> None:
    one = hypervisors[0]
    source = ansible.folder / "domains.vmdk_snap.yml"
    options = ["-F", f"{one.host.folder}/ssh_config", "-i", str(one.host.key), "-p", str(one.host.port)]
    config = {
        "plugin": "qemu_vmdk_snap.vmdk.domains",
        "hypervisors": ["root@127.0.0.1", "root@localhost.invalid"],
        "connect": one.daemon.uri,
        "ssh_options": options,
        "older_than_days": [0, 1],
    }
    source.write_text(json.dumps(config))
    done = ansible.run("ansible-inventory", "-i", str(source), "--list")
    assert done.returncode == 0, done.stderr
    groups = json.loads(done.stdout)
    assert sorted(groups["has_vmdk"]["hosts"]) == ["h1a", "h1b"]
    assert sorted(groups["snapshot_older_than_0"]["hosts"]) == ["h1a", "h1b"]
    assert "snapshot_older_than_1" not in groups
    assert sorted(groups["on_127_0_0_1"]["hosts"]) == ["h1a", "h1b"]
    facts = groups["_meta"]["hostvars"]["h1a"]
    assert [plain(facts["vmdk_domain"]), *(plain(row["name"]) for row in facts["vmdk_snapshots"])] == ["h1a", "s0"]
    assert "root@localhost.invalid is left out" in done.stderr
