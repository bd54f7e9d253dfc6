"""Are descriptors of every form read, and changed without touching a byte that was not meant?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_vmdk_snap import FormatError, InvalidRequest, Unsupported, open_chain
from qemu_vmdk_snap.chain.identity import with_fresh_cid
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor, is_descriptor, make_descriptor

PATH = Path("d.vmdk")
PLAIN = b"""# Disk DescriptorFile
version=1
CID=0abc1234
parentCID=ffffffff
createType="monolithicFlat"

# Extent description
RW 63 FLAT "d-flat.vmdk" 0

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.longContentID = "0123456789abcdef0123456789abcdef"
unknown.key = some value, kept
"""


def parse(raw: bytes) -> Descriptor:
    return Descriptor.parse(raw, path=PATH)


@pytest.mark.parametrize(
    "raw",
    [
        PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        PLAIN.replace(b"CID=", b"cid = ").replace(b"parentcid = ", b"PARENTCID\t=\t"),
        PLAIN.replace(b"=", b" = "),
        PLAIN.replace(b"createType", b"CREATETYPE").replace(b"RW 63 FLAT", b"  rw\t63  flat "),
        PLAIN.replace(b'"monolithicFlat"', b"monolithicFlat"),
        PLAIN.replace(b"# Disk DescriptorFile\n", b"# a comment\n\n# Disk DescriptorFile\n"),
        PLAIN.replace(b"# Disk DescriptorFile\n", b""),
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN + bytes(3000),
        PLAIN.rstrip(b"\n"),
        PLAIN + b"# filler\n" * 20_000,
        b"# long comment " + b"x" * 900 + b"\n" + PLAIN,
    ],
)
def test_forms(tmp_path: Path, raw: bytes) -> None:
    found = parse(raw)
    assert found.raw == raw.rstrip(b"\0")
    assert (found.cid, found.parent_cid, found.create_type) == (0x0ABC1234, NO_PARENT, "monolithicFlat")
    assert [(line.sectors, line.type, line.file, line.offset) for line in found.extents] == [
        (63, "FLAT", "d-flat.vmdk", 0)
    ]
    assert found.get("DDB.ADAPTERTYPE") == "lsilogic"
    changed = found.with_values({"CID": "99999999"})
    assert changed.cid == 0x99999999
    assert changed.raw == found.raw.replace(b"0abc1234", b"99999999")
    (tmp_path / "d-flat.vmdk").write_bytes(b"q" * 63 * 512)
    (tmp_path / "d.vmdk").write_bytes(raw)
    with open_chain(tmp_path / "d.vmdk") as chain:
        assert chain.read_at(63 * 512 - 1, 1) == b"q"


@pytest.mark.parametrize(
    ("encoding", "codec", "name"),
    [
        ("UTF-8", "utf-8", "größe-磁盘.vmdk"),
        ("windows-1252", "cp1252", "größe.vmdk"),
        ("GBK", "gbk", "磁盘.vmdk"),
        ("GBK", "gbk", "誠.vmdk"),
        ("Big5", "big5", "功許.vmdk"),
        ("Shift_JIS", "shift_jis", "表ソ"),
        ("Shift_JIS", "shift_jis", "ソ.vmdk"),
        ("windows-1251", "cp1251", "диск.vmdk"),
        ("EUC-KR", "euc_kr", "디스크.vmdk"),
    ],
)
def test_encodings(tmp_path: Path, encoding: str, codec: str, name: str) -> None:
    """In some of them the second byte of a character is a backslash, even just before the closing quote."""
    raw = PLAIN.replace(b"version=1\n", b'version=1\nencoding="' + encoding.encode() + b'"\n')
    raw = raw.replace(b"d-flat.vmdk", name.encode(codec))
    raw = raw.replace(b"parentCID=ffffffff", b"parentCID=00000007")
    raw = raw.replace(b'Flat"\n', b'Flat"\nparentFileNameHint="' + name.encode(codec) + b'"\n', 1)
    found = parse(raw)
    assert found.extents[0].file == name
    assert found.parent_hint == name
    assert found.raw == raw
    assert found.with_parent(9, name + name).parent_hint == name + name
    assert found.with_parent(9, name).raw == raw.replace(b"00000007", b"00000009")
    (tmp_path / name).write_bytes(b"q" * 63 * 512)
    (tmp_path / "d.vmdk").write_bytes(found.with_parent(NO_PARENT, None).raw)
    with open_chain(tmp_path / "d.vmdk") as chain:
        assert chain.read_at(0, 1) == b"q"


@pytest.mark.parametrize("encoding", [b"EBCDIC", b"UTF-16", b"ISO_8859-1:1987"])
def test_names_in_an_unknown_encoding_are_tried_as_they_are(tmp_path: Path, encoding: bytes) -> None:
    raw = PLAIN.replace(b"version=1\n", b'version=1\nencoding="' + encoding + b'"\n').replace(b"d-flat", b"\xc4\xc9")
    found = parse(raw)
    assert found.raw == raw
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xc4\xc9.vmdk")).write_bytes(b"q" * 63 * 512)
    (tmp_path / "d.vmdk").write_bytes(raw)
    with open_chain(tmp_path / "d.vmdk") as chain:
        assert chain.read_at(0, 1) == b"q"


@pytest.mark.parametrize(
    ("cid", "parent", "seen"),
    [
        (b"CID=0x0abc1234", b"parentCID=ffffffff", (0x0ABC1234, NO_PARENT)),
        (b"CID=0abc1234", b"parentCID=0xFFFFFFFF", (0x0ABC1234, NO_PARENT)),
        (b"CID=0abc1234", b"", (0x0ABC1234, NO_PARENT)),
        (b"", b"parentCID=ffffffff", (NO_PARENT, NO_PARENT)),
    ],
)
def test_cids_that_are_odd_are_read(cid: bytes, parent: bytes, seen: tuple[int, int]) -> None:
    raw = PLAIN.replace(b"\nCID=0abc1234", b"\n" + cid).replace(b"parentCID=ffffffff", parent)
    assert (parse(raw).cid, parse(raw).parent_cid) == seen
    if cid != b"CID=0abc1234":
        with pytest.raises(Unsupported, match="is read, but not written"):
            with_fresh_cid(parse(raw))


def test_an_unknown_encoding_of_plain_text_is_no_matter() -> None:
    found = parse(PLAIN.replace(b"version=1\n", b'version=1\nencoding="EBCDIC"\n'))
    assert found.extents[0].file == "d-flat.vmdk"
    assert found.with_parent(9, "base.vmdk").parent_hint == "base.vmdk"
    with pytest.raises(InvalidRequest, match="encoding ascii"):
        found.with_parent(9, "диск.vmdk")


def test_text_that_is_not_in_its_encoding_names_the_file_of_these_bytes(tmp_path: Path) -> None:
    raw = PLAIN.replace(b"version=1\n", b'version=1\nencoding="Shift_JIS"\n').replace(b"d-flat", b"\x81\xff")
    (tmp_path / os.fsdecode(b"\x81\xff.vmdk")).write_bytes(b"q" * 63 * 512)
    (tmp_path / "d.vmdk").write_bytes(raw)
    with open_chain(tmp_path / "d.vmdk") as chain:
        assert chain.read_at(0, 1) == b"q"


@pytest.mark.parametrize("in_bytes", [False, True], ids=["in Unicode", "in the bytes of the encoding"])
@pytest.mark.parametrize(
    ("encoding", "codec", "name"),
    [
        ("ISO-8859-1", "latin1", "größe.vmdk"),
        ("ISO-8859-15", "iso8859_15", "€.vmdk"),
        ("EUC-JP", "euc_jp", "表.vmdk"),
        ("KOI8-R", "koi8_r", "диск.vmdk"),
        ("GB2312", "gb2312", "磁盘.vmdk"),
        ("GBK", "gbk", "磁盘.vmdk"),
        ("Shift_JIS", "shift_jis", "表ソ.vmdk"),
        ("windows-874", "cp874", "ดิสก์.vmdk"),
        ("windows-949", "cp949", "디스크.vmdk"),
        ("windows-1252", "cp1252", "größe.vmdk"),
    ],
)
def test_an_extent_is_found_under_either_spelling(
    tmp_path: Path, encoding: str, codec: str, name: str, in_bytes: bool
) -> None:
    """An archive of Windows, unpacked on Linux, leaves the very bytes of the descriptor as the file's name."""
    raw = PLAIN.replace(b"version=1\n", b'version=1\nencoding="' + encoding.encode() + b'"\n')
    raw = raw.replace(b"d-flat.vmdk", name.encode(codec))
    assert parse(raw).extents[0].file == name
    on_disk = os.fsdecode(name.encode(codec)) if in_bytes else name
    (tmp_path / on_disk).write_bytes(b"q" * 63 * 512)
    (tmp_path / "d.vmdk").write_bytes(raw)
    with open_chain(tmp_path / "d.vmdk") as chain:
        assert chain.read_at(0, 1) == b"q"


def test_ascii_that_is_not_is_read_as_the_bytes_that_it_is(tmp_path: Path) -> None:
    raw = PLAIN.replace(b"version=1\n", b'version=1\nencoding="US-ASCII"\n').replace(b"d-flat", "größe".encode())
    (tmp_path / "größe.vmdk").write_bytes(b"q" * 63 * 512)
    (tmp_path / "d.vmdk").write_bytes(raw)
    with open_chain(tmp_path / "d.vmdk") as chain:
        assert chain.read_at(0, 1) == b"q"


def test_escapes_in_quoted_values() -> None:
    raw = PLAIN.replace(b'"lsilogic"', rb'"a|22b|7Cc|0Ad\"e|zz"').replace(b"d-flat.vmdk", rb"a\"b|22c\d")
    found = parse(raw)
    assert found.get("ddb.adapterType") == 'a"b|c\nd"e|zz'
    assert found.extents[0].file == 'a"b"c\\d'
    assert found.raw == raw


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"RW 63", "must be ACCESS SECTORS TYPE"),
        (b'RW 63 MAGIC "x"', "must have a type of SPARSE, FLAT"),
        (b"RW 63 SPARSE", "must name a file"),
        (b'RW -1 FLAT "x" 0', "as decimal numbers"),
        (b'RW 63 FLAT "x" 1e3', "as decimal numbers"),
        (b'RW 99999999999999999999 FLAT "x" 0', "as decimal numbers"),
        ('RW ٣ FLAT "x" 0'.encode(), "as decimal numbers"),
        (b'RW 63 FLAT "x', "must be ACCESS SECTORS TYPE"),
    ],
)
def test_bad_extent_lines_are_named(line: bytes, message: str) -> None:
    raw = PLAIN.replace(b'RW 63 FLAT "d-flat.vmdk" 0', line)
    with pytest.raises(FormatError, match=message) as error:
        parse(raw)
    assert error.value.offset == raw.index(line)


KEYS = st.from_regex(r"[A-Za-z_][\w.\-]{0,12}", fullmatch=True, alphabet=st.characters(codec="ascii"))
VALUES = st.text(st.characters(codec="ascii", min_codepoint=32, exclude_characters='"'), max_size=30)
LINES = st.one_of(
    st.builds("{}={}".format, KEYS, VALUES),
    st.builds('{} = "{}"'.format, KEYS, VALUES),
    st.builds("#{}".format, VALUES),
    st.just(""),
    st.just("RW 7 ZERO"),
    st.builds('RDONLY 9 FLAT "x{}" 3'.format, st.integers(0, 99)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, max_size=12), st.sampled_from(["\n", "\r\n"]), st.integers(0, 600))
def test_parsing_keeps_every_byte(lines: list[str], end: str, padding: int) -> None:
    lines = [line for line in lines if not line.lower().lstrip().startswith("encoding")]
    raw = end.join(["# Disk DescriptorFile", "CID=00000001", "parentCID=ffffffff", *lines]).encode()
    found = parse(raw + bytes(padding))
    assert found.raw == raw
    assert is_descriptor(raw)
    assert parse(found.raw) == found
    again = found.with_values({"CID": "00000002"}).with_values({"CID": "00000001"})
    assert again.raw == raw


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, NO_PARENT),
    st.integers(0, NO_PARENT - 1),
    st.text(st.characters(codec="utf-8", min_codepoint=32, exclude_characters='"\\|\x7f\x85\u2028\u2029'), min_size=1),
    st.integers(1, 1 << 50),
)
def test_what_we_make_says_what_was_asked(cid: int, parent_cid: int, name: str, sectors: int) -> None:
    extents: list[tuple[str, int, str, str | None, int | None]] = [
        ("RW", sectors, "FLAT", name, 5),
        ("RDONLY", 1, "ZERO", None, None),
    ]
    raw = make_descriptor(
        cid=cid, parent_cid=parent_cid, create_type="custom", hint=name, extents=extents, ddb={"k": "v"}, path=PATH
    )
    found = parse(raw)
    assert (found.cid, found.parent_cid, found.parent_hint, found.get("ddb.k")) == (cid, parent_cid, name, "v")
    assert [(line.access, line.sectors, line.file, line.offset) for line in found.extents] == [
        ("RW", sectors, name, 5),
        ("RDONLY", 1, None, 0),
    ]


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\0b"])
def test_a_name_that_no_descriptor_can_carry(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be written into a descriptor"):
        parse(PLAIN).with_parent(1, name)
