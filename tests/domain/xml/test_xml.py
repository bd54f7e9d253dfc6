from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from qemu_vmdk_snap.domain import xml

DOMAIN = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>d&amp;1</name>
  <metadata>
    <app:x xmlns:app="urn:a" xmlns:unused="urn:u">
      <app:disk z="ä"/>
    </app:x>
  </metadata>
  <!-- kept -->
  <devices>
    <disk type='file' device='disk' snapshot='external'>
      <driver name='qemu' type='vmdk' cache='none'/>
      <source file='/img/a&amp;b.vmdk' startupPolicy='optional'>
        <seclabel model='dac' relabel='no'/>
      </source>
      <target dev='vda' bus='virtio'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x04' function='0x0'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='vmdk'/>
      <source file='/img/b-000001.vmdk'/>
      <backingStore type='file'>
        <format type='vmdk'/>
        <source file='/img/b.vmdk' mark='mine'/>
        <backingStore/>
      </backingStore>
      <target dev='vdb' bus='virtio'/>
    </disk>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-no-reboot'/>
  </qemu:commandline>
</domain>
"""

A = Path("/img/a&b.vmdk")


def disk(body: str, attributes: str = "type='file' device='disk'") -> xml.Disk:
    text = f"<domain><devices><disk {attributes}><target dev='vda'/>{body}</disk></devices></domain>"
    return xml.list_disks(text)[0]


def test_empty_elements_are_passed_over_when_files_change() -> None:
    text = (
        "<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='/x/o'/></disk>\n"
        "<disk name='vdb' snapshot='no'/>\n</disks><domain><devices><disk type='file'><source file='/x/a'/></disk>"
        "<disk/></devices></domain></domainsnapshot>"
    )
    changed = xml.relink(text, lambda files: [file.with_name(f"new-{file.name}") for file in files])
    assert changed.count("new-") == 2
    assert xml.files_in(changed) == {Path("/x/new-o"), Path("/x/new-a")}
    assert "<disk name='vdb' snapshot='no'/>\n</disks>" in changed
    assert "<disk/></devices>" in changed


def test_disks_are_listed_with_the_chain_that_the_xml_spells_out() -> None:
    first, second = xml.list_disks(DOMAIN)
    assert (first.target, first.path, first.backing, first.closed, first.refusal) == ("vda", A, (), False, None)
    assert second == xml.Disk("vdb", Path("/img/b-000001.vmdk"), (Path("/img/b.vmdk"),), closed=True)


VMDK = "<driver type='vmdk'/>"
SOURCE = "<source file='/a.vmdk'/>"


@pytest.mark.parametrize(
    ("body", "attributes", "reason"),
    [
        (VMDK + SOURCE, "type='file' device='cdrom'", "is a cdrom, not a disk"),
        (VMDK + SOURCE, "type='file' device='lun'", "is a lun, not a disk"),
        (VMDK + "<source protocol='nbd'/>", "type='network'", "is of type 'network', not a file"),
        (VMDK + "<source dev='/dev/sda'/>", "type='block'", "is of type 'block', not a file"),
        ("<driver type='qcow2'/>" + SOURCE, "type='file'", "has the format qcow2, not vmdk"),
        (SOURCE, "type='file'", "has the format raw, not vmdk"),
        (VMDK, "type='file'", "has no file"),
        (VMDK + SOURCE + "<readonly/>", "type='file'", "is read-only"),
        (VMDK + SOURCE + "<shareable/>", "type='file'", "is shared with other domains"),
        (VMDK + SOURCE + "<transient/>", "type='file'", "is transient: its changes are discarded at shutdown"),
        (VMDK + "<source file='a.vmdk'/>", "type='file'", "has a relative path"),
        (VMDK + "<source file='/a'><encryption/></source>", "type='file'", "is encrypted"),
        (VMDK + "<source file='/a'><slices/></source>", "type='file'", "is a slice of a file"),
    ],
)
def test_a_disk_that_can_take_no_part_says_why(body: str, attributes: str, reason: str) -> None:
    assert disk(body, attributes).refusal == reason


def test_a_volume_is_found_by_the_caller() -> None:
    text = (
        "<domain><devices><disk type='volume' device='disk'><driver type='vmdk'/>"
        "<source pool='p' volume='v.vmdk' mode='host'/><target dev='vda'/></disk></devices></domain>"
    )
    (found,) = xml.list_disks(text, lambda pool, volume: Path("/pools", pool, volume))
    assert (found.path, found.refusal) == (Path("/pools/p/v.vmdk"), None)
    after = ET.fromstring(xml.stack(text, {"vda": xml.NewTop(Path("/n.vmdk"), [Path("/pools/p/v.vmdk")])}))
    element = after.find("./devices/disk")
    assert element is not None
    assert element.get("type") == "file"
    assert [source.attrib for source in element.iter("source")] == [{"file": "/n.vmdk"}, {"file": "/pools/p/v.vmdk"}]


def test_everything_outside_the_changed_disk_stays_byte_for_byte() -> None:
    after = xml.stack(DOMAIN, {"vda": xml.NewTop(Path("/img/a&b-000001.vmdk"), [A])})
    begin, end = DOMAIN.index("<disk type"), DOMAIN.index("</disk>")
    assert after.startswith(DOMAIN[:begin])
    assert after.endswith(DOMAIN[end:])
    assert after.encode() != DOMAIN.encode()


def test_what_only_looks_like_a_disk_is_left_alone() -> None:
    disk = "<disk type='file'><driver type='vmdk'/><source file='/a'/><target dev='vda'/></disk>"
    before = (
        f"<domain><!-- {disk} --><metadata>{disk}<![CDATA[{disk}]]></metadata><description>ä€</description><devices>"
    )
    after = xml.stack(f"{before}{disk}</devices></domain>", {"vda": xml.NewTop(Path("/n"), [Path("/a")])})
    assert after.startswith(before)
    assert after.count("/n") == 1


def test_the_whole_chain_is_spelt_out_and_closed() -> None:
    chain = [A, Path("/img/two.vmdk"), Path("/elsewhere/base.vmdk")]
    first, second = xml.list_disks(xml.stack(DOMAIN, {"vda": xml.NewTop(Path("/img/new.vmdk"), chain)}))
    assert (first.path, first.backing, first.closed) == (Path("/img/new.vmdk"), tuple(chain), True)
    assert second == xml.list_disks(DOMAIN)[1]


def test_a_chain_already_spelt_out_keeps_what_it_says_of_each_file() -> None:
    chain = [Path("/img/b-000001.vmdk"), Path("/img/b.vmdk")]
    after = xml.stack(DOMAIN, {"vdb": xml.NewTop(Path("/img/b-000002.vmdk"), chain)})
    assert after.count('mark="mine"') == 1
    assert xml.list_disks(after)[1].backing == tuple(chain)
    assert xml.list_disks(after)[1].closed


def test_a_chain_spelt_out_wrongly_is_replaced() -> None:
    chain = [Path("/img/b-000001.vmdk"), Path("/img/really.vmdk")]
    after = xml.stack(DOMAIN, {"vdb": xml.NewTop(Path("/img/b-000002.vmdk"), chain)})
    assert "/img/b.vmdk" not in after
    assert xml.list_disks(after)[1].backing == tuple(chain)


def test_labels_given_to_the_file_hold_for_overlay_and_frozen_file() -> None:
    after = xml.stack(DOMAIN, {"vda": xml.NewTop(Path("/img/n.vmdk"), [A])})
    assert after.count("<seclabel") == 2
    assert after.count("startupPolicy") == 1


def test_both_disks_change_at_once() -> None:
    tops = {
        "vdb": xml.NewTop(Path("/img/nb.vmdk"), [Path("/img/b-000001.vmdk"), Path("/img/b.vmdk")]),
        "vda": xml.NewTop(Path("/img/na.vmdk"), [A]),
    }
    assert [disk.path for disk in xml.list_disks(xml.stack(DOMAIN, tops))] == [
        Path("/img/na.vmdk"),
        Path("/img/nb.vmdk"),
    ]


def test_a_disk_that_is_not_there_is_not_passed_over() -> None:
    with pytest.raises(KeyError, match="vdz"):
        xml.stack(DOMAIN, {"vdz": xml.NewTop(Path("/n"), [A])})


def test_snapshot_xml_is_parsed_back() -> None:
    snapshot = xml.SnapshotXml(
        name="before <update> & more",
        state="shutoff",
        creation_time=1_700_000_000,
        description="line one\nline 'two'",
        parent='"root"',
        disks=(
            xml.SnapshotDisk("vda", "external", Path("/img/a&'b'.vmdk"), A),
            xml.SnapshotDisk("vdb", "no", None, Path("/img/b-000001.vmdk"), (Path("/img/b.vmdk"),)),
        ),
    )
    assert xml.parse_snapshot(xml.snapshot_xml(snapshot, DOMAIN)) == snapshot


def test_every_named_file_is_found() -> None:
    assert xml.files_in(DOMAIN) == {A, Path("/img/b-000001.vmdk"), Path("/img/b.vmdk")}
