"""Chains that VMware, or somebody by hand, has made become snapshots that virsh shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qemu_vmdk_snap import DomainError, FormatError, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.adopt import run as adoption
from qemu_vmdk_snap.domain.adopt.run import adopt
from qemu_vmdk_snap.domain.adopt.vmsd import read_vmsd
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from qemu_vmdk_snap.domain.registry import list_snapshots, tree_lines
from qemu_vmdk_snap.domain.revert.run import revert
from tests.domain.lab import Lab, contents, xml_of
from tests.domain.libvirtd import Daemon

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")

VMSD = """\
.encoding = "UTF-8"
snapshot.lastUID = "4"
snapshot.current = "2"
snapshot0.uid = "1"
snapshot0.filename = "vm-Snapshot1.vmsn"
snapshot0.displayName = "clean / install |22tä|22"
snapshot0.description = "line one|0Aline two"
snapshot0.createTimeHigh = "336475"
snapshot0.createTimeLow = "-1234567890"
snapshot0.numDisks = "1"
snapshot0.disk0.fileName = "a.vmdk"
snapshot0.disk0.node = "scsi0:0"
snapshot1.uid = "2"
snapshot1.filename = "vm-Snapshot2.vmsn"
snapshot1.parent = "1"
snapshot1.displayName = "patched"
snapshot1.createTimeHigh = "336480"
snapshot1.createTimeLow = "5"
snapshot1.numDisks = "1"
snapshot1.disk0.fileName = "a-000001.vmdk"
snapshot1.disk0.node = "scsi0:0"
snapshot2.uid = "3"
snapshot2.parent = "1"
snapshot2.displayName = "side branch"
snapshot2.createTimeHigh = "336481"
snapshot2.createTimeLow = "5"
snapshot2.disk0.fileName = "a-000003.vmdk"
snapshot3.uid = "4"
snapshot3.parent = "3"
snapshot3.displayName = "gone"
snapshot3.disk0.fileName = "a-000004.vmdk"
snapshot.numSnapshots = "4"
"""


def overlay(path: Path, base: Path, text: str) -> Path:
    create_overlay(path, base, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(4096, text.encode().ljust(512, b"."))
    return path


@pytest.fixture
def vmware(lab: Lab) -> libvirt.virDomain:
    """Return a domain on the tree a <- 1 <- 2 (active), a <- 3, which libvirt knows nothing of but the top."""
    base = lab.disk("a")
    first = overlay(lab.folder / "a-000001.vmdk", base, "one")
    top = overlay(lab.folder / "a-000002.vmdk", first, "two")
    overlay(lab.folder / "a-000003.vmdk", base, "three")
    return lab.define(top)


def seen(domain: libvirt.virDomain) -> set[str]:
    """Return which link's mark the active disk shows."""
    (disk,) = xml.list_disks(xml_of(domain))
    assert disk.path is not None
    with open_chain(disk.path) as chain:
        return {chain.read_at(4096, 512).decode().rstrip(".")}


def tree(lab: Lab, domain: libvirt.virDomain) -> list[str]:
    return [line for line in tree_lines(list_snapshots(lab.conn, domain.name())) if line.strip(" |")]


def test_a_dictionary_of_vmwares_is_read(tmp_path: Path) -> None:
    path = tmp_path / "vm.vmsd"
    path.write_text(VMSD)
    vmsd = read_vmsd(path)
    first, second, third, fourth = vmsd.snapshots
    assert (first.name, first.description, first.parent) == ('clean / install "tä"', "line one\nline two", None)
    assert first.creation_time == ((336475 << 32) + (-1234567890 & 0xFFFFFFFF)) // 1_000_000
    assert (second.parent, third.parent, fourth.parent, vmsd.current) == ("1", "1", "3", "2")
    assert first.files == (tmp_path / "a.vmdk",)
    assert fourth.creation_time is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must be lines like"),
        ("KDMV\0\0", "must be lines like"),
        (
            'snapshot0.uid = "1"\nsnapshot0.parent = "2"\nsnapshot1.uid = "2"\nsnapshot1.parent = "1"\n',
            "must not lead back to the snapshot itself",
        ),
    ],
)
def test_what_is_no_dictionary_is_refused(tmp_path: Path, text: str, rule: str) -> None:
    (tmp_path / "vm.vmsd").write_text(text)
    with pytest.raises(FormatError, match=rule):
        read_vmsd(tmp_path / "vm.vmsd")


def test_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "vm.vmsd"
    path.write_bytes(b'.encoding = "windows-1252"\nsnapshot0.uid = "1"\nsnapshot0.displayName = "\xe4"\n')
    assert read_vmsd(path).snapshots[0].name == "ä"


def test_vmwares_snapshots_are_registered_with_names_dates_and_parents(
    lab: Lab, vmware: libvirt.virDomain, capsys: pytest.CaptureFixture[str]
) -> None:
    (lab.folder / "vm.vmsd").write_text(VMSD)
    before = contents(lab.folder)
    assert main(["snapshot", "adopt", "-c", lab.uri, vmware.name(), "--dry-run", "--output=json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["adopted"]) == 3
    assert vmware.snapshotNum() == 0
    assert contents(lab.folder) == before

    assert main(["snapshot", "adopt", "-c", lab.uri, vmware.name()]) == 0
    printed = capsys.readouterr()
    assert "snapshot 'gone' of " in printed.err
    assert "a-000004.vmdk: No such file or directory" in printed.err
    root = 'clean - install "tä"'
    assert tree(lab, vmware) == [root, "  +- patched", "  +- side branch"]
    found = {info.name: info for info in list_snapshots(lab.conn, vmware.name())}
    assert found["patched"].current
    assert found[root].creation_time == ((336475 << 32) + (-1234567890 & 0xFFFFFFFF)) // 1_000_000
    assert found[root].description == "line one\nline two"
    disks = {name: (str(disk.frozen), str(disk.overlay)) for name, info in found.items() for disk in info.disks}
    path = f"{lab.folder}/a"
    assert disks == {
        root: (f"{path}.vmdk", f"{path}-000001.vmdk"),
        "patched": (f"{path}-000001.vmdk", f"{path}-000002.vmdk"),
        "side branch": (f"{path}-000003.vmdk", f"{path}-000004.vmdk"),
    }
    assert [disk.problem for info in found.values() for disk in info.disks] == [None] * 3
    after = contents(lab.folder)
    assert set(after) - set(before) == {f"{path}-000004.vmdk"}  # the side branch had no top any more
    assert {name: after[name] for name in before} == before


def test_again_there_is_nothing_to_adopt(
    lab: Lab, vmware: libvirt.virDomain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(adopt(lab.conn, vmware.name()).adopted) == 2
    before = contents(lab.folder), xml_of(vmware), tree(lab, vmware)
    assert main(["snapshot", "adopt", "-c", lab.uri, vmware.name()]) == 0
    assert capsys.readouterr().out == "Nothing to adopt.\n"
    assert (contents(lab.folder), xml_of(vmware), tree(lab, vmware)) == before


def test_a_chain_made_by_hand_starts_afterwards_and_takes_snapshots(lab: Lab, vmware: libvirt.virDomain) -> None:
    import libvirt

    with pytest.raises(libvirt.libvirtError, match="was not specified in the image metadata"):
        vmware.create()
    report = adopt(lab.conn, vmware.name())
    assert [(one.name, one.parent) for one in report.adopted] == [("a", None), ("a-000001", "a")]
    assert report.spelt_out == ("vda",)
    vmware.create()
    vmware.destroy()
    create_snapshot(lab.conn, vmware.name(), "ours")
    assert tree(lab, vmware) == ["a", "  +- a-000001", "      +- ours"]


def test_ours_on_top_of_theirs_gets_its_parent(lab: Lab, vmware: libvirt.virDomain) -> None:
    create_snapshot(lab.conn, vmware.name(), "ours")
    create_snapshot(lab.conn, vmware.name(), "ours too")
    assert tree(lab, vmware) == ["ours", "  +- ours too"]
    adopt(lab.conn, vmware.name())
    assert tree(lab, vmware) == ["a", "  +- a-000001", "      +- ours", "          +- ours too"]
    assert vmware.snapshotCurrent().getName() == "ours too"


def test_disks_of_several_heights(lab: Lab) -> None:
    a, b = lab.disk("a"), lab.disk("b")
    a1 = overlay(lab.folder / "a-000001.vmdk", a, "one")
    a2 = overlay(lab.folder / "a-000002.vmdk", a1, "two")
    b1 = overlay(lab.folder / "b-000001.vmdk", b, "one")
    domain = lab.define(a2, b1)
    report = adopt(lab.conn, domain.name())
    assert [dict(one.frozen) for one in report.adopted] == [{"vda": a, "vdb": b}, {"vda": a1}]
    parsed = xml.parse_snapshot(domain.snapshotLookupByName("a-000001").getXMLDesc(0))
    assert [(disk.target, disk.mode, disk.frozen) for disk in parsed.disks] == [
        ("vda", "external", a1),
        ("vdb", "no", b1),
    ]


def test_what_was_adopted_can_be_reverted_to_and_deleted(lab: Lab, vmware: libvirt.virDomain) -> None:
    (lab.folder / "vm.vmsd").write_text(VMSD)
    adopt(lab.conn, vmware.name())
    assert seen(vmware) == {"two"}
    revert(lab.conn, vmware.name(), "side branch")
    assert seen(vmware) == {"three"}
    revert(lab.conn, vmware.name(), "patched")
    assert seen(vmware) == {"one"}
    delete(lab.conn, vmware.name(), ["side branch"])
    delete(lab.conn, vmware.name(), ['clean - install "tä"'])
    assert tree(lab, vmware) == ["patched"]
    assert seen(vmware) == {"one"}
    (patched,) = list_snapshots(lab.conn, vmware.name())
    assert [disk.problem for disk in patched.disks] == [None]
    vmware.create()


def test_a_running_domain_is_adopted_and_runs_on(lab: Lab) -> None:
    top = overlay(lab.folder / "a-000001.vmdk", lab.disk("a"), "one")
    domain = lab.define(top)
    domain.create()
    adopt(lab.conn, domain.name())
    assert domain.isActive()
    assert tree(lab, domain) == ["a"]
    create_snapshot(lab.conn, domain.name(), "live")
    assert tree(lab, domain) == ["a", "  +- live"]


def test_stopped_in_the_middle_it_goes_on_the_next_time(
    lab: Lab, vmware: libvirt.virDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = adoption._register, []

    def register_one(*args: Any, **words: Any) -> None:  # noqa: ANN401
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        real(*args, **words)

    monkeypatch.setattr(adoption, "_register", register_one)
    with pytest.raises(KeyboardInterrupt):
        adopt(lab.conn, vmware.name())
    monkeypatch.undo()
    assert tree(lab, vmware) == ["a"]
    report = adopt(lab.conn, vmware.name())
    assert [one.name for one in report.adopted] == ["a-000001"]
    assert tree(lab, vmware) == ["a", "  +- a-000001"]
    assert vmware.snapshotCurrent().getName() == "a-000001"


def test_a_broken_chain_is_not_adopted(lab: Lab, vmware: libvirt.virDomain) -> None:
    (lab.folder / "a.vmdk").rename(lab.folder / "away.vmdk")
    before = xml_of(vmware)
    assert main(["snapshot", "adopt", "-c", lab.uri, vmware.name()]) == 66
    assert (vmware.snapshotNum(), xml_of(vmware)) == (0, before)


def test_without_vmdk_disks_there_is_nothing_to_adopt(lab: Lab) -> None:
    with pytest.raises(DomainError, match="has no VMDK disk"):
        adopt(lab.conn, lab.define().name())


def test_virsh_shows_the_tree_and_starts_the_domain(daemon: Daemon, daemon_lab: Lab) -> None:
    lab = daemon_lab
    first = overlay(lab.folder / "a-000001.vmdk", lab.disk("a"), "one")
    second = overlay(lab.folder / "a-000002.vmdk", first, "two")
    top = overlay(lab.folder / "a-000005.vmdk", second, "three")
    (lab.folder / "vm.vmsd").write_text(VMSD)
    domain = lab.define(top)
    adopt(lab.conn, domain.name())
    shown = daemon.virsh("snapshot-list", domain.name(), "--tree").splitlines()
    assert [line.strip() for line in shown if "+-" in line or line[:1].strip()] == [
        'clean - install "tä"',
        "+- patched",
    ]
    assert daemon.virsh("snapshot-current", domain.name(), "--name").strip() == "patched"
    daemon.virsh("start", domain.name())
