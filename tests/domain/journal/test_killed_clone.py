"""A clone, killed for real (SIGKILL) after each thing that it changes: it is whole, or nothing of it is there."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from tests.domain.delete.test_delete import read, tops
from tests.domain.journal.test_killed import THOROUGH, VICTIM, check_settled, facts, make_tree
from tests.domain.lab import Lab

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64"),
    pytest.mark.timeout(600),
]

VICTIM_TOO = VICTIM.replace(
    'dying(pathlib.Path, "unlink")',
    'for name in ("unlink", "mkdir", "rmdir", "hardlink_to"):\n    dying(pathlib.Path, name)\n'
    'for name in ("convert", "copy_file"):\n    dying(qemu_vmdk_snap, name)',
)


def run(lab: Lab, words: list[str], at: int) -> int:
    line = ["snapshot", "clone", "-c", lab.uri, *words]
    done = subprocess.run(
        [sys.executable, "-c", VICTIM_TOO, str(at), *line], check=False, timeout=120, capture_output=True, text=True
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


@pytest.mark.parametrize("mode", ["--linked", "--full"])
def test_a_killed_clone_is_whole_or_not_there(daemon_lab: Lab, mode: str) -> None:
    lab = daemon_lab
    domain = make_tree(lab, lab.folder / "tree")
    before = facts(lab, domain)
    there = sorted(lab.folder.iterdir())
    at, whole, name = 0, 0, ""
    for at in itertools.count(1, 1 if THOROUGH else 5 if mode == "--linked" else 7):
        name = f"clone{at}"
        lab.adopt(name)
        if run(lab, [domain.name(), "s2", name, mode], at) == 0:
            break
        recover(lab.conn)
        assert IntentStore.of(lab.conn).uuids() == []
        check_settled(lab, domain, before, before)
        known = {one.name(): one for one in lab.conn.listAllDomains()}
        if name in known:  # it was defined, and only the record was left
            assert [read(path) for path in tops(known[name])] == before["s2"]
            known[name].undefine()
            for path in set(lab.folder.iterdir()) - {*there}:
                path.unlink()
            whole += 1
        assert sorted(lab.folder.iterdir()) == there
    assert whole >= 1 or not THOROUGH
    assert at >= (12 if mode == "--linked" else 25)
    assert [read(path) for path in tops(lab.conn.lookupByName(name))] == before["s2"]
