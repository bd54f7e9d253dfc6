"""Revert, delete, rename and prune, killed for real (SIGKILL) after each thing that they change outside their memory.

The command runs as a process of its own on the private daemon. After each death the next command settles it: all that
is left reads what it read, the domain is as it was or as it was to be, and the doctor finds nothing to complain of.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.revert.run import revert
from tests.domain.delete.test_delete import chain_in_xml_fits, seen, write
from tests.domain.lab import MIB, Lab

if TYPE_CHECKING:
    import libvirt

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64"),
    pytest.mark.timeout(600),
]

VICTIM = """
import os, pathlib, signal, sys
import libvirt
import qemu_vmdk_snap
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.journal.record import IntentStore

at, seen = int(sys.argv[1]), 0

def dying(home, name):
    real = getattr(home, name)
    def dies(*args, **options):
        global seen
        result = real(*args, **options)
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(home, name, dies)

for name in ("write", "remove"):
    dying(IntentStore, name)
for name in ("create_overlay", "commit", "rebase"):
    dying(qemu_vmdk_snap, name)
dying(libvirt.virConnect, "defineXML")
for name in ("snapshotCreateXML", "destroy", "createWithFlags"):
    dying(libvirt.virDomain, name)
dying(libvirt.virDomainSnapshot, "delete")
dying(pathlib.Path, "unlink")
sys.exit(main(sys.argv[2:]))
"""

COMMANDS = {
    "create": ["create", "--name=s9"],
    "revert": ["revert", "s1"],
    "discard": ["revert", "s2", "--discard", "--running"],
    "merge": ["delete", "s2"],
    "copy": ["delete", "s1"],
    "rename": ["rename", "s1", "other"],
    "prune": ["prune", "--keep-last=1"],
}
THOROUGH = bool(os.environ.get("VMDK_KILL_EACH"))
STRIDE = 1 if THOROUGH else 3
"""A death costs two seconds: after every third change, or with VMDK_KILL_EACH=1 after each."""

FEWEST = {"create": 7, "revert": 6, "discard": 9, "merge": 7, "copy": 9, "rename": 6, "prune": 24}
"""So many changes at least: a command whose changes are no longer seen would else pass unkilled."""


def make_tree(lab: Lab, folder: Path) -> libvirt.virDomain:
    """Return a shut-off domain with the tree s1 - (s2 - s3, s4 - now) in a folder of its own."""
    folder.mkdir()
    lab.folder = folder
    domain = lab.define(lab.disk("a", size=2 * MIB), lab.disk("b", size=2 * MIB))
    for number in (1, 2, 3):
        write(domain, number)
        create_snapshot(lab.conn, domain.name(), f"s{number}")
    revert(lab.conn, domain.name(), "s1", discard=True)
    time.sleep(1.05 - time.time() % 1)  # in a later second than s3: the youngest is the same one in every tree
    write(domain, 5)
    create_snapshot(lab.conn, domain.name(), "s4")
    write(domain, 6)
    return domain


def run(lab: Lab, domain: libvirt.virDomain, words: list[str], at: int) -> int:
    """Run the command, killed after `at` changes (0: not at all), and return its status."""
    return run_line(["snapshot", words[0], "-c", lab.uri, domain.name(), *words[1:]], at)


def run_line(line: list[str], at: int) -> int:
    """Run a command line, killed after `at` changes (0: not at all), and return its status."""
    done = subprocess.run(
        [sys.executable, "-c", VICTIM, str(at), *line], check=False, timeout=120, capture_output=True, text=True
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


def facts(lab: Lab, domain: libvirt.virDomain) -> dict[str, list[bytes]]:
    if domain.isActive():
        domain.destroy()
    return seen(lab, domain)


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_after_each_change_and_settled_by_the_next(daemon_lab: Lab, tmp_path: Path, command: str) -> None:
    lab, words = daemon_lab, COMMANDS[command]
    domain = make_tree(lab, lab.folder / "whole")
    before = facts(lab, domain)
    assert run(lab, domain, words, 0) == 0
    after = facts(lab, domain)
    assert after != before
    home, at = lab.folder.parent, 0
    for at in itertools.count(1, STRIDE * (4 if command == "prune" else 1)):
        domain = make_tree(lab, home / str(at))
        if run(lab, domain, words, at) == 0:
            break
        check_settled(lab, domain, before, after)
        if facts(lab, domain) != after:  # it was taken back, or only some of it was done: once more, whole
            assert run(lab, domain, words, 0) == 0
            assert facts(lab, domain) == after
    assert at >= FEWEST[command]
    if domain.isActive():
        domain.destroy()
    domain.create()  # libvirt and QEMU have nothing against it either
    domain.destroy()


def check_settled(
    lab: Lab, domain: libvirt.virDomain, before: dict[str, list[bytes]], after: dict[str, list[bytes]]
) -> None:
    """Let the next command settle it, and see that nothing is lost, nothing is half done, and nothing is left."""
    recover(lab.conn)
    assert IntentStore.of(lab.conn).uuids() == []
    now = facts(lab, domain)
    for name, disks in now.items():
        assert disks in (before.get(name), after.get(name)), name
    assert {*before} & {*after} <= {*now} <= {*before, *after}
    assert now["now"] in (before["now"], after["now"])
    chain_in_xml_fits(domain)
    assert [check for check in check_domain(lab.conn, domain.name()) if check.verdict == "bad"] == []
    assert not list(lab.folder.glob(".*"))
