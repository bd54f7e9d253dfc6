"""Is a header of capacity 0 read as QEMU reads it: as the envelope of a descriptor that names other files?"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from qemu_vmdk_snap import FormatError, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from tests.support.qemu import assert_agree, content, qemu_content, qemu_img, qemu_io

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

SECTOR = 512
DATA = bytes(range(256)) * 2 * 40
TEXT = """# Disk DescriptorFile
version=1
CID=0000abcd
parentCID=ffffffff
createType="{kind}"
# Extent description
{extents}
#DDB
ddb.adapterType = "ide"
"""


def envelope(path: Path, kind: str, *extents: str, room: int = 20, tail: bytes = b"", capacity: int = 0) -> Path:
    """Write a header of the given capacity, the descriptor behind it, and `tail` behind the descriptor's room."""
    head = struct.pack("<4sIIQQQQIQQQB4sH", b"KDMV", 1, 1, capacity, 128, 1, room, 512, 0, 0, 128, 0, b"\n \r\n", 0)
    text = TEXT.format(kind=kind, extents="\n".join(extents)).encode()
    path.write_bytes(head.ljust(SECTOR, b"\0") + text.ljust(room * SECTOR, b"\0") + tail)
    return path


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    path = tmp_path / "a-flat.vmdk"
    path.write_bytes(DATA)
    (tmp_path / "b-flat.vmdk").write_bytes(DATA)
    return path


@pytest.mark.parametrize(
    ("kind", "extents"),
    [
        ("monolithicFlat", ['RW 40 FLAT "a-flat.vmdk" 0']),
        ("vmfs", ['RW 40 VMFS "a-flat.vmdk"']),
        ("twoGbMaxExtentFlat", ['RW 30 FLAT "a-flat.vmdk" 0', 'RW 10 FLAT "b-flat.vmdk" 30']),
    ],
)
@pytest.mark.parametrize("room", [1, 20])
def test_it_is_read_as_the_descriptor_says(
    flat: Path, kind: str, extents: list[str], room: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = envelope(flat.with_name("a.vmdk"), kind, *extents, room=room)
    assert content(path) == DATA
    assert_agree(path, capsys, checks=False)  # QEMU checks no flat disk
    assert main(["image", "check", str(path)]) == 0


def test_the_data_may_follow_the_descriptor(tmp_path: Path) -> None:
    path = envelope(tmp_path / "a.vmdk", "monolithicFlat", 'RW 40 FLAT "a.vmdk" 21', tail=DATA)
    assert content(path) == qemu_content(path) == DATA


def test_the_room_of_the_descriptor_may_end_with_the_text(flat: Path) -> None:
    path = envelope(flat.with_name("a.vmdk"), "monolithicFlat", 'RW 40 FLAT "a-flat.vmdk" 0')
    path.write_bytes(path.read_bytes()[: 2 * SECTOR])
    assert content(path) == qemu_content(path) == DATA


def test_both_write_it_by_turns(flat: Path) -> None:
    """Each gives the descriptor in its envelope a new CID, and leaves the header and the rest of the text alone."""
    path = envelope(flat.with_name("a.vmdk"), "monolithicFlat", 'RW 40 FLAT "a-flat.vmdk" 0')
    before, cids = path.read_bytes(), {0xABCD}
    model = bytearray(DATA)
    with open_chain(path, writable=True) as chain:
        chain.write_at(700, b"ours")
        model[700:704] = b"ours"
    cids.add(json.loads(qemu_img("info", "--output=json", path))["format-specific"]["data"]["cid"])
    qemu_io(path, "write -P 7 4096 512")
    model[4096:4608] = b"\x07" * 512
    with open_chain(path) as chain:
        cids.add(chain.links[0].cid)
    assert len(cids) == 3
    assert content(path) == qemu_content(path) == model
    after = path.read_bytes()
    assert (len(after), after[:SECTOR]) == (len(before), before[:SECTOR])
    # QEMU writes a CID without its leading zeros: what follows moves then, and an end of it stays behind the NUL.
    texts = [data[SECTOR:].partition(b"\0")[0] for data in (before, after)]
    assert re.sub(rb"\nCID=[0-9a-f]{8}\n", b"", texts[0]) == re.sub(rb"\nCID=[0-9a-f]{1,8}\n", b"", texts[1])


def test_an_overlay_on_one(flat: Path) -> None:
    base = envelope(flat.with_name("a.vmdk"), "monolithicFlat", 'RW 40 FLAT "a-flat.vmdk" 0')
    top = flat.with_name("top.vmdk")
    create_overlay(top, base, durable=False)
    qemu_io(top, "write -P 3 512 512")
    assert content(top) == qemu_content(top) == DATA[:512] + b"\x03" * 512 + DATA[1024:]
    assert main(["image", "check", "--backing-chain", str(top)]) == 0


def test_a_repair_finds_nothing_to_do(flat: Path) -> None:
    path = envelope(flat.with_name("a.vmdk"), "monolithicFlat", 'RW 40 FLAT "a-flat.vmdk" 0')
    before = path.read_bytes(), sorted(path.parent.iterdir())
    assert main(["image", "check", "-r", "all", str(path)]) == 0
    assert (path.read_bytes(), sorted(path.parent.iterdir())) == before


def test_a_disk_inside_itself_is_refused(tmp_path: Path) -> None:
    """Of capacity 0, it cannot be the sparse extent that its own descriptor names."""
    path = envelope(tmp_path / "a.vmdk", "monolithicSparse", 'RW 40 SPARSE "a.vmdk"')
    with pytest.raises(FormatError, match=r"byte 0xc: capacity = 0"):
        open_chain(path)
