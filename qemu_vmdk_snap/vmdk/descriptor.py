"""The descriptor: the text that names an image's CID, its parent, its extents and its disk database.

Parsing keeps every byte, and a change touches only the value it names, so `Descriptor.parse(raw).raw == raw` always,
with unknown keys, comments, line ends and padding included. What `make_descriptor` writes is the form that every
reader accepts: ASCII, `CID` before `parentCID`, no spaces round `=`, no blank line between the extent heading and the
extents (QEMU 7.2 counts an extent twice there).

Source: VMware Virtual Disk Format 5.0, "The Descriptor File"; QEMU 7.2 block/vmdk.c; VirtualBox VMDK.cpp.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qemu_vmdk_snap.errors import FormatError, InvalidRequest
from qemu_vmdk_snap.light import Final, NamedTuple, dataclass
from qemu_vmdk_snap.vmdk.registry import MODULES

NO_PARENT: Final = 0xFFFF_FFFF
FIRST_LINE: Final = "# Disk DescriptorFile"
MAX_BYTES: Final = 16 << 20
"""No descriptor is larger; a larger one is refused before it is read."""

HEAD_BYTES: Final = 4096
"""How much of a file is read to see whether it is a descriptor: comments may come first."""

ACCESS: Final = ("RW", "RDONLY", "NOACCESS")
# By the names of iconv and ICU, in lower case with "-" for "_": VMware writes the one that its host has.
_CODECS: Final = {
    "utf-8": "utf-8",
    "utf8": "utf-8",
    **dict.fromkeys(("us-ascii", "ascii", "ansi-x3.4-1968", "646"), "ascii"),
    **{f"windows-125{page}": f"cp125{page}" for page in range(9)},  # the ANSI code page of a Windows host
    **{f"{prefix}{page}": f"cp{page}" for prefix in ("windows-", "cp") for page in (874, 932, 936, 949, 950)},
    **{f"cp125{page}": f"cp125{page}" for page in range(9)},
    **{f"ibm{page}": f"cp{page}" for page in (437, 850, 852, 855, 857, 858, 860, 861, 862, 863, 865, 866, 869)},
    **{f"iso-8859-{part}": f"iso8859_{part}" for part in (*range(1, 12), *range(13, 17))},
    **{f"iso8859-{part}": f"iso8859_{part}" for part in (*range(1, 12), *range(13, 17))},
    "latin1": "iso8859_1",
    "tis-620": "tis_620",
    "koi8-r": "koi8_r",
    "koi8-u": "koi8_u",
    "gb2312": "gb2312",
    "euc-cn": "gb2312",
    "gbk": "gbk",
    "gb18030": "gb18030",
    "big5": "big5",
    "big5-hkscs": "big5hkscs",
    **dict.fromkeys(("shift-jis", "sjis"), "shift_jis"),
    "euc-jp": "euc_jp",
    "eucjp": "euc_jp",
    "euc-kr": "euc_kr",
    "euckr": "euc_kr",
    "johab": "johab",
}
# Importing a module that compiles regular expressions costs a short command as much as reading an image: what nearly
# every descriptor has is taken apart by hand, and these are compiled for what is not so plain.
# Of decoded text: the second byte of a character in Shift_JIS, Big5 or GBK may be a backslash.
_EXTENT_LINE: Final = (
    r"(?ai)[ \t]*(?P<access>RW|RDONLY|NOACCESS)[ \t]+(?P<sectors>\S+)[ \t]+(?P<type>[A-Za-z]+)"
    r"(?:[ \t]+\"(?P<file>(?:[^\"\\]|\\.)*)\"(?:[ \t]+(?P<offset>\S+))?(?P<rest>[^\r\n]*))?[ \t]*\r?\Z"
)
# VMware writes a quote, a bar and control characters inside a quoted value as a bar and two hex digits.
_BAR_ESCAPE: Final = r"\|(22|7[Cc]|0[0-9A-Fa-f]|1[0-9A-Fa-f])"
_BOM: Final = b"\xef\xbb\xbf"
_BLANK: Final = b" \t"
_LETTERS: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"
_OF_KEYS: Final = _LETTERS + b"0123456789.-"
_HEX_DIGITS: Final = frozenset("0123456789abcdefABCDEF")


class DecodedName(str):
    """A name of a descriptor in another encoding than UTF-8; `raw` has its bytes, as Python represents a file name.

    An archive made on Windows and unpacked on Linux has file names in the bytes of the descriptor's encoding.
    """

    raw: str


def spellings(name: str) -> tuple[str, ...]:
    """Return the possible names here of the file that a descriptor calls `name`, the most likely first."""
    return (name, name.raw) if isinstance(name, DecodedName) else (name,)


class ExtentLine(NamedTuple):
    """One extent: `sectors` of the guest's disk in `file`, from sector `offset` of it where the type is flat."""

    access: str
    sectors: int
    type: str
    file: str | None
    offset: int
    at: int
    """Byte of the line in the descriptor, for messages."""


class _Value(NamedTuple):
    start: int  # of the value as written, quotes included, in bytes of raw
    end: int
    text: str


@dataclass(frozen=True)
class Descriptor:
    """A parsed descriptor; `raw` is the text as it is on disk, without the zeros that pad it."""

    raw: bytes
    path: Path
    base: int
    """Byte of the file where `raw` begins."""
    values: Mapping[str, _Value]
    """By lower-case key; the first line of a key counts, as QEMU and VirtualBox read it."""
    extents: tuple[ExtentLine, ...]
    codec: str

    @classmethod
    def parse(cls, data: bytes, *, path: Path, base: int = 0) -> Descriptor:
        """Return the descriptor in `data`, which may be padded with zeros.

        Raises:
            FormatError: it is not a descriptor, lacks a required key, or a value is invalid.
        """
        raw = data.split(b"\0", 1)[0]
        if not _looks_like(raw):
            raise FormatError(path, base, "descriptor", raw[:24], "must begin with '# Disk DescriptorFile'")
        codec = _codec_of(raw)
        values: dict[str, _Value] = {}
        extents: list[ExtentLine] = []
        at = 0
        for line in raw.split(b"\n"):
            if _is_extent(line):
                extents.append(_parse_extent(line, codec, path, base + at))
            elif not line.lstrip().startswith(b"#") and (found := _key_and_value(line)):
                key, start, end = found
                text = _spelled(_unquote(_decode(line[start:end], codec)), codec)
                values.setdefault(key, _Value(at + start, at + end, text))
            at += len(line) + 1
        return cls(raw, path, base, values, tuple(extents), codec)

    def get(self, key: str) -> str | None:
        """Return the value of `key` in whatever case it is written, or None."""
        value = self.values.get(key.lower())
        return None if value is None else value.text

    @property
    def cid(self) -> int:
        """The content ID: changes when the disk is first written after each open.

        Without one it is `NO_PARENT`, which fits the overlays that QEMU makes on such a base, and no other.
        """
        return self._hex("CID") if "cid" in self.values else NO_PARENT

    @property
    def parent_cid(self) -> int:
        """The CID that the parent had when this overlay was made; `NO_PARENT` where there is none."""
        if "parentcid" not in self.values and self.parent_hint is None:
            return NO_PARENT
        return self._hex("parentCID")

    @property
    def create_type(self) -> str:
        """The value of `createType`, as written."""
        return self._required("createType").text

    @property
    def parent_hint(self) -> str | None:
        """The value of parentFileNameHint, or None where it is missing or empty."""
        return self.get("parentFileNameHint") or None

    @property
    def sectors(self) -> int:
        """Sectors of the guest's disk: the sum over the extents."""
        return sum(extent.sectors for extent in self.extents)

    @property
    def encryption(self) -> str | None:
        """The key that shows that VMware has encrypted the disk, or None."""
        if self.get("encryptionKeys"):
            return "encryptionKeys"
        return "ddb.iofilters" if "crypt" in (self.get("ddb.iofilters") or "").lower() else None

    def offset_of(self, key: str) -> int:
        """Return the byte of the file at which the value of `key` begins."""
        return self.base + self._required(key).start

    def with_values(self, changes: Mapping[str, str]) -> Descriptor:
        """Return the same text with the values of existing keys replaced, quotes kept as they are."""
        raw = self.raw
        for value, text in sorted(((self._required(key), text) for key, text in changes.items()), reverse=True):
            quote = b'"' if raw[value.start : value.start + 1] == b'"' else b""
            raw = raw[: value.start] + quote + _quoted_text(text, self.codec, self.path) + quote + raw[value.end :]
        return Descriptor.parse(raw, path=self.path, base=self.base)

    def with_parent(self, parent_cid: int, hint: str | None) -> Descriptor:
        """Return the same text for another parent; `hint` None removes the hint line."""
        changed = self.with_values({"parentCID": f"{parent_cid:08x}"})
        lines = changed.raw.split(b"\n")
        kept = [line for line in lines if not line.lower().lstrip().startswith(b"parentfilenamehint")]
        if hint is not None:
            after = next(i for i, line in enumerate(kept) if line.lower().lstrip().startswith(b"createtype"))
            end = b"\r" if kept[after].endswith(b"\r") else b""
            kept.insert(after + 1, b'parentFileNameHint="' + _quoted_text(hint, self.codec, self.path) + b'"' + end)
        return Descriptor.parse(b"\n".join(kept), path=self.path, base=self.base)

    def condensed(self) -> Descriptor:
        """Return the same without comments and blank lines, the first line aside: for where there is no room."""
        first, *lines = self.raw.split(b"\n")
        kept = [line for line in lines if line.strip() and not line.lstrip().startswith(b"#")]
        return Descriptor.parse(b"\n".join([first, *kept, b""]), path=self.path, base=self.base)

    def _required(self, key: str) -> _Value:
        value = self.values.get(key.lower())
        if value is None:
            raise FormatError(self.path, self.base, key, None, "must be in the descriptor")
        return value

    def _hex(self, key: str) -> int:
        value = self._required(key)
        digits = value.text[2:] if value.text[:2] in ("0x", "0X") else value.text
        if not 1 <= len(digits) <= 8 or not _HEX_DIGITS.issuperset(digits):
            raise FormatError(self.path, self.base + value.start, key, value.text, "must be 1 to 8 hexadecimal digits")
        return int(value.text, 16)


def is_descriptor(head: bytes) -> bool:
    """Return whether a file that begins with `head` is a descriptor in a file of its own."""
    return _looks_like(head.split(b"\0", 1)[0])


def _looks_like(raw: bytes) -> bool:
    # Some writers put blank lines or other comments first, or begin with `version=` at once; QEMU takes these too.
    for line in raw[:HEAD_BYTES].splitlines():
        text = line.removeprefix(_BOM).strip().lower()
        if (
            text.startswith((b"# disk descriptorfile", b"#disk descriptorfile"))
            or text.replace(b" ", b"") == b"version=1"
        ):
            return True
        if text and not text.startswith(b"#"):
            return False
    return False


def _is_extent(line: bytes) -> bool:
    """Return whether the line begins as that of an extent."""
    first, blank, _ = line.lstrip(_BLANK).replace(b"\t", b" ").partition(b" ")
    return bool(blank) and first.upper() in (b"RW", b"RDONLY", b"NOACCESS")


def _key_and_value(line: bytes) -> tuple[str, int, int] | None:
    """Return the key of a line `KEY = VALUE` in lower case, and where its value begins and ends."""
    body = line.removesuffix(b"\r")
    name, equals, value = body.partition(b"=")
    key = name.strip(_BLANK)
    if not equals or b"\r" in body or key[:1].strip(_LETTERS) or key.translate(None, _OF_KEYS) or not key:
        return None
    start = len(body) - len(value.lstrip(_BLANK))
    return key.decode("ascii").lower(), start, max(start, len(body.rstrip(_BLANK)))


def _encoding(raw: bytes) -> str | None:
    """Return the encoding that the descriptor names, if it does."""
    for line in raw.split(b"\n"):
        found = _key_and_value(line)
        if found is not None and found[0] == "encoding":
            name = line[found[1] : found[2]].removeprefix(b'"').removesuffix(b'"')
            if name and not name.translate(None, _OF_KEYS + b":"):
                return name.decode("ascii")
    return None


def _codec_of(raw: bytes) -> str:
    name = _encoding(raw) if b"encoding" in raw.lower() else None
    if name is None:
        return "utf-8"
    # QEMU and others never look at the name. What is not ASCII is then kept as the bytes of a file name.
    return _CODECS.get(name.lower().replace("_", "-").partition(":")[0], "ascii")


def _decode(value: bytes, codec: str) -> str:
    # Bytes that are not in the encoding are kept as they are: QEMU never looks at `encoding`.
    return value.decode(codec, "surrogateescape")


def _spelled(text: str, codec: str) -> str:
    """Return `text`, with the bytes that it was read from if these may be a file's name too."""
    if codec == "utf-8" or text.isascii():
        return text
    name = DecodedName(text)
    name.raw = os.fsdecode(text.encode(codec, "surrogateescape"))
    return name


def _unquote(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    return _unescape(text[1:-1])


def _unescape(text: str) -> str:
    text = text.replace('\\"', '"')
    return re.sub(_BAR_ESCAPE, lambda found: chr(int(found[1], 16)), text) if "|" in text else text


def _quoted_text(text: str, codec: str, path: Path) -> bytes:
    if any(ord(char) < 32 or char == '"' for char in text):
        raise InvalidRequest(
            path, f"{text!r} cannot be written into a descriptor: it contains a quote or a control character"
        )
    if "|" in text and re.search(_BAR_ESCAPE, text):
        raise InvalidRequest(path, f"{text!r} cannot be written into a descriptor: readers take its bar for an escape")
    try:
        return text.encode(codec, "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidRequest(path, f"{text!r} cannot be written in the descriptor's encoding {codec}") from error


def _parse_extent(line: bytes, codec: str, path: Path, at: int) -> ExtentLine:
    shown = _decode(line.rstrip(b"\r"), codec)
    found = _plain_extent(shown) or _any_extent(shown)
    if found is None:
        raise FormatError(path, at, "extent", shown, 'must be ACCESS SECTORS TYPE ["FILE" [OFFSET]]')
    access, sectors, kind, name, offset = found
    kind = kind.upper()
    if kind not in MODULES:
        raise FormatError(path, at, "extent", shown, f"must have a type of {', '.join(MODULES)}")
    if name is None and kind != "ZERO":
        raise FormatError(path, at, "extent", shown, f"must name a file: its type is {kind}")
    if not _is_number(sectors) or not _is_number(offset):
        raise FormatError(path, at, "extent", shown, "must give sectors and offset as decimal numbers")
    file = None if name is None or kind == "ZERO" else _spelled(_unescape(name), codec)
    return ExtentLine(access.upper(), int(sectors), kind, file, int(offset), at)


_Extent = tuple[str, str, str, str | None, str]
"""Access, sectors, type, file and offset, as they are written."""


def _plain_extent(shown: str) -> _Extent | None:
    """Return the parts of an extent's line that is as every program writes it."""
    before, *quoted = shown.split('"')
    words = before.replace("\t", " ").split(" ")
    if "\\" in shown or len(quoted) not in (0, 2) or not all(word.isascii() and word.isalnum() for word in words[:3]):
        return None
    if len(words) != (4 if quoted else 3) or any(words[3:]) or words[0].upper() not in ACCESS or not words[2].isalpha():
        return None
    if not quoted:
        return words[0], words[1], words[2], None, "0"
    offset = quoted[1].strip(" ")
    if quoted[1] and not (quoted[1].startswith(" ") and (not offset or _is_number(offset))):
        return None
    return words[0], words[1], words[2], quoted[0], offset or "0"


def _any_extent(shown: str) -> _Extent | None:
    """Return the parts of any extent's line."""
    found = re.match(_EXTENT_LINE, shown)
    return found and (found["access"], found["sectors"], found["type"], found["file"], found["offset"] or "0")


def _is_number(text: str) -> bool:
    return 1 <= len(text) <= 19 and text.isascii() and text.isdigit()


def make_descriptor(
    *,
    cid: int,
    parent_cid: int,
    create_type: str,
    hint: str | None,
    extents: Sequence[tuple[str, int, str, str | None, int | None]],
    ddb: Mapping[str, str],
    path: Path,
) -> bytes:
    """Return the text of a new descriptor, in the form that every reader accepts.

    `extents` are (access, sectors, type, file, offset); the offset is written only where it is not None. Text outside
    ASCII adds the line `encoding="UTF-8"`.

    Raises:
        InvalidRequest: a name contains a quote or a control character, which the format cannot store.
    """

    def text(value: str) -> str:
        return _quoted_text(value, "utf-8", path).decode("utf-8", "surrogateescape")

    names = [hint or "", *(file or "" for _, _, _, file, _ in extents)]
    lines = [FIRST_LINE, "version=1"]
    if not all(name.isascii() for name in names):
        lines.append('encoding="UTF-8"')
    lines += [f"CID={cid:08x}", f"parentCID={parent_cid:08x}", f'createType="{create_type}"']
    if hint is not None:
        lines.append(f'parentFileNameHint="{text(hint)}"')
    lines += ["", "# Extent description"]
    for access, sectors, kind, file, offset in extents:
        line = f"{access} {sectors} {kind}"
        if file is not None:
            line += f' "{text(file)}"'
        lines.append(line if offset is None else f"{line} {offset}")
    lines += ["", "# The Disk Data Base", "#DDB", ""]
    lines += [f'ddb.{key} = "{text(value)}"' for key, value in ddb.items()]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
