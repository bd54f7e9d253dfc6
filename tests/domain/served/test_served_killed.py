"""Commands on a running guest with a served disk, killed for real after each thing that they change.

After each death `recover` settles it: every snapshot reads what it read, the guest runs or can be started, no file is
left, and the doctor finds nothing to complain of.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.domain.attach.run import attach
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.domain.served.commands import start_servers, stop_servers
from qemu_vmdk_snap.domain.state import inactive_xml
from qemu_vmdk_snap.domain.xml import list_disks
from qemu_vmdk_snap.domain.xml.served import served_disks
from tests.domain.lab import MIB, Lab

if TYPE_CHECKING:
    import libvirt

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64", "qemu-io"),
    pytest.mark.timeout(900),
]

VICTIM = """
import os, signal, sys
import libvirt
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.delete import run as delete_run
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.served import server
from qemu_vmdk_snap.domain.served.control import Control

at, seen = int(sys.argv[1]), 0

def dying(home, name, only=None):
    real = getattr(home, name)
    def dies(*args, **options):
        global seen
        result = real(*args, **options)
        if only is None or args[1] in only:
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(home, name, dies)

for name in ("write", "remove"):
    dying(IntentStore, name)
for name in ("defineXML", "restoreFlags"):
    dying(libvirt.virConnect, name)
for name in ("snapshotCreateXML", "destroy", "setMetadata", "resume"):
    dying(libvirt.virDomain, name)
dying(libvirt.virDomainSnapshot, "delete")
dying(Control, "ask", ("snapshot-prepare", "snapshot-switch", "release", "merge", "stop"))
dying(delete_run, "unlink_memory")
sys.exit(main(sys.argv[2:]))
"""

COMMANDS = {
    "create": ["create", "--name=s9"],
    "memory": ["create", "--name=m9", "--memspec=FOLDER/m9.memory"],
    "delete": ["delete", "m2"],
    "revert": ["revert", "m2", "--discard"],
}
FEWEST = {"create": 8, "memory": 10, "delete": 6, "revert": 7}
"""So many changes at least: a command whose changes are no longer seen would else pass unkilled."""

DEATHS = (("create", 7), ("memory", 4), ("memory", 7), ("revert", 6), ("delete", 2))
"""Those of every day: all servers held; memory saved; registered; its XML defined; the server has begun to merge."""


class Served:
    """A running domain with the snapshots s1, m2 (with memory) and s3, and something written between them."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        folder.mkdir()
        lab.folder, self.lab, self.folder = folder, lab, folder
        self.domain = lab.define(lab.disk("a", size=4 * MIB))
        self.name = self.domain.name()
        attach(lab.conn, self.name, [])
        self.start()
        for number, name in enumerate(("s1", "m2", "s3", "now"), 1):
            self.write(number)
            if name != "now":
                memory = folder / f"{name}.memory" if name == "m2" else None
                create_snapshot(lab.conn, self.name, name, memory=memory)

    def start(self) -> None:
        start_servers(self.lab.conn, self.name)
        self.domain.create()

    def write(self, number: int) -> None:
        (disk,) = served_disks(inactive_xml(self.domain)).values()
        words = ["qemu-io", "-f", "raw", "-c", f"write -P {number} {number * 65536} 100k", "-c", "flush"]
        done = subprocess.run([*words, f"nbd+unix:///?socket={disk.socket}"], capture_output=True, check=False)
        assert done.returncode == 0, done

    def seen(self) -> dict[str, str]:
        """Return the digest of what each snapshot, and the present, reads, while the guest runs or not."""
        tops = {one.name: one.disks[0].frozen for one in list_snapshots(self.lab.conn, self.name)}
        tops["now"] = list_disks(inactive_xml(self.domain))[0].path
        found = {}
        for name, top in tops.items():
            assert top is not None
            with open_chain(top, lock=False) as chain:
                found[name] = hashlib.sha256(chain.read_at(0, 4 * MIB)).hexdigest()
        return found

    def end(self) -> None:
        if self.domain.isActive():
            self.domain.destroy()
        stop_servers(self.lab.conn, self.name)

    def run(self, words: list[str], at: int) -> int:
        line = [word.replace("FOLDER", str(self.folder)) for word in words]
        line = ["snapshot", line[0], "-c", self.lab.uri, self.name, *line[1:]]
        done = subprocess.run(
            [sys.executable, "-c", VICTIM, str(at), *line], check=False, timeout=120, capture_output=True, text=True
        )
        assert done.returncode in (0, -9), done.stderr
        return done.returncode


@pytest.fixture(autouse=True)
def place(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_VMDK_SNAP_RUN", str(scratch / "s"))


def test_killed_and_settled_again_and_again(daemon_lab: Lab) -> None:
    served = Served(daemon_lab, daemon_lab.folder / "a")
    try:
        for command, at in DEATHS:
            before = served.seen()
            assert served.run(COMMANDS[command], at) == -9, command
            check_settled(served, before)
    finally:
        served.end()


if os.environ.get("VMDK_KILL_EACH"):

    @pytest.mark.parametrize("command", COMMANDS)
    def test_killed_after_each_change_and_settled(daemon_lab: Lab, command: str) -> None:
        home, at = daemon_lab.folder, 0
        for at in itertools.count(1):
            served = Served(daemon_lab, home / str(at))
            try:
                before = served.seen()
                if served.run(COMMANDS[command], at) == 0:
                    break
                check_settled(served, before)
            finally:
                served.end()
        assert at >= FEWEST[command]


def check_settled(served: Served, before: dict[str, str]) -> None:
    """Let `recover` settle it: nothing is lost, nothing is half done, nothing is left, and the guest can run."""
    conn, domain = served.lab.conn, served.domain
    recover(conn, [served.name])
    assert IntentStore.of(conn).uuids() == []
    if not domain.isActive():
        served.start()
    assert is_running(domain)
    assert [check for check in check_domain(conn, served.name) if check.verdict == "bad"] == []
    now = served.seen()
    new = {"s9", "m9"} & (set(now) - set(before))
    assert set(before) - set(now) <= {"m2"}
    assert now == {name: before[name] for name in set(now) - new - {"now"}} | {
        **dict.fromkeys(new, before["now"]),
        "now": now["now"],
    }
    assert now["now"] in (before["now"], before.get("m2"))
    memory = [one.memory_file for one in list_snapshots(conn, served.name) if one.memory_file is not None]
    assert sorted(served.folder.glob("*.memory")) == sorted(memory)
    assert not list(served.folder.glob(".*"))


def is_running(domain: libvirt.virDomain) -> bool:
    import libvirt

    return bool(domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)
