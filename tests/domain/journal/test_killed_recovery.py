"""`recover -c` itself, killed after each thing that it changes; every other command in the place of a second one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.journal.record import IntentStore
from tests.domain.journal.test_killed import (
    COMMANDS,
    FEWEST,
    STRIDE,
    THOROUGH,
    check_settled,
    facts,
    make_tree,
    run,
    run_line,
)

if TYPE_CHECKING:
    import libvirt

    from tests.domain.lab import Lab

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64"),
    pytest.mark.timeout(1800 if THOROUGH else 600),
]

NEXT = {
    "create": ["create", "--name=s8"],
    "delete": ["delete", "s3"],
    "delete --metadata": ["delete", "s3", "--metadata"],
    "revert": ["revert", "s3"],
    "rename": ["rename", "s3", "third"],
    "current": ["current", "s3"],
    "describe": ["describe", "s3", "text"],
    "prune": ["prune", "--keep-last=1"],
}
"""What can be done on a domain whose snapshot s3 no interrupted command has touched."""


def moments(command: str) -> list[int]:
    """Return after how many changes the command dies: each with VMDK_KILL_EACH=1, else one in the middle."""
    fewest = min(FEWEST[command], 12)
    return list(range(1, fewest)) if THOROUGH else [fewest // 2 + 1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_recover_ends_what_the_first_has_begun(daemon_lab: Lab, command: str) -> None:
    lab, words, home = daemon_lab, COMMANDS[command], daemon_lab.folder
    domain = make_tree(lab, home / "whole")
    before = facts(lab, domain)
    assert run(lab, domain, words, 0) == 0
    after = facts(lab, domain)
    killed = 0
    for at in moments(command):
        for step in itertools.count(1, STRIDE):
            domain = make_tree(lab, home / f"{at}-{step}")
            if run(lab, domain, words, at) == 0:
                break
            status = run_line(["recover", "-c", lab.uri, domain.name()], step)
            check_settled(lab, domain, before, after)
            if status == 0:
                break
            killed += 1
    assert killed


@pytest.mark.parametrize("following", NEXT)
@pytest.mark.parametrize("command", ["create", "merge", "rename"] if THOROUGH else ["merge"])
def test_every_command_goes_on_after_an_interrupted_one(daemon_lab: Lab, command: str, following: str) -> None:
    lab = daemon_lab
    for at in moments(command):
        domain = make_tree(lab, lab.folder.parent / f"img{at}")
        before = facts(lab, domain)
        assert run(lab, domain, COMMANDS[command], at) == -9
        assert run(lab, domain, NEXT[following], 0) == 0
        check_sound(lab, domain)
        now = facts(lab, domain)
        if following != "revert":
            assert now["now"] == before["now"]
        assert {name: now[name] for name in now if name in before and name != "now"} == {
            name: before[name] for name in now if name in before and name != "now"
        }


def check_sound(lab: Lab, domain: libvirt.virDomain) -> None:
    assert not IntentStore.of(lab.conn).has(domain.UUIDString())
    problems = [check for check in check_domain(lab.conn, domain.name()) if check.verdict == "bad"]
    # What a delete of metadata leaves behind is nobody's any more.
    assert [check for check in problems if not check.subject.startswith("orphan ")] == []
    assert not [path for path in Path(lab.folder).glob(".*") if path.name != ".lock"]
