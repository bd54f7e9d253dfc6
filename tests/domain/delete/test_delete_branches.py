"""Deleting what several overlays are backed by: nothing is copied for one without data, little for the others."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.prune import Retention, prune
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.doctor.domain import check_domain
from qemu_vmdk_snap.domain.dry_run import plan_delete
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.domain.revert.run import revert
from tests.domain.delete.test_delete import chain_in_xml_fits, read, seen, tops, write
from tests.domain.lab import MIB, Lab

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


def fill(path: Path, size: int) -> None:
    """Store so many bytes in the image, beginning at its third MiB."""
    with open_chain(path, writable=True) as chain:
        chain.write_at(2 * MIB, b"data" * (size // 4))


@pytest.fixture
def domain(lab: Lab) -> libvirt.virDomain:
    """Return a domain whose base has 8 MiB of data, with the snapshot s1 of it."""
    domain = lab.define(lab.disk("a", size=16 * MIB))
    fill(lab.folder / "a.vmdk", 8 * MIB)
    create_snapshot(lab.conn, domain.name(), "s1")
    return domain


def costs(lab: Lab, domain: libvirt.virDomain, name: str) -> tuple[list[str], int]:
    """Return how each disk is dealt with and how many bytes that costs, by the plan, which the run then keeps to."""
    plan = plan_delete(lab.conn, domain.name(), name)
    before = seen(lab, domain)
    report = delete(lab.conn, domain.name(), name)
    assert report.deleted == plan.deleted
    del before[name]
    assert seen(lab, domain) == before
    chain_in_xml_fits(domain)
    assert [check for check in check_domain(lab.conn, domain.name()) if check.verdict == "bad"] == []
    works = plan.deleted[0].work
    return [work.mode for work in works], sum(work.cost for work in works)


def test_overlays_without_data_that_reverts_left_go_with_the_root(lab: Lab, domain: libvirt.virDomain) -> None:
    for _ in range(3):
        revert(lab.conn, domain.name(), "s1")
    write(domain, 1)
    assert len(list(lab.folder.glob("*.vmdk"))) == 5
    base, inode = lab.folder / "a.vmdk", (lab.folder / "a.vmdk").stat().st_ino
    modes, cost = costs(lab, domain, "s1")
    assert (modes, cost < MIB) == (["empty", "empty", "empty", "merge"], True)
    assert list(lab.folder.glob("*.vmdk")) == [base] == tops(domain)
    assert base.stat().st_ino == inode  # not copied


def test_an_empty_one_that_a_snapshot_has_takes_the_file_of_the_root(lab: Lab, domain: libvirt.virDomain) -> None:
    create_snapshot(lab.conn, domain.name(), "s2")  # of the overlay without data
    write(domain, 1)
    revert(lab.conn, domain.name(), "s1")
    write(domain, 2, grains=10)
    modes, cost = costs(lab, domain, "s1")
    assert (modes, cost < MIB) == (["merge"], True)
    assert not (lab.folder / "a-000001.vmdk").exists()


def test_what_a_revert_left_with_data_costs_the_base_once(lab: Lab, domain: libvirt.virDomain) -> None:
    write(domain, 1)
    revert(lab.conn, domain.name(), "s1")
    left, kept = lab.folder / "a-000001.vmdk", read(lab.folder / "a-000001.vmdk")
    write(domain, 2)
    modes, cost = costs(lab, domain, "s1")
    assert modes == ["merge"]
    assert 8 * MIB < cost < 10 * MIB
    assert read(left) == kept
    assert tops(domain) == [lab.folder / "a.vmdk"]
    with open_chain(left) as chain:
        assert chain.depth == 1  # what the guest writes to next is nobody's parent


def test_of_two_branches_one_takes_the_place_of_the_root(lab: Lab, domain: libvirt.virDomain) -> None:
    write(domain, 1)
    create_snapshot(lab.conn, domain.name(), "s2")
    write(domain, 2)
    revert(lab.conn, domain.name(), "s1")
    write(domain, 3)
    create_snapshot(lab.conn, domain.name(), "s3")
    write(domain, 4)
    modes, cost = costs(lab, domain, "s1")
    assert (modes, cost < MIB) == (["merge"], True)
    assert not list(lab.folder.glob(".*"))
    for name in ("s2", "s3"):
        costs(lab, domain, name)
    domain.create()
    domain.destroy()


def test_one_that_nobody_has_noted_is_not_dropped(lab: Lab, domain: libvirt.virDomain) -> None:
    """Empty or not: somebody has made it, and may be about to use it."""
    from qemu_vmdk_snap import create_overlay

    other = lab.folder / "clone.vmdk"
    create_overlay(other, lab.folder / "a.vmdk")
    before = read(other)
    write(domain, 1)
    costs(lab, domain, "s1")
    assert read(other) == before


def vanish(lab: Lab, domain: libvirt.virDomain) -> None:
    """Lose the folder of one disk of the snapshot, which the domain does not have any more."""
    import libvirt

    domain.detachDeviceFlags(
        f"<disk type='file'><source file='{tops(domain)[1]}'/><target dev='vdb' bus='virtio'/></disk>",
        libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )
    shutil.rmtree(lab.folder / "gone")


def stack_qcow2(lab: Lab, domain: libvirt.virDomain) -> None:
    """Let a qcow2 be backed by what the snapshot froze."""
    base = lab.folder / "b.vmdk"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "vmdk", lab.folder / "q.qcow2"], check=True
    )


BAD = {"vanished": vanish, "qcow2": stack_qcow2}


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("running", [False, True], ids=["shut off", "running"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_snapshot_holds_up_no_other(
    lab: Lab, capsys: pytest.CaptureFixture[str], kind: str, running: bool
) -> None:
    (lab.folder / "gone").mkdir()
    folder = lab.folder / "gone" if kind == "vanished" else lab.folder
    domain = lab.define(lab.disk("a"), lab.disk("b", folder))
    create_snapshot(lab.conn, domain.name(), "bad")
    BAD[kind](lab, domain)
    for number in range(3):
        write(domain, number + 1)
        create_snapshot(lab.conn, domain.name(), f"s{number}", disks=["vda"])
    before = read(tops(domain)[0])
    if running:
        domain.create()
    words = ["snapshot", "prune", "-c", lab.uri, domain.name(), "--keep-last=1"]
    status = main(words)
    out = capsys.readouterr().out
    names = [info.name for info in list_snapshots(lab.conn, domain.name())]
    if running:
        domain.destroy()
    assert read(tops(domain)[0]) == before
    assert ("s0" in names, "s1" in names, "s2" in names) == (False, False, True), out
    assert (status != 0) is ("bad" in names)


def test_a_disk_that_was_detached_goes_with_its_snapshot(lab: Lab) -> None:
    import libvirt

    domain = lab.define(lab.disk("a"), lab.disk("b"))
    create_snapshot(lab.conn, domain.name(), "s1")
    write(domain, 1)
    create_snapshot(lab.conn, domain.name(), "s2")
    domain.detachDeviceFlags(
        f"<disk type='file'><source file='{tops(domain)[1]}'/><target dev='vdb' bus='virtio'/></disk>",
        libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )
    write(domain, 2)
    before = seen(lab, domain)
    report = prune(lab.conn, domain.name(), Retention(last=1))
    assert (report.failed, [one.name for one in report.deleted]) == ((), ["s1"])
    del before["s1"]
    assert seen(lab, domain) == before
