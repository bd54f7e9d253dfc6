"""Does a descriptor keep every byte, and are all spellings of the field's writers read?"""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from qemu_vmdk_snap.errors import FormatError, InvalidRequest
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor, is_descriptor, make_descriptor

HERE = Path("d.vmdk")
VMWARE = b"""# Disk DescriptorFile\r
version=1\r
encoding="windows-1252"\r
CID=fffffffe\r
parentCID=ffffffff\r
isNativeSnapshot="no"\r
createType="twoGbMaxExtentFlat"\r
\r
# Extent description\r
RW 4192256 FLAT "caf\xe9-f001.vmdk" 0\r
RW 2048 FLAT "caf\xe9-f002.vmdk" 0\r
RDONLY 63 ZERO\r
\r
# The Disk Data Base\r
#DDB\r
\r
ddb.uuid = "60 00 C2 9a dc 4a 12 0f-2a cb 5c 02 7e cf 6d 0e"\r
ddb.longContentID = "b93eae20bf0418af3d6428e7fffffffe"\r
ddb.unknown.key = "kept"\r
"""


def parse(raw: bytes) -> Descriptor:
    return Descriptor.parse(raw, path=HERE)


def test_what_vmware_writes() -> None:
    found = parse(VMWARE + bytes(300))
    assert found.raw == VMWARE
    assert (found.cid, found.parent_cid, found.create_type) == (0xFFFFFFFE, NO_PARENT, "twoGbMaxExtentFlat")
    assert [(e.access, e.sectors, e.type, e.file, e.offset) for e in found.extents] == [
        ("RW", 4192256, "FLAT", "café-f001.vmdk", 0),
        ("RW", 2048, "FLAT", "café-f002.vmdk", 0),
        ("RDONLY", 63, "ZERO", None, 0),
    ]
    assert found.get("DDB.UNKNOWN.KEY") == "kept"
    assert found.sectors == 4192256 + 2048 + 63
    assert found.offset_of("CID") == VMWARE.index(b"fffffffe")


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("UTF-8", "déjà.vmdk"),
        ("windows-1252", "déjà.vmdk"),
        ("GBK", "磁盘.vmdk"),
        ("Big5", "功能.vmdk"),
        ("Shift_JIS", "表.vmdk"),
    ],
)
def test_encodings(encoding: str, name: str) -> None:
    text = f'version=1\nencoding="{encoding}"\nCID=1\nparentCID=2\ncreateType="custom"\nparentFileNameHint="{name}"\n'
    codec = {"windows-1252": "cp1252"}.get(encoding, encoding)
    found = parse(text.encode(codec) + f'RW 8 SPARSE "{name}"\n'.encode(codec))
    assert found.parent_hint == name
    assert found.extents[0].file == name
    changed = found.with_values({"parentFileNameHint": name + name})
    assert changed.parent_hint == name + name
    assert (name + name).encode(codec) in changed.raw


@pytest.mark.parametrize(
    "line", [b"CID=123abc", b"cid=123abc", b"CID = 123abc", b"\tCid\t=\t123abc  ", b'CID="123abc"', b"CID=123ABC\r"]
)
def test_spellings_of_a_key(line: bytes) -> None:
    assert parse(b"# Disk DescriptorFile\n" + line + b"\n").cid == 0x123ABC


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (b'"a b.vmdk"', "a b.vmdk"),
        (rb'"C:\disks\a.vmdk"', r"C:\disks\a.vmdk"),
        (rb'"a \"b\".vmdk"', 'a "b".vmdk'),
        (b'"a |22b|22 |7C.vmdk"', 'a "b" |.vmdk'),
        (b'"a|41.vmdk"', "a|41.vmdk"),
        (b"a.vmdk", "a.vmdk"),
        (b'""', None),
    ],
)
def test_values(written: bytes, name: str | None) -> None:
    text = b"# Disk DescriptorFile\nCID=1\nparentCID=2\nparentFileNameHint=" + written + b"\n"
    assert parse(text).parent_hint == name


def test_a_comment_is_no_value_and_the_first_of_two_counts() -> None:
    found = parse(b"# Disk DescriptorFile\n#CID=1\nCID=2\nCID=3\nparentCID=ffffffff\n")
    assert found.cid == 2


def test_a_hint_counts_whatever_the_parent_cid() -> None:
    assert parse(b'# Disk DescriptorFile\nparentCID=ffffffff\nparentFileNameHint="x"\n').parent_hint == "x"
    assert parse(b'# Disk DescriptorFile\nparentCID=ffffffff\nparentFileNameHint=""\n').parent_hint is None


def test_an_encoding_that_the_bytes_are_not_in() -> None:
    with pytest.raises(FormatError, match="must be gbk text"):
        parse(b'version=1\nencoding="GBK"\nCID=1\nparentFileNameHint="\xff\xff"\n')


def test_bytes_that_are_no_utf8_survive_unnamed() -> None:
    found = parse(b'# Disk DescriptorFile\nCID=1\nparentCID=2\nparentFileNameHint="\xff.vmdk"\n')
    assert found.parent_hint == "\udcff.vmdk"  # the file system's own name for that byte
    assert found.with_values({"CID": "00000002"}).raw == found.raw.replace(b"CID=1", b"CID=00000002", 1)


@pytest.mark.parametrize(
    ("head", "yes"),
    [
        (b"# Disk DescriptorFile\n", True),
        (b"#disk descriptorfile\r\n", True),
        (b"\n# made by hand\n\nversion=1\n", True),
        (b"version = 1\n", True),
        (b"version=2\n", False),
        (b"#!/bin/sh\nversion=1\n", True),
        (b"KDMV", False),
        (b"", False),
        (b"\0\0\0\0", False),
    ],
)
def test_what_begins_a_descriptor(head: bytes, yes: bool) -> None:
    assert is_descriptor(head) is yes


def test_a_new_descriptor_is_as_every_reader_accepts_it() -> None:
    raw = make_descriptor(
        cid=0x1234,
        parent_cid=NO_PARENT,
        create_type="monolithicSparse",
        hint=None,
        extents=[("RW", 100, "SPARSE", "a.vmdk", None)],
        ddb={"adapterType": "ide"},
        path=HERE,
    )
    assert raw == (
        b'# Disk DescriptorFile\nversion=1\nCID=00001234\nparentCID=ffffffff\ncreateType="monolithicSparse"\n'
        b'\n# Extent description\nRW 100 SPARSE "a.vmdk"\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = "ide"\n'
    )


@pytest.mark.parametrize("name", ['quo"te', "new\nline", "nul\0"])
def test_a_name_that_the_format_cannot_carry(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be written into a descriptor"):
        make_descriptor(cid=1, parent_cid=2, create_type="custom", hint=name, extents=[], ddb={}, path=HERE)


def test_another_parent() -> None:
    text = b'version=1\r\nCID=1\r\nparentCID=00000002\r\ncreateType="custom"\r\nparentFileNameHint="old"\r\n# end\r\n'
    changed = parse(text).with_parent(0xABCDEF, "new")
    assert changed.raw == text.replace(b"00000002", b"00abcdef").replace(b'"old"', b'"new"')
    none = changed.with_parent(NO_PARENT, None)
    assert none.parent_hint is None
    assert b"parentFileNameHint" not in none.raw


KEYS = st.sampled_from(["CID", "parentCID", "version", "ddb.adapterType", "isNativeSnapshot", "some.thing"])
ENDS = st.sampled_from(["\n", "\r\n"])
LINES = st.one_of(
    st.tuples(KEYS, st.sampled_from(["=", " = ", "= "]), st.from_regex(r"[0-9a-f]{1,8}", fullmatch=True), ENDS).map(
        "".join
    ),
    st.tuples(st.just("# "), st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0"), max_size=20), ENDS).map(
        "".join
    ),
    st.tuples(st.just('RW 8 SPARSE "x"'), ENDS).map("".join),
    st.just("\n"),
)


@given(st.lists(LINES, max_size=20), st.integers(0, 600))
def test_parse_then_serialise_is_byte_exact(lines: list[str], padding: int) -> None:
    raw = ("# Disk DescriptorFile\n" + "".join(lines)).encode()
    found = parse(raw + bytes(padding))
    assert found.raw == raw
    for key, value in found.values.items():
        same = found.with_values({key: value.text})
        assert same.raw == raw
