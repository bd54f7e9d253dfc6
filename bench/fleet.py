"""`python -m bench.fleet`: three hosts with two domains each, by three forks of Ansible beside one fork.

The hosts are namespaces on this machine (tests/domain/fleet/bed.py), each with its own libvirtd and sshd; all of them,
and Ansible, share its processors, which hosts of their own would not. A round is one playbook that creates a snapshot
of each domain with three forks, the same with one fork, by turns; then both are deleted. What a module adds is the time
of a task that creates a snapshot by the module, less that of a task that runs the bare command, over one connection.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qemu_vmdk_snap import create_image
from qemu_vmdk_snap.domain import connection, list_snapshots
from tests.domain.fleet.bed import Host, bed
from tests.domain.fleet.playbooks import CORES, Ansible

MODULE: Final = "qemu_vmdk_snap.vmdk.vmdk_snapshot"
DOMAINS: Final = ("a", "b")
RATIO: Final = 0.45
ADDED: Final = 0.5
TASKS: Final = 5


def main() -> int:
    """Measure, print the table, and return 0 when both targets are met."""
    parser = argparse.ArgumentParser(prog="python -m bench.fleet", description=__doc__)
    parser.add_argument("-n", "--rounds", type=int, default=5, help="playbooks with each number of forks (5)")
    parser.add_argument("--core", choices=CORES, default="current", help="which ansible-core (current)")
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("hosts in namespaces need root", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="vmdk-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o711)
        with fleet(folder, args.core) as (ansible, hosts):
            three, one = forks(ansible, hosts, args.rounds)
            module, bare = added(ansible, hosts[0], args.rounds)
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors, ansible-core: {args.core}")
    print(f"{'median of ' + str(args.rounds):<30}{'3 forks':>10}{'1 fork':>10}{'ratio':>8}{'target':>8}")
    medians = statistics.median(three), statistics.median(one)
    ratio = statistics.median(a / b for a, b in zip(three, one, strict=True))
    print(f"{'3 hosts, 2 snapshots each':<30}{medians[0]:>9.2f}s{medians[1]:>9.2f}s{ratio:>8.2f}{RATIO:>8}")
    more = statistics.median(a - b for a, b in zip(module, bare, strict=True))
    print(f"{'':<30}{'module':>10}{'command':>10}{'added':>8}{'target':>8}")
    medians = statistics.median(module), statistics.median(bare)
    print(f"{'one snapshot':<30}{medians[0]:>9.2f}s{medians[1]:>9.2f}s{more:>7.2f}s{ADDED:>7}s")
    return 0 if ratio <= RATIO and more <= ADDED else 1


@contextlib.contextmanager
def fleet(folder: Path, core: str) -> Iterator[tuple[Ansible, list[Host]]]:
    """Have three hosts with two domains each, and a controller that knows them."""
    with bed(folder, "h1", "h2", "h3") as (switch, hosts):
        ansible = Ansible(folder / "controller", core, switch.inside())
        inventory = {"all": {"hosts": {one.name: one.variables() for one in hosts}}}
        (ansible.folder / "hosts.json").write_text(json.dumps(inventory))
        for host in hosts:
            with connection(host.uri) as conn:
                for letter in DOMAINS:
                    disk = host.images / f"{letter}.vmdk"
                    create_image(disk, 4 << 20)
                    conn.defineXML(
                        f"<domain type='qemu'><name>{letter}</name><memory unit='MiB'>32</memory><os><type>hvm</type>"
                        "</os><devices><disk type='file' device='disk'><driver name='qemu' type='vmdk'/>"
                        f"<source file='{disk}'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
                    )
        play(ansible, "all", 3, {"ansible.builtin.ping": {}}, [1])  # Python's caches, and libvirtd's
        yield ansible, hosts


def forks(ansible: Ansible, hosts: list[Host], rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of the playbook with three forks and with one, by turns."""
    create = {MODULE: {"name": "{{ item }}", "snapshot_name": "s"}}
    times: dict[int, list[float]] = {3: [], 1: []}
    for number in range(rounds):
        for count in (3, 1) if number % 2 else (1, 3):
            times[count].append(play(ansible, "all", count, create, DOMAINS))
            expect(hosts, {letter: 1 for letter in DOMAINS})
            play(ansible, "all", 3, {MODULE: {"name": "{{ item }}", "state": "remove_all"}}, DOMAINS)
        progress(f"3 forks {times[3][-1]:.2f} s, 1 fork {times[1][-1]:.2f} s")
    return times[3], times[1]


def added(ansible: Ansible, host: Host, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of a task by the module and by the bare command, by turns."""
    module = {MODULE: {"name": "a", "snapshot_name": "{{ item }}"}}
    argv = ["qemu-vmdk-snap", "snapshot", "create", "a", "{{ item }}", "--output=json"]
    command = {"ansible.builtin.command": {"argv": argv}}
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        empty = play(ansible, host.name, 1, {"ansible.builtin.ping": {}}, [1])
        for kind in order:
            names = [f"s{item}" for item in range(TASKS)]
            took = play(ansible, host.name, 1, (module, command)[kind], names)
            times[kind].append((took - empty) / (TASKS - 1))  # the ping stands for the start and one task's connection
            expect([host], {"a": TASKS})
            play(ansible, host.name, 1, {MODULE: {"name": "a", "state": "remove_all"}}, [1])
        progress(f"module {times[0][-1]:.2f} s, command {times[1][-1]:.2f} s")
    return times[0], times[1]


def play(ansible: Ansible, hosts: str, count: int, task: dict[str, object], items: object) -> float:
    """Run the task for each item on these hosts and return how many seconds it took."""
    book = ansible.folder / "bench.yml"
    book.write_text(json.dumps([{"hosts": hosts, "gather_facts": False, "tasks": [{**task, "loop": items}]}]))
    began = time.monotonic()
    done = ansible.run("ansible-playbook", "-i", f"{ansible.folder}/hosts.json", "-f", str(count), str(book))
    took = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    return took


def progress(text: str) -> None:
    """Say what a round has measured, with the load that it had."""
    print(f"{text} (load {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)


def expect(hosts: list[Host], counts: dict[str, int]) -> None:
    """See that each domain has so many snapshots."""
    for host in hosts:
        with connection(host.uri) as conn:
            for name, count in counts.items():
                assert len(list_snapshots(conn, name)) == count, (host.name, name)


if __name__ == "__main__":
    sys.exit(main())
