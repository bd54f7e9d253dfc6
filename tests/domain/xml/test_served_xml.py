"""The two views of a domain with served disks: each is the other exchanged back, and what is edited in either stays."""

from __future__ import annotations

from pathlib import Path

from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.xml.named import named_chains
from qemu_vmdk_snap.domain.xml.served import (
    NAMESPACE,
    ServedDisk,
    behind,
    direct_view,
    notes_element,
    owner_of,
    served_disks,
    served_view,
    with_notes_of,
    with_served,
    without_served,
)

TEXT = """<domain type='kvm'>
  <name>d</name>
  <metadata>
    <app:note xmlns:app='urn:example:note'>stays</app:note>
  </metadata>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='vmdk' cache='writeback' io='threads'/>
      <source file='/img/b.vmdk'>
        <seclabel model='dac' relabel='no'/>
      </source>
      <backingStore type='file'>
        <format type='vmdk'/>
        <source file='/img/a.vmdk'/>
        <backingStore/>
      </backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='vmdk'/>
      <source file='/img/c.vmdk'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
  </devices>
</domain>"""
PLACE = ServedDisk("vda", Path("/run/s/d-vda.sock"), Path("/run/s/d-vda.sock.control"))


def no_volume(pool: str, volume: str) -> Path:
    raise AssertionError((pool, volume))


def test_libvirt_sees_a_raw_network_disk_and_we_see_the_chain() -> None:
    direct = with_served(TEXT, [PLACE], "64055:64055")
    served = served_view(direct)
    assert [disk.refusal for disk in xml.list_disks(served)] == ["is of type 'network', not a file", None]
    assert '<source protocol="nbd">' in served
    assert 'error_policy="stop"' in served
    assert "io=" not in served.split("<devices>")[1].split("</disk>")[0]
    assert served_disks(served) == served_disks(direct) == {"vda": PLACE}
    assert behind(served)["vda"].backing == (Path("/img/a.vmdk"),)
    assert owner_of(served) == "64055:64055"
    assert "<app:note xmlns:app='urn:example:note'>stays</app:note>" in served
    files = [[file.path.name for file in chain.files] for chain in named_chains(direct_view(served), no_volume)]
    assert files == [["b.vmdk", "a.vmdk"], ["c.vmdk"]]


def test_each_view_is_the_other_exchanged_back() -> None:
    direct = with_served(TEXT, [PLACE], None)
    served = served_view(direct)
    assert direct_view(served) == direct_view(direct_view(served))
    assert served_view(direct_view(served)) == served_view(served) == served
    assert xml.list_disks(direct_view(served)) == xml.list_disks(TEXT)
    back = without_served(direct_view(served), ["vda"])
    assert NAMESPACE not in back
    assert xml.list_disks(served_view(back)) == xml.list_disks(TEXT)


def test_what_is_edited_in_the_network_disk_stays_through_a_snapshot() -> None:
    served = served_view(with_served(TEXT, [PLACE], None))
    edited = served.replace('dev="vda"', 'dev="sda"').replace('type="raw"', 'type="raw" iothread="1"')
    top = xml.NewTop(Path("/img/d.vmdk"), (Path("/img/b.vmdk"), Path("/img/a.vmdk")))
    after = served_view(xml.stack(direct_view(edited), {"sda": top}))
    assert behind(after)["sda"].path == Path("/img/d.vmdk")
    assert served_disks(after)["sda"].socket == PLACE.socket
    assert 'iothread="1"' in after.split("<devices>")[1]


def test_a_disk_that_was_made_direct_by_hand_is_not_served() -> None:
    served = served_view(with_served(TEXT, [PLACE], None))
    by_hand = served.replace(served.split("<devices>")[1], TEXT.split("<devices>")[1])
    assert served_disks(by_hand) == {}
    assert NAMESPACE not in direct_view(by_hand)


def test_the_notes_of_today_go_with_the_xml_of_then() -> None:
    direct = with_served(TEXT, [PLACE], None)
    assert served_disks(with_notes_of(TEXT, direct)) == {"vda": PLACE}
    assert served_disks(with_notes_of(direct, TEXT)) == {}
    assert served_disks(with_notes_of(direct, TEXT, besides=["vda"])) == {"vda": PLACE}


def test_what_libvirt_makes_of_the_notes_of_a_live_domain_is_understood() -> None:
    served = served_view(with_served(TEXT, [PLACE], None))
    notes = notes_element(served)
    assert notes is not None
    start, end = served.index("<served:disks"), served.index("</served:disks>") + len("</served:disks>")
    inner = served[start:end].split(">", 1)[1].rsplit("</", 1)[0]
    for name in ("disk", "driver", "source", "backingStore", "format", "seclabel"):
        inner = inner.replace(f"<{name}", f"<served:{name}").replace(f"</{name}>", f"</served:{name}>")
    live = f'{served[:start]}<served:disks xmlns:served="{NAMESPACE}">{inner}</served:disks>{served[end:]}'
    assert behind(live) == behind(served)


def test_an_xml_without_served_disks_is_returned_as_it_is() -> None:
    assert direct_view(TEXT) is TEXT
    assert served_view("no XML at all") == "no XML at all"
    assert served_disks(TEXT) == {}
    assert notes_element(TEXT) is None


def test_the_memory_of_a_snapshot_is_a_file_that_it_needs() -> None:
    header = xml.SnapshotXml("m", "running", 1, memory="external", memory_file=Path("/img/m.memory"))
    text = xml.snapshot_xml(header, TEXT)
    assert xml.parse_snapshot(text).memory_file == Path("/img/m.memory")
    (memory,) = [chain for chain in named_chains(text, no_volume) if chain.role == "memory"]
    assert (memory.files[0].path, memory.closed) == (Path("/img/m.memory"), True)
