"""What a file says that it needs: its parent, its extents, its data file; read from its head alone.

Used to find what depends on a file. So it is read with tolerance: whatever else is damaged, a name that can be read
counts, and a file that may contain a name that cannot be read has a `problem`. The rules of the formats:

    VMDK, hosted sparse  `KDMV`: the descriptor at descriptorOffset. An extent of a split disk has none.
    VMDK, descriptor     text: `parentFileNameHint` (also where parentCID says that there is no parent: several writers
                         give a base the CID ffffffff), and the extent lines.
    COWD                 bit 0 of the flags clear: the parent's name at byte 32, 1024 bytes.
    qcow, qcow2          big-endian: the backing file's name at (u64 at byte 8), length u32 at 16; an external data file
                         in the header extension 0x44415441. A name may be `json:{...}`. Source: QEMU's qcow2.txt.
    QED                  little-endian: bit 0 of the features (u64 at 16), the name at u32 56, length 60.
                         Source: QEMU docs/interop/qed_spec.txt.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from qemu_vmdk_snap.vmdk.descriptor import FIRST_LINE, MAX_BYTES, NO_PARENT, is_descriptor

Role = Literal["parent", "extent", "data"]

HEAD_BYTES: Final = 4096
_SEARCHED: Final = 64 << 10
"""How much is searched for a descriptor that is not where its header says."""

_SECTOR: Final = 512
_KEY: Final = re.compile(rb"^[ \t]*(parentFileNameHint|parentCID|CID|encoding)[ \t]*=[ \t]*([^\r\n]*)", re.I | re.M)
_EXTENT: Final = re.compile(rb"^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t]+\S+[ \t]+(\w+)[ \t]+\"([^\"\r\n]*)\"", re.I | re.M)
_DATA_FILE: Final = 0x44415441


class Reference(NamedTuple):
    """The name of a file that another one needs, as it is stored."""

    role: Role
    texts: tuple[str, ...]
    """The name in every encoding that it may have been written in."""


class Claims(NamedTuple):
    """What one file says."""

    names: tuple[Reference, ...] = ()
    cid: int | None = None
    """The content ID of a VMDK image with a descriptor, if it can be read."""
    parent_cid: int | None = None
    problem: str | None = None
    """Why there may be names that cannot be read, as the end of a sentence about the file."""
    blank: bool = False
    """Whether the room for its descriptor holds zeros: QEMU leaves it so in the extents of a split disk."""

    @property
    def nameless_parent(self) -> bool:
        """Whether it has a parent and does not say where (VirtualBox finds it by a UUID)."""
        has_parent = self.parent_cid not in (None, NO_PARENT)
        return has_parent and not any(name.role == "parent" for name in self.names)


NOTHING: Final = Claims()


def read_claims(descriptor: int) -> Claims:
    """Return what the file that is open as `descriptor` says that it needs.

    Raises:
        OSError: it cannot be read.
    """
    head = os.pread(descriptor, HEAD_BYTES, 0)
    magic = head[:4]
    if magic == b"KDMV":
        return _hosted_sparse(descriptor, head)
    if magic == b"QFI\xfb":
        return _qcow(descriptor, head)
    if magic == b"COWD":
        return _cowd(head)
    if magic == b"QED\0":
        return _qed(descriptor, head)
    if is_descriptor(head):
        text = os.pread(descriptor, MAX_BYTES + 1, 0)
        if len(text) > MAX_BYTES:
            return Claims(problem="begins as a descriptor and is too long for one, so what it needs is unknown")
        return _descriptor(text)
    return NOTHING


def _hosted_sparse(descriptor: int, head: bytes) -> Claims:
    if len(head) < _SECTOR:
        return Claims(problem="has a header that is cut short, so what it needs is unknown")
    place, size = (value * _SECTOR for value in struct.unpack_from("<QQ", head, 28))
    if not place:
        return NOTHING  # an extent of a disk whose descriptor is another file
    text = b""
    if size <= MAX_BYTES and place < 1 << 62:
        text = os.pread(descriptor, size, place)
    if not is_descriptor(text[:HEAD_BYTES]):
        start = os.pread(descriptor, _SEARCHED, 0)
        found = start.lower().find(FIRST_LINE.lower().encode())
        if found < 0:
            problem = "has no descriptor where its header says, so what it needs is unknown"
            return Claims(problem=problem, blank=bool(text) and not text.strip(b"\0"))
        text = start[found:]
    # Embedded: what the extent line calls the file it is in does not matter.
    claims = _descriptor(text.split(b"\0", 1)[0])
    capacity = struct.unpack_from("<Q", head, 12)[0]
    return claims._replace(names=tuple(name for name in claims.names if name.role == "parent" or not capacity))


def _descriptor(text: bytes) -> Claims:
    values: dict[bytes, bytes] = {}
    for found in _KEY.finditer(text):
        values.setdefault(found[1].lower(), found[2].strip())
    encoding = values.get(b"encoding", b"").strip(b'"').decode("ascii", "replace")
    names = []
    if hint := values.get(b"parentfilenamehint", b"").removeprefix(b'"').removesuffix(b'"'):
        names.append(Reference("parent", _decoded(hint, encoding)))
    for found in _EXTENT.finditer(text):
        if found[1].upper() != b"ZERO":
            names.append(Reference("extent", _decoded(found[2], encoding)))
    return Claims(tuple(names), _hex(values.get(b"cid")), _hex(values.get(b"parentcid")))


def _decoded(raw: bytes, encoding: str) -> tuple[str, ...]:
    """Return the name as the raw bytes of a file name, and as text of the encoding, escapes undone."""
    raw = raw.replace(b'\\"', b'"')
    found = [os.fsdecode(raw)]
    for codec in (encoding, "utf-8"):
        try:
            text = raw.decode(codec)
        except (LookupError, UnicodeDecodeError, ValueError):
            continue
        found.append(text)
    for text in list(found):
        found.append(re.sub(r"\|(22|7[Cc]|0[0-9A-Fa-f]|1[0-9A-Fa-f])", lambda part: chr(int(part[1], 16)), text))
    return tuple(dict.fromkeys(text for text in found if "\0" not in text))


def _hex(value: bytes | None) -> int | None:
    if value is None:
        return None
    try:
        return int(value.strip(b'" \t'), 16)
    except ValueError:
        return None


def _cowd(head: bytes) -> Claims:
    if len(head) < 1060:
        return Claims(problem="has a header that is cut short, so what it needs is unknown")
    flags = struct.unpack_from("<I", head, 8)[0]
    name = head[32:1056].split(b"\0", 1)[0]
    if flags & 1 or not name:
        return NOTHING
    return Claims((Reference("parent", (os.fsdecode(name),)),))


def _qcow(descriptor: int, head: bytes) -> Claims:
    broken = Claims(problem="has a qcow2 header that is damaged, so what it needs is unknown")
    if len(head) < 72:
        return broken
    version, offset, length = struct.unpack_from(">IQI", head, 4)
    names = []
    if offset:
        raw = os.pread(descriptor, length, offset) if length <= 1023 and offset < 1 << 62 else b""
        if len(raw) != length or not raw:
            return broken
        try:
            names += _backing(os.fsdecode(raw), "parent")
        except ValueError:
            return Claims(problem="has a backing file whose name cannot be decoded")
    if version >= 3 and len(head) >= 104 and struct.unpack_from(">Q", head, 72)[0] & 4:
        names += [name for text in _data_files(head) for name in _backing(text, "data")]
    return Claims(tuple(names))


def _data_files(head: bytes) -> Iterator[str]:
    at = struct.unpack_from(">I", head, 100)[0]
    while at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        if not kind:
            return
        if kind == _DATA_FILE:
            yield os.fsdecode(head[at + 8 : at + 8 + length])
        at += 8 + length + -length % 8


def _qed(descriptor: int, head: bytes) -> Claims:
    if len(head) < 64:
        return Claims(problem="has a QED header that is cut short, so what it needs is unknown")
    features = struct.unpack_from("<Q", head, 16)[0]
    offset, length = struct.unpack_from("<II", head, 56)
    if not features & 1:
        return NOTHING
    raw = os.pread(descriptor, min(length, 1023), offset)
    return Claims((Reference("parent", (os.fsdecode(raw),)),))


def _backing(text: str, role: Role) -> list[Reference]:
    """Return the files that a backing file's name names; raises ValueError if it cannot be parsed."""
    if text.startswith("json:"):
        files = tuple(_filenames(json.loads(text.removeprefix("json:"))))
        return [Reference(role, (file,)) for file in files]
    if "://" in text:
        return []  # served by a host, not a file here
    plain = text.removeprefix("file:")
    # QEMU takes text before a colon for a protocol; it may be part of a file name nevertheless.
    return [Reference(role, tuple(dict.fromkeys((plain, text))))]


def _filenames(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            if isinstance(one, str) and str(key).split(".")[-1] == "filename":
                yield one.removeprefix("file:")
            else:
                yield from _filenames(one)
    elif isinstance(value, list):
        for one in value:
            yield from _filenames(one)
