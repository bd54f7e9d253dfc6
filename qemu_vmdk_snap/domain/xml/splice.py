"""Where in an XML text an element is, in bytes: what is changed is spliced in, and all else stays as it was."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from xml.parsers import expat

from qemu_vmdk_snap.errors import DomainError


def spans(raw: bytes, wanted: list[str]) -> list[tuple[int, int]]:
    """Return where in the text each element of the path `wanted` begins and ends."""
    path: list[str] = []
    starts: list[int] = []
    found: list[tuple[int, int]] = []
    parser = expat.ParserCreate()

    def start(name: str, _attributes: dict[str, str]) -> None:
        path.append(name)
        if path == wanted:
            starts.append(parser.CurrentByteIndex)

    def end(_name: str) -> None:
        if path == wanted:
            at = parser.CurrentByteIndex
            # Of `<disk>...</disk>` that is where the end tag begins; of `<disk/>` where it begins, or where it ends.
            if raw[at:].startswith(f"</{path[-1]}".encode()):
                at = raw.index(b">", at) + 1
            elif at == starts[-1]:
                at = raw.index(b"/>", at) + 2
            found.append((starts[-1], at))
        path.pop()

    parser.StartElementHandler, parser.EndElementHandler = start, end
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as error:
        raise DomainError("XML", f"cannot be read: {error}") from error
    return found


def spliced(raw: bytes, places: list[tuple[int, int]], change: Callable[[ET.Element], bool]) -> bytes:
    """Return the text with the elements at `places` as `change` has made them; where it returns False they stay."""
    pieces, last = [], 0
    for start, end in places:
        element = ET.fromstring(raw[start:end])
        if change(element):
            element.tail = None
            pieces += [raw[last:start], ET.tostring(element, encoding="unicode").encode()]
            last = end
    return b"".join([*pieces, raw[last:]])
