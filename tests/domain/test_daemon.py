"""A real libvirtd, asked by virsh, sees what we did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vmdk_snap import DomainError, create_image
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from tests.domain.lab import MIB, Lab, xml_of
from tests.domain.libvirtd import Daemon

pytestmark = pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64")


def words(text: str) -> list[list[str]]:
    """Return the words of each line, without the rules and blank lines that virsh draws differently."""
    return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("---")]


def test_virsh_shows_the_same_tree_list_and_info(
    daemon: Daemon, daemon_lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    domain = daemon_lab.define(daemon_lab.disk("a"), daemon_lab.disk("b"))
    for name in ("s1", "s2", "s3"):
        create_snapshot(daemon_lab.conn, domain.name(), name)

    def ours(*options: str) -> str:
        assert main(["snapshot", *options, "-c", daemon_lab.uri]) == 0
        return capsys.readouterr().out

    tree = daemon.virsh("snapshot-list", domain.name(), "--tree")
    assert ours("list", domain.name(), "--tree").strip().splitlines() == tree.strip().splitlines()
    assert "+- s3" in tree
    assert words(ours("list", domain.name(), "--parent")) == words(
        daemon.virsh("snapshot-list", domain.name(), "--parent")
    )
    theirs = words(daemon.virsh("snapshot-info", domain.name(), "s2"))
    assert words(ours("info", domain.name(), "s2"))[: len(theirs)] == theirs
    assert daemon.virsh("snapshot-current", domain.name(), "--name").strip() == "s3"


def test_branches_are_drawn_as_virsh_draws_them(
    daemon: Daemon, daemon_lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    import libvirt

    domain = daemon_lab.define(daemon_lab.disk())
    parents = {"r": None, "a": "r", "b": "r", "aa": "a", "ab": "a", "aba": "ab", "ba": "b", "z": None, "za": "z"}
    for name, parent in parents.items():
        header = xml.SnapshotXml(name, "shutoff", 1, parent=parent)
        domain.snapshotCreateXML(xml.snapshot_xml(header, xml_of(domain)), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)
    assert main(["snapshot", "list", "-c", daemon_lab.uri, domain.name(), "--tree"]) == 0
    ours = [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()]
    theirs = daemon.virsh("snapshot-list", domain.name(), "--tree")
    assert ours == [line.rstrip() for line in theirs.strip().splitlines()]


def test_snapshots_and_chain_outlive_the_daemon(daemon: Daemon, daemon_lab: Lab) -> None:
    domain = daemon_lab.define(daemon_lab.disk())
    name = domain.name()
    for snapshot in ("s1", "s2", "s3"):
        create_snapshot(daemon_lab.conn, name, snapshot)
    daemon.virsh("start", name)
    daemon.restart()
    daemon_lab.conn = open_connection(daemon.uri)
    assert daemon.virsh("domstate", name).strip() == "running"
    assert daemon.virsh("snapshot-list", name, "--name").split() == ["s1", "s2", "s3"]
    daemon.virsh("destroy", name)
    daemon.virsh("start", name)


def test_a_chain_of_ten_starts(daemon: Daemon, daemon_lab: Lab) -> None:
    domain = daemon_lab.define(daemon_lab.disk())
    for number in range(9):
        create_snapshot(daemon_lab.conn, domain.name(), f"s{number}")
    (disk,) = xml.list_disks(xml_of(domain))
    assert len(disk.backing) == 9
    daemon.virsh("start", domain.name())
    assert daemon.virsh("domstate", domain.name()).strip() == "running"


def test_a_disk_given_as_a_volume(daemon_lab: Lab) -> None:
    lab = daemon_lab
    pool_xml = (
        f"<pool type='dir'><name>p{lab.folder.parent.name}</name><target><path>{lab.folder}</path></target></pool>"
    )
    create_image(lab.folder / "v.vmdk", MIB)
    pool = lab.conn.storagePoolCreateXML(pool_xml)
    try:
        extra = (
            "<disk type='volume' device='disk'><driver name='qemu' type='vmdk'/>"
            f"<source pool='{pool.name()}' volume='v.vmdk'/><target dev='vda' bus='virtio'/></disk>"
        )
        domain = lab.define(extra=extra)
        create_snapshot(lab.conn, domain.name(), "s1")
        (disk,) = xml.list_disks(xml_of(domain))
        assert (disk.path, disk.backing) == (lab.folder / "v-000001.vmdk", (lab.folder / "v.vmdk",))
        domain.create()
    finally:
        pool.destroy()


def test_a_saved_domain_is_refused(daemon_lab: Lab) -> None:
    lab = daemon_lab
    raw = lab.folder / "r.img"
    raw.write_bytes(bytes(MIB))
    driver = "<driver name='qemu' type='raw'/>"
    target = "<target dev='vdr' bus='virtio'/>"
    extra = f"<disk type='file' device='disk'>{driver}<source file='{raw}'/>{target}</disk>"
    domain = lab.define(extra=extra)
    domain.create()
    domain.managedSave()
    try:
        with pytest.raises(DomainError, match="has a saved state, which would resume on the frozen disks"):
            create_snapshot(lab.conn, domain.name())
    finally:
        domain.managedSaveRemove()


def test_the_command_alone_is_enough(daemon_lab: Lab) -> None:
    domain = daemon_lab.define(daemon_lab.disk())
    done = subprocess.run(
        [
            Path(sys.executable).with_name("qemu-vmdk-snap"),
            "snapshot",
            "create",
            "-c",
            daemon_lab.uri,
            domain.name(),
            "s1",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert domain.snapshotNum() == 1
