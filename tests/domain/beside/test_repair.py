"""`doctor --repair`: what virsh and commands by hand have damaged is named and put right; all disks read as before."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qemu_vmdk_snap import commit, create_overlay, open_chain, remove
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from qemu_vmdk_snap.domain.qemu.unused import unused_nodes
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.xml.form import in_form
from qemu_vmdk_snap.domain.xml.kept import kept_branches, with_kept_branches
from qemu_vmdk_snap.domain.xml.respell import with_chains
from tests.domain.beside.test_registration import unform
from tests.domain.lab import Lab, contents, xml_of
from tests.domain.libvirtd import Daemon

pytestmark = pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64")

GRAIN = 64 * 1024


class Case:
    """A domain with snapshots s1 to s3, each with a grain of its own, and what every state of the disk reads as."""

    def __init__(self, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
        self.lab, self.capsys = lab, capsys
        self.domain = lab.define(lab.disk("a"))
        self.name: str = self.domain.name()
        for number in (1, 2, 3):
            create_snapshot(lab.conn, self.name, f"s{number}")
            with open_chain(self.file(number), writable=True) as chain:
                chain.write_at(number * GRAIN, f"run {number}".encode().ljust(512))
        self.states = [self.read(self.file(number)) for number in range(4)]

    def file(self, number: int) -> Path:
        return self.lab.folder / ("a.vmdk" if not number else f"a-{number:06d}.vmdk")

    def read(self, path: Path) -> bytes:
        with open_chain(path, lock=False) as chain:
            return chain.read_at(0, chain.capacity)

    def top(self) -> xml.Disk:
        (disk,) = xml.list_disks(xml_of(self.domain))
        return disk

    def doctor(self, *options: str) -> tuple[int, dict[str, Any]]:
        status = main(["doctor", "-c", self.lab.uri, self.name, "--output=json", *options])
        return status, json.loads(self.capsys.readouterr().out)

    def bad(self) -> dict[str, dict[str, str]]:
        return {one["subject"]: one for one in self.doctor()[1]["checks"] if one["verdict"] == "bad"}

    def repair(self) -> list[str]:
        status, answer = self.doctor("--repair")
        assert status == 0, answer
        repaired: list[str] = answer["repaired"]
        assert self.doctor("--repair")[1]["repaired"] == []
        return repaired


@pytest.fixture
def case(lab: Lab, capsys: pytest.CaptureFixture[str]) -> Case:
    return Case(lab, capsys)


def virsh(lab: Lab, *words: str) -> int:
    done = subprocess.run(["virsh", "-c", lab.uri, *words], capture_output=True, text=True, check=False, timeout=100)
    return done.returncode


@pytest.mark.parametrize("running", [False, True])
def test_a_delete_by_virsh_in_the_middle(daemon_lab: Lab, capsys: pytest.CaptureFixture[str], running: bool) -> None:
    """Of a snapshot in the form of before: QEMU merges it, and aborts; CIDs do not fit any more."""
    case = Case(daemon_lab, capsys)
    for name in ("s1", "s2", "s3"):
        unform(case.domain, name)
    if running:
        case.domain.create()
    assert virsh(case.lab, "snapshot-delete", case.name, "s2")
    wait_for(lambda: not case.domain.isActive())  # its QEMU has crashed
    bad = case.bad()
    assert {"disk vda", "snapshot s2", "snapshot s3"} <= set(bad)
    assert bad["disk vda"]["remedy"] == f"`doctor {case.name} --repair` does it"
    before = contents(case.lab.folder)
    done = case.repair()
    changed = "so was what snapshot 's2' reads"
    assert f"{case.file(2)} is relinked to {case.file(1)}, which was changed: {changed}" in done
    assert case.file(1).exists()
    assert {path for path, digest in contents(case.lab.folder).items() if before.get(path) != digest} == {
        str(case.file(2))
    }
    # All but the one that was to be deleted read what they read.
    assert [case.read(case.file(number)) for number in (0, 2, 3)] == [case.states[number] for number in (0, 2, 3)]
    for text in [one.getXMLDesc(0) for one in case.domain.listAllSnapshots()]:
        assert in_form(text) == text
    case.domain.create()


def test_a_parent_that_a_guest_writes_is_not_relinked(case: Case) -> None:
    """What the overlay reads would be a mixture; the user must say which of the two is to stay."""
    text = xml_of(case.domain)
    case.lab.conn.defineXML(xml.stack(text, {}).replace(str(case.file(3)), str(case.file(1))))
    with open_chain(case.file(1), writable=True) as chain:
        chain.write_at(0, b"written by a guest")
    before = contents(case.lab.folder)
    _, answer = case.doctor("--repair")
    assert contents(case.lab.folder) == before
    (found,) = (one for one in answer["checks"] if one["subject"] == "snapshot s3")
    assert f"{case.file(1)} is a top of domain {case.name}: give that another top first" in found["text"]


@pytest.mark.parametrize("stopped", [False, True])
def test_the_live_xml_defined_after_a_live_snapshot(case: Case, stopped: bool) -> None:
    case.domain.create()
    create_snapshot(case.lab.conn, case.name, "live")
    right = xml_of(case.domain)
    case.lab.conn.defineXML(case.domain.XMLDesc(0))
    assert case.top().path == case.file(3)
    if stopped:
        case.domain.destroy()
    (found,) = (one for one in case.doctor()[1]["checks"] if one["verdict"] == "bad" and one["subject"] == "disk vda")
    if not stopped:
        assert f"the persistent XML names {case.file(3)}, but QEMU writes to {case.file(4)}" in found["text"]
    assert f"`doctor {case.name} --repair`" in found["remedy"]
    case.repair()
    assert (case.top().path, case.top().backing) == (case.file(4), tuple(case.file(n) for n in (3, 2, 1, 0)))
    assert xml.list_disks(xml_of(case.domain)) == xml.list_disks(right)


def test_a_disk_that_was_exchanged_in_the_xml_alone_is_left_so(case: Case) -> None:
    """An administrator gave the domain another disk from the next start on; or an overlay, which is another matter."""
    case.domain.create()
    other = case.lab.disk("other")
    before = xml_of(case.domain)
    case.lab.conn.defineXML(with_chains(before, {"vda": [other]}))
    found = [one for one in case.doctor("--repair")[1]["checks"] if "the next start takes" in one["text"]]
    assert [one["verdict"] for one in found] == ["note"]
    assert case.top().path == other
    above = case.lab.folder / "above.vmdk"
    case.lab.conn.defineXML(before)
    case.domain.destroy()
    create_overlay(above, case.file(3))
    case.domain.create()
    case.lab.conn.defineXML(with_chains(before, {"vda": [above, *(case.file(number) for number in (3, 2, 1, 0))]}))
    assert f"the running guest writes to {case.file(3)}, which backs {above}" in case.bad()["disk vda"]["text"]


def test_a_top_that_cannot_be_told_is_left_to_the_user(case: Case) -> None:
    """Two branches on the file: which of them the disk has continued in is not known."""
    create_snapshot(case.lab.conn, case.name, "s4")
    revert(case.lab.conn, case.name, "s3")
    text = with_kept_branches(xml_of(case.domain), {})
    case.lab.conn.defineXML(with_chains(text, {"vda": [case.file(number) for number in (2, 1, 0)]}))
    before = xml_of(case.domain)
    case.doctor("--repair")
    assert case.top().path == case.file(2)
    assert xml_of(case.domain) == before


def test_xml_that_is_stale_after_a_remove_by_hand(case: Case) -> None:
    remove(case.file(2))
    bad = case.bad()
    assert "its XML spells out" in bad["disk vda"]["text"]
    case.doctor("--repair")
    assert (case.top().path, case.top().backing) == (case.file(3), (case.file(1), case.file(0)))
    assert case.read(case.file(3)) == case.states[3]
    # Its frozen file is gone, and the one remedy is said.
    (lost,) = case.bad().values()
    assert lost["subject"] == "snapshot s3"
    assert lost["remedy"] is not None
    assert f"`snapshot delete --metadata {case.name} s3` forgets it" in lost["remedy"]
    assert main(["snapshot", "delete", "-c", case.lab.uri, case.name, "s3", "--metadata"]) == 0
    case.capsys.readouterr()
    assert case.bad() == {}
    case.domain.create()


def test_a_top_that_was_merged_by_hand(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    domain = lab.define(lab.disk("a"))
    create_snapshot(lab.conn, domain.name(), "s1")
    create_snapshot(lab.conn, domain.name(), "s2")
    top, middle = lab.folder / "a-000002.vmdk", lab.folder / "a-000001.vmdk"
    domain.snapshotLookupByName("s2").delete(2)  # the metadata alone
    with open_chain(top, writable=True) as chain:
        chain.write_at(0, b"newest")
        wanted = chain.read_at(0, chain.capacity)
    commit(top, delete=True, trusted_dirs=[lab.folder])
    assert not top.exists()
    assert main(["doctor", "-c", lab.uri, domain.name()]) == 1
    assert f"its top {top} is gone, and {middle} below it is there" in capsys.readouterr().out
    assert main(["doctor", "-c", lab.uri, domain.name(), "--repair"]) == 0
    (disk,) = xml.list_disks(xml_of(domain))
    assert (disk.path, disk.backing, disk.closed) == (middle, (lab.folder / "a.vmdk",), True)
    with open_chain(middle) as chain:
        assert chain.read_at(0, chain.capacity) == wanted
    domain.create()


@pytest.mark.needs("qemu-img", "qemu-io")
def test_a_qcow2_top_that_libvirts_own_revert_has_left(case: Case) -> None:
    """libvirt 11.3 puts a qcow2 overlay on the frozen file, and deletes the active overlays."""
    top = case.lab.folder / "a.1700000000"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(case.file(1)), "-F", "vmdk", str(top)]
    subprocess.run(words, check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 70000 3000", str(top)], check=True, capture_output=True)
    for number in (2, 3):
        case.file(number).unlink()
    text = xml_of(case.domain)
    start, end = text.index("<driver name='qemu' type='vmdk'/>"), text.index("<target dev='vda'")
    named = f"<driver name='qemu' type='qcow2'/><source file='{top}'/>"
    case.lab.conn.defineXML(text[:start] + named + text[end:])
    for name in ("s3",):
        case.domain.snapshotLookupByName(name).delete(2)
    found = case.bad()["disk vda"]["text"]
    assert f"it has the format qcow2, not vmdk, though its top {top} is backed by the VMDK {case.file(1)}" in found
    assert "is what snapshot 's2' froze, so libvirt may have reverted to that" in found
    case.doctor("--repair")
    assert case.bad() == {}
    disk = case.top()
    assert (disk.refusal, disk.backing, top.exists()) == (None, (case.file(1), case.file(0)), False)
    assert disk.path is not None
    expected = bytearray(case.states[1])
    expected[70000:73000] = bytes([7]) * 3000
    assert case.read(disk.path) == bytes(expected)
    create_snapshot(case.lab.conn, case.name, "next")
    case.domain.create()


@pytest.mark.needs("qemu-img")
def test_a_revert_by_virsh(daemon_lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a snapshot in the form of before: libvirt refuses it until 9.9, and later deletes the active overlays."""
    case = Case(daemon_lab, capsys)
    for name in ("s1", "s2", "s3"):
        unform(case.domain, name)
    refused = virsh(case.lab, "snapshot-revert", case.name, "s2")
    assert bool(refused) is (daemon_lab.conn.getLibVersion() < 9_009_000)
    if not refused:
        assert "is what snapshot 's2' froze, so libvirt may have reverted to that" in case.bad()["disk vda"]["text"]
    case.doctor("--repair")
    disk = case.top()
    assert disk.refusal is None
    assert disk.path is not None
    assert case.read(disk.path) == case.states[3 if refused else 1]
    create_snapshot(case.lab.conn, case.name, "next")
    case.domain.create()


@pytest.mark.parametrize("how", ["repair", "recover", "create"])
def test_nodes_of_a_detached_disk_are_closed(
    how: str, daemon: Daemon, daemon_lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = daemon_lab
    second = lab.disk("b")
    controller = "<controller type='scsi' model='virtio-scsi'/>"
    source = f"<driver name='qemu' type='vmdk'/><source file='{second}'/>"
    disk = f"<disk type='file'>{source}<target dev='sda' bus='scsi'/></disk>"
    domain = lab.define(lab.disk("a"), extra=controller + disk)
    domain.create()
    create_snapshot(lab.conn, domain.name(), "s1")
    daemon.virsh("detach-disk", domain.name(), "sda", "--live")
    wait_for(lambda: unused_nodes(Monitor(domain).edges()))
    assert main(["doctor", "-c", lab.uri, domain.name()]) == 1
    assert "nodes of a detached disk open" in capsys.readouterr().out
    words = {
        "repair": ["doctor", domain.name(), "--repair"],
        "recover": ["recover", "--domain", domain.name()],
        "create": ["snapshot", "create", domain.name(), "s2", "--diskspec", "sda,snapshot=no"],
    }[how]
    assert main([*words, "-c", lab.uri]) == 0
    assert unused_nodes(Monitor(domain).edges()) == []
    assert not [node for node in Monitor(domain).graph().nodes.values() if str(second) in node.file]
    with open_chain(lab.folder / "b-000001.vmdk", writable=True):
        pass  # nobody has it locked


def test_that_the_live_xml_is_stale_is_said_once(case: Case) -> None:
    case.domain.create()
    words = ["snapshot", "create", "-c", case.lab.uri, case.name]
    said = []
    for name in ("l1", "l2"):
        assert main([*words, name]) == 0
        said.append("libvirt's live XML names the files of before" in case.capsys.readouterr().out)
    case.domain.destroy()
    case.domain.create()
    assert create_snapshot(case.lab.conn, case.name, "l3").live_xml_stale
    assert said == [True, False]


def wait_for(look: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_copy_of_the_xml_is_told_from_its_original(case: Case) -> None:
    """Metadata is copied with the XML: what reverts have kept is the original's."""
    revert(case.lab.conn, case.name, "s1")
    create_snapshot(case.lab.conn, case.name, "s4")
    revert(case.lab.conn, case.name, "s1")
    kept = kept_branches(xml_of(case.domain))
    assert kept
    copy = case.lab.define(case.lab.disk("copy"))
    case.lab.conn.defineXML(with_kept_branches(xml_of(copy), kept))
    original = case.name
    case.name = copy.name()
    answer = case.doctor()[1]
    told = [one["text"] for one in answer["checks"] if one["subject"].startswith("kept ")]
    assert told
    assert all("of the domain that this one was copied from" in text for text in told)
    assert answer["good"]
    # Two domains with one top would write into one file.
    top = next(one.path for one in xml.list_disks(xml_of(case.lab.conn.lookupByName(original))))
    case.lab.conn.defineXML(xml_of(copy).replace(str(case.lab.folder / "copy.vmdk"), str(top)))
    assert f"is the disk vda of domain {original} too, and both write to it" in json.dumps(case.bad())


def test_a_linked_clone_is_told_from_its_original(case: Case) -> None:
    clone = case.lab.folder / "clone.vmdk"
    create_overlay(clone, case.file(0))
    original, case.name = case.name, case.lab.define(clone).name()
    (found,) = (one for one in case.doctor()[1]["checks"] if one["subject"] == "disk vda")
    assert found["verdict"] == "good"
    assert found["text"].endswith(f"it is a clone: {case.file(0)} is what snapshot s1 of domain {original} froze")
    case.name = original
    assert case.bad() == {}
