"""Archives that the kernel unpacks: cpio, "newc": 110 bytes of ASCII, the name, the data, each padded to 4 bytes.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from typing import Final

_HEADER: Final = 110


def write_cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """Return the archive of (name, mode, content); the same entries give the same bytes."""
    out = io.BytesIO()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        links = 2 if stat.S_ISDIR(mode) else 1
        encoded = name.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        out.write(bytes(-out.tell() % 4) + data)
        out.write(bytes(-out.tell() % 4))
    return out.getvalue()


def read_cpio(archive: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Give (name, mode, content) of each entry.

    Raises:
        ValueError: it is no such archive, or ends too early.
    """
    at = 0
    while True:
        header = archive[at : at + _HEADER]
        if len(header) < _HEADER or header[:6] not in (b"070701", b"070702"):
            raise ValueError(f"cpio archive: no header at byte {at:#x}")
        fields = [int(header[n : n + 8], 16) for n in range(6, _HEADER, 8)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + _HEADER : at + _HEADER + name_size - 1].decode()
        if name == "TRAILER!!!":
            return
        start = at + _HEADER + name_size
        start += -start % 4
        if start + size > len(archive):
            raise ValueError(f"cpio archive: {name} ends after the archive")
        yield name.removeprefix("./").removeprefix("/"), mode, archive[start : start + size]
        at = start + size + -(start + size) % 4
