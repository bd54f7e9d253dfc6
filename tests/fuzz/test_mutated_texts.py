"""Do damaged descriptors, dictionaries of VMware and XML of snapshots give our own errors and nothing else?"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from qemu_vmdk_snap import Descriptor
from tests.support.fuzzing import bounded, cases, chooser, mutated, mutated_text

DESCRIPTOR = """\
# Disk DescriptorFile
version=1
encoding="windows-1252"
CID=12345678
parentCID=9abcdef0
isNativeSnapshot="no"
createType="twoGbMaxExtentSparse"
parentFileNameHint="C:\\\\vm\\\\base.vmdk"
changeTrackPath="top-ctk.vmdk"
# Extent description
RW 4192256 SPARSE "top-s001.vmdk"
RW 20480 FLAT "top f|22.vmdk" 63
NOACCESS 128 ZERO
# The Disk Data Base
#DDB
ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "261"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.longContentID = "0123456789abcdef0123456712345678"
ddb.virtualHWVersion = "4"
"""
VMSD = """\
.encoding = "windows-1252"
snapshot.lastUID = "2"
snapshot.numSnapshots = "2"
snapshot.current = "2"
snapshot0.uid = "1"
snapshot0.displayName = "before |22update|22"
snapshot0.createTimeHigh = "362513"
snapshot0.createTimeLow = "-1893374640"
snapshot0.numDisks = "1"
snapshot0.disk0.fileName = "d.vmdk"
snapshot0.disk0.node = "scsi0:0"
snapshot1.uid = "2"
snapshot1.parent = "1"
snapshot1.displayName = "second"
snapshot1.numDisks = "1"
snapshot1.disk0.fileName = "d-000001.vmdk"
snapshot1.disk0.node = "scsi0:0"
"""
SNAPSHOT = """\
<domainsnapshot>
  <name>s1</name>
  <description>before &lt;update&gt;</description>
  <parent><name>s0</name></parent>
  <creationTime>1700000000</creationTime>
  <state>shutoff</state>
  <memory snapshot='no'/>
  <disks>
    <disk name='vda' snapshot='external' type='file'>
      <driver type='vmdk'/>
      <source file='/img/b-000001.vmdk'/>
    </disk>
    <disk name='vdb' snapshot='no'/>
  </disks>
  <domain type='qemu'>
    <name>d</name>
    <uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>
    <devices>
      <disk type='file' device='disk'>
        <driver name='qemu' type='vmdk'/>
        <source file='/img/b.vmdk'/>
        <backingStore type='file'><format type='vmdk'/><source file='/img/a.vmdk'/><backingStore/></backingStore>
        <target dev='vda' bus='virtio'/>
      </disk>
    </devices>
  </domain>
</domainsnapshot>
"""


def test_descriptors() -> None:
    chance, path = chooser("descriptor"), Path("d.vmdk")
    for number in cases(600):
        raw = mutated(DESCRIPTOR.encode(), chance) if number % 2 else mutated_text(DESCRIPTOR, chance).encode()
        with bounded():
            parsed = Descriptor.parse(raw, path=path)
            assert raw.startswith(parsed.raw.rstrip(b"\0"))
            parsed.with_values({"CID": "00000001"})


@pytest.mark.needs("libvirt")
def test_dictionaries_of_vmware(tmp_path: Path) -> None:
    from qemu_vmdk_snap.domain.adopt.vmsd import read_vmsd

    chance, path = chooser("vmsd"), tmp_path / "vm.vmsd"
    for number in cases(600):
        raw = mutated(VMSD.encode(), chance) if number % 2 else mutated_text(VMSD, chance).encode()
        path.write_bytes(raw)
        with bounded():
            read_vmsd(path)


@pytest.mark.needs("libvirt")
def test_xml_of_snapshots() -> None:
    from qemu_vmdk_snap.domain import xml
    from qemu_vmdk_snap.domain.xml.kept import kept_branches

    chance = chooser("snapshot")
    for _ in cases(250):
        text = mutated_text(SNAPSHOT, chance)
        for work in (
            xml.parse_snapshot,
            xml.domain_of,
            xml.files_in,
            xml.list_disks,
            kept_branches,
            lambda text: xml.relink(text, lambda files: files),
            lambda text: xml.with_name(text, "other"),
            lambda text: xml.with_parent(text, None),
            lambda text: xml.with_description(text, "<&>"),
        ):
            with bounded(), contextlib.suppress(KeyError):  # `domain_of` and its callers: there is no domain
                work(text)
