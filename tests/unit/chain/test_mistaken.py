"""Does the error about a file given by mistake say what it is and what to open instead?"""

from __future__ import annotations

import gzip
import io
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from qemu_vmdk_snap import Unsupported, create_image, open_chain
from qemu_vmdk_snap.chain.look.mistaken import descriptor_naming, instead_of
from qemu_vmdk_snap.cli.main import main
from tests.support import esxi


def tar() -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x.ovf"))
    return raw.getvalue()


def zipped() -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr(zipfile.ZipInfo("x"), "x")
    return raw.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.ova", tar(), "it is a tar archive (an OVA is one): unpack it"),
        ("x.vmdk.gz", gzip.compress(b"x" * 1000, mtime=0), "it is a gzip file: unpack it"),
        ("x.zip", zipped(), "it is a zip archive: unpack it"),
        ("x.qcow2", b"QFI\xfb\0\0\0\3".ljust(1024, b"\0"), "it is a qcow2 image: convert it"),
        ("x.vhdx", b"vhdxfile".ljust(1024, b"\0"), "it is a VHDX image"),
        ("x.vhd", b"conectix".ljust(1024, b"\0"), "it is a VHD image (vpc)"),
        ("x.vhd", bytes(4096) + b"conectix".ljust(512, b"\0"), "it is a VHD image (vpc) of fixed size"),
        ("x.vdi", b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64) + b"\x7f\x10\xda\xbe" + bytes(900), "VDI"),
        ("x.raw", b"\xeb\x63".ljust(510, b"\0") + b"\x55\xaa" + bytes(512), "the bytes of a disk themselves"),
        ("x-ctk.vmdk", b"\1" * 1024, "it is a change-tracking file of VMware"),
        ("x.ovf", b'<?xml version="1.0"?>\n<Envelope/>', "it is an XML file"),
        ("x.vmx", b'.encoding = "UTF-8"\n', "it is a dictionary of VMware"),
        ("x.vmdk", b"", "it is an empty file"),
    ],
)
def test_other_files(tmp_path: Path, name: str, content: bytes, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for command in (["info", path], ["convert", path, tmp_path / "new"], ["create", "-b", path, tmp_path / "new"]):
        assert main(["image", *map(str, command)]) == 65
        err = capsys.readouterr().err
        assert err.startswith(f"qemu-vmdk-snap: {path}: byte 0x0: magic = ")
        assert words in err
        assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_nothing_is_said_of_what_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 2000)
    assert instead_of(tmp_path / "x") is None
    assert instead_of(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("kind", "part", "status"),
    [
        ("vmfs", "a-flat.vmdk", 65),
        ("monolithicFlat", "a-flat.vmdk", 65),
        ("twoGbMaxExtentFlat", "a-f001.vmdk", 65),
        ("twoGbMaxExtentSparse", "a-s001.vmdk", 63),
        ("vmfsSparse", "a-delta.vmdk", 63),
    ],
)
def test_an_extent_beside_its_descriptor(
    tmp_path: Path, kind: str, part: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    create_image(tmp_path / "a.vmdk", 1 << 20, kind=kind, durable=False)
    path = tmp_path / part
    for words in (["info", path], ["create", "-b", path, tmp_path / "new"]):
        assert main(["image", *map(str, words)]) == status
        err = capsys.readouterr().err
        assert re.search(rf"an extent( \(COWD\))? of {re.escape(str(tmp_path / 'a.vmdk'))}: open that descriptor", err)
        assert err.count("\n") == 1
    # Whatever the descriptor is called, and if the extent's name says nothing:
    (tmp_path / "a.vmdk").rename(tmp_path / "z.VMDK")
    assert descriptor_naming(path) == tmp_path / "z.VMDK"


def test_a_sesparse_extent_and_a_tracking_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    esxi.sesparse(tmp_path / "a-sesparse.vmdk", 8192, {0: b"x" * 4096})
    path = esxi.descriptor(tmp_path / "a.vmdk", "seSparse", ['RW 8192 SESPARSE "a-sesparse.vmdk"'])
    assert main(["image", "info", str(tmp_path / "a-sesparse.vmdk")]) == 65
    assert f"it is an extent of {path}: open that descriptor" in capsys.readouterr().err
    path.write_text(path.read_text().replace("CID=", 'changeTrackPath="a-ctk.vmdk"\nCID=', 1))
    (tmp_path / "a-ctk.vmdk").write_bytes(b"\xa2\x72\x19\xf6" + bytes(2000))
    assert main(["image", "info", str(tmp_path / "a-ctk.vmdk")]) == 65
    assert f"it is the change-tracking file of {path}: open that descriptor" in capsys.readouterr().err
    path.unlink()
    assert main(["image", "info", str(tmp_path / "a-sesparse.vmdk")]) == 65
    assert "it is a seSparse extent of VMDK" in capsys.readouterr().err


def test_a_cowd_file_is_a_disk_only_where_nothing_names_it(tmp_path: Path) -> None:
    extent = tmp_path / "a-delta.vmdk"
    esxi.cowd(extent, 2048, {3: b"x" * 512})
    with open_chain(extent) as chain:
        assert chain.read_at(3 * 512, 1) == b"x"
    esxi.descriptor(tmp_path / "other.vmdk", "vmfsSparse", ['RW 2048 VMFSSPARSE "b-delta.vmdk"'])
    (tmp_path / "broken.vmdk").write_bytes(b"# Disk DescriptorFile\nRW a-delta.vmdk\n")
    with open_chain(extent):
        pass
    path = esxi.descriptor(tmp_path / "what.vmdk", "vmfsSparse", ['RW 2048 VMFSSPARSE "a-delta.vmdk"'])
    with pytest.raises(Unsupported, match=re.escape(f"is an extent (COWD) of {path}: open that descriptor instead")):
        open_chain(extent)
    with open_chain(path) as chain:
        assert chain.read_at(3 * 512, 1) == b"x"


def test_a_descriptor_in_another_encoding_names_its_extent(tmp_path: Path) -> None:
    name = "磁盘-flat.vmdk"
    text = f'# Disk DescriptorFile\nencoding="GBK"\nCID=1\nparentCID=ffffffff\ncreateType="vmfs"\nRW 8 VMFS "{name}"\n'
    (tmp_path / "a.vmdk").write_bytes(text.encode("gbk"))
    (tmp_path / name).write_bytes(bytes(4096))
    assert descriptor_naming(tmp_path / name) == tmp_path / "a.vmdk"


def test_an_extent_whose_room_for_a_descriptor_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # As QEMU makes the extents of a split disk.
    create_image(tmp_path / "a-s001.vmdk", 1 << 20, durable=False)
    raw = bytearray((tmp_path / "a-s001.vmdk").read_bytes())
    place, size = (512 * value for value in struct.unpack_from("<QQ", raw, 28))
    raw[place : place + size] = bytes(size)
    (tmp_path / "a-s001.vmdk").write_bytes(raw)
    path = esxi.descriptor(tmp_path / "a.vmdk", "twoGbMaxExtentSparse", ['RW 2048 SPARSE "a-s001.vmdk"'])
    assert main(["image", "info", str(tmp_path / "a-s001.vmdk")]) == 65
    assert f"it is an extent of {path}: open that descriptor instead" in capsys.readouterr().err
