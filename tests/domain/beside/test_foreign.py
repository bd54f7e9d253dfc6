"""Snapshots that virsh made: shown as such, never reported as deleted, and what is below them stays."""

from __future__ import annotations

import json
import subprocess

import pytest

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create.run import create_snapshot
from tests.domain.lab import Lab, contents
from tests.domain.libvirtd import Daemon
from tests.support.schemas import check

pytestmark = pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64", "qemu-img")


def test_an_external_one_on_a_vmdk_disk(daemon: Daemon, daemon_lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab = daemon_lab
    domain = lab.define(lab.disk("a"))
    name = domain.name()
    create_snapshot(lab.conn, name, "s1")
    daemon.virsh("snapshot-create-as", name, "v1", "--disk-only")

    def ours(*words: str) -> tuple[int, str, str]:
        status = main([*words, "-c", lab.uri])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    overlay = lab.folder / "a-000001.v1"
    assert overlay.exists()
    rows = [line.split("  ")[-1].strip() for line in ours("snapshot", "list", name)[1].splitlines()]
    assert (rows[0], rows[-1]) == ("Foreign", "qcow2 overlays")
    assert "Foreign:     qcow2 overlays" in ours("snapshot", "info", name, "v1")[1]
    shown = check("snapshot list", ours("snapshot", "list", name, "--output=json")[1])
    assert [one["foreign"] for one in shown] == [None, "qcow2 overlays"]
    status, said, _ = ours("doctor", name)
    assert status == 0
    assert f"its top {overlay} is backed by the VMDK {lab.folder}/a-000001.vmdk" in said
    assert "(chain of 3); virsh made it for a snapshot" in said
    before = contents(lab.folder)
    for words in (["delete", name, "v1"], ["delete", name, "v1", "--dry-run"]):
        status, _, error = ours("snapshot", *words)
        assert status == 69
        assert "snapshot 'v1' was not made here (qcow2 overlays): `virsh snapshot-delete` deletes it" in error
    status, _, error = ours("snapshot", "delete", name, "s1", "--children")
    assert (status, "snapshot 'v1' was not made here" in error) == (69, True)
    status, said, _ = ours("snapshot", "prune", name, "--keep-last=1", "--output=json")
    kept = {one["name"]: one["kept-by"] for one in json.loads(said)["snapshots"]}
    assert (status, kept) == (0, {"s1": ["last"], "v1": ["was not made here (qcow2 overlays)"]})
    assert contents(lab.folder) == before  # s1 is below what virsh made
    assert daemon.virsh("snapshot-list", name, "--name").split() == ["s1", "v1"]
    # Going back to it is going back to the VMDK below it.
    with open_chain(lab.folder / "a-000001.vmdk") as chain:
        frozen = chain.read_at(0, chain.capacity)
    assert ours("snapshot", "revert", name, "v1")[0] == 0
    with open_chain(lab.folder / "a-000002.vmdk") as chain:
        assert chain.read_at(0, chain.capacity) == frozen


def test_an_internal_one_is_not_reported_as_deleted(
    daemon: Daemon, daemon_lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = daemon_lab
    image = lab.folder / "q.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "4M"], check=True)
    source = f"<driver name='qemu' type='qcow2'/><source file='{image}'/>"
    domain = lab.define(extra=f"<disk type='file'>{source}<target dev='vdq' bus='virtio'/></disk>")
    daemon.virsh("snapshot-create-as", domain.name(), "i1")
    assert main(["snapshot", "list", domain.name(), "-c", lab.uri, "--output=json"]) == 0
    assert [one["foreign"] for one in json.loads(capsys.readouterr().out)] == ["internal"]
    assert main(["snapshot", "delete", domain.name(), "i1", "-c", lab.uri]) == 69
    assert "snapshot 'i1' was not made here (internal)" in capsys.readouterr().err
    assert daemon.virsh("snapshot-list", domain.name(), "--name").split() == ["i1"]
    said = subprocess.run(["qemu-img", "snapshot", "-l", str(image)], capture_output=True, text=True, check=True)
    assert "i1" in said.stdout
    daemon.virsh("snapshot-delete", domain.name(), "i1")
