"""The form in which snapshots are registered: libvirt's own delete and revert refuse it, all else works with it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import create_image
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.edit import describe, rename
from qemu_vmdk_snap.domain.registry import snapshot_info
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.state import inactive_xml
from qemu_vmdk_snap.domain.xml.form import in_form
from tests.domain.lab import MIB, Lab, contents
from tests.domain.libvirtd import Daemon

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64")


def refused(daemon: Daemon, *words: str) -> bool:
    done = subprocess.run(["virsh", "-c", daemon.uri, *words], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode != 0


def texts(domain: libvirt.virDomain) -> dict[str, str]:
    return {one.getName(): one.getXMLDesc(0) for one in domain.listAllSnapshots()}


def unform(domain: libvirt.virDomain, name: str) -> None:
    """Register a snapshot as versions before have registered it."""
    import libvirt

    text = domain.snapshotLookupByName(name).getXMLDesc(0)
    plain = text.replace("/.'/>", "'/>").replace("type='block'", "type='file'").replace("source dev=", "source file=")
    assert plain != text
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    if domain.snapshotCurrent().getName() == name:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    domain.snapshotCreateXML(plain, flags)
    assert domain.snapshotLookupByName(name).getXMLDesc(0) == plain


def test_virsh_neither_deletes_nor_reverts_and_nothing_changes(daemon: Daemon, daemon_lab: Lab) -> None:
    lab = daemon_lab
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    name = domain.name()
    for snapshot in ("s1", "s2", "s3"):
        create_snapshot(lab.conn, name, snapshot)
    files, persistent, snapshots = contents(lab.folder), inactive_xml(domain), texts(domain)
    for running in (False, True):
        if running:
            domain.create()
        for snapshot in snapshots:  # the oldest, one in the middle, the newest
            assert refused(daemon, "snapshot-delete", name, snapshot)
            assert refused(daemon, "snapshot-delete", name, snapshot, "--children")
            assert refused(daemon, "snapshot-revert", name, snapshot)
            assert refused(daemon, "snapshot-revert", name, snapshot, "--force")
        assert bool(domain.isActive()) is running
    domain.destroy()
    assert (contents(lab.folder), inactive_xml(domain), texts(domain)) == (files, persistent, snapshots)


def test_what_virsh_may_do_works(daemon: Daemon, daemon_lab: Lab) -> None:
    lab = daemon_lab
    domain = lab.define(lab.disk("a"))
    name = domain.name()
    for snapshot in ("s1", "s2", "s3"):
        create_snapshot(lab.conn, name, snapshot)
    files = contents(lab.folder)
    tree = [line.strip() for line in daemon.virsh("snapshot-list", name, "--tree").split("\n") if line.strip()]
    assert tree == ["s1", "|", "+- s2", "|", "+- s3"]
    assert "external" in daemon.virsh("snapshot-info", name, "s2")
    before = texts(domain)["s3"]
    daemon.virsh("snapshot-delete", name, "s2", "--metadata")
    # Of the forms that are not refused, libvirt 9.0 writes the files of s2 into the XML of s3.
    assert texts(domain)["s3"] == before.replace("<name>s2</name>", "<name>s1</name>")
    assert contents(lab.folder) == files


def test_our_own_commands_work_with_it(lab: Lab) -> None:
    domain = lab.define(lab.disk("a"))
    name = domain.name()
    for snapshot in ("s1", "s2"):
        create_snapshot(lab.conn, name, snapshot)
    rename(lab.conn, name, "s2", "renamed")
    describe(lab.conn, name, "renamed", "a description")
    (disk,) = snapshot_info(lab.conn, name, "renamed").disks
    assert (disk.frozen, disk.overlay) == (lab.folder / "a-000001.vmdk", lab.folder / "a-000002.vmdk")
    assert (disk.depth, disk.missing, disk.problem) == (2, (), None)
    revert(lab.conn, name, "s1")
    (top,) = xml.list_disks(inactive_xml(domain))
    assert (top.refusal, top.backing) == (None, (lab.folder / "a.vmdk",))
    assert "type='block'" not in inactive_xml(domain)
    delete(lab.conn, name, "renamed")
    delete(lab.conn, name, "s1")
    assert main(["doctor", "-c", lab.uri, name]) == 0
    domain.create()
    for text in texts(domain).values():
        assert in_form(text) == text


def test_an_older_registration_is_put_right_by_the_next_command(lab: Lab) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    name = domain.name()
    for snapshot in ("s1", "s2", "s3"):
        create_snapshot(lab.conn, name, snapshot)
    wanted = texts(domain)
    for snapshot in wanted:
        unform(domain, snapshot)
    describe(lab.conn, name, "s1", None)
    assert texts(domain) == wanted
    assert domain.snapshotCurrent().getName() == "s3"


def test_a_volume_is_registered_as_its_file(daemon_lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab = daemon_lab
    create_image(lab.folder / "v.vmdk", MIB)
    target = f"<target><path>{lab.folder}</path></target>"
    pool = lab.conn.storagePoolDefineXML(f"<pool type='dir'><name>px</name>{target}</pool>")
    pool.create()
    try:
        extra = (
            "<disk type='volume' device='disk'><driver name='qemu' type='vmdk'/>"
            "<source pool='px' volume='v.vmdk'/><target dev='vda' bus='virtio'/></disk>"
        )
        domain = lab.define(extra=extra)
        create_snapshot(lab.conn, domain.name(), "s1")
        (text,) = texts(domain).values()
        assert f"<source dev='{lab.folder}/v.vmdk'/>" in text
        pool.destroy()
        (disk,) = snapshot_info(lab.conn, domain.name(), "s1").disks
        assert (disk.frozen, disk.problem) == (lab.folder / "v.vmdk", None)
        assert main(["doctor", "-c", lab.uri, domain.name()]) == 0
        said = capsys.readouterr().out
        assert "[good] snapshot s1: 1 disk\n" in said
        assert f"[good] disk vda: {lab.folder}/v-000001.vmdk: chain of 2, sound" in said
        revert(lab.conn, domain.name(), "s1")
        domain.create()
    finally:
        if pool.isActive():
            pool.destroy()
        pool.undefine()


FOREIGN = (
    "<domainsnapshot><disks><disk name='vda' snapshot='external' type='file'><driver type='qcow2'/>"
    "<source file='/img/a.s1'/></disk></disks><domain><devices><disk type='file'><source file='/img/a.vmdk'/>"
    "<target dev='vda'/></disk></devices></domain></domainsnapshot>"
)


def test_what_virsh_has_made_is_left_as_it_is() -> None:
    assert in_form(FOREIGN) == FOREIGN


@pytest.mark.parametrize("root", ["domain", "inactiveDomain"])
def test_the_form_is_put_on_once_and_taken_off(root: str) -> None:
    ours = FOREIGN.replace("qcow2", "vmdk").replace("<domain>", f"<{root}>").replace("</domain>", f"</{root}>")
    text = in_form(ours)
    assert '<source file="/img/a.s1/." />' in text
    assert '<source dev="/img/a.vmdk" />' in text
    assert in_form(text) == text
    assert xml.parse_snapshot(text).disks[0].overlay == Path("/img/a.s1")
    (disk,) = xml.list_disks(xml.domain_of(text))
    assert disk.path == Path("/img/a.vmdk")
    assert "block" not in xml.domain_of(text)
