"""The identity of an image (its CID) and its name for its parent: the one place where both are written.

A CID changes when a disk is written; longContentID (VMware) ends in it, and VirtualBox keeps a modification UUID beside
it. A parent is named relative to the folder of its overlay, as both may move together.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor

_MIN_DIGITS: Final = 5
"""A CID with fewer digits is written with eight from then on: five leave a million values to choose from."""

_MODIFICATION: Final = "ddb.uuid.modification"


def new_cid(*, avoid: int = NO_PARENT, digits: int = 8) -> int:
    """Return a random CID of so many digits that is neither `avoid` nor a value with a special meaning."""
    while True:
        cid = int.from_bytes(os.urandom(4), "big") >> (32 - 4 * digits)
        if cid not in (avoid, 0, NO_PARENT, NO_PARENT - 1):
            return cid


def with_fresh_cid(descriptor: Descriptor) -> Descriptor:
    """Return `descriptor` with a new CID of as many digits as before, and the values derived from it."""
    value = descriptor.values["cid"]
    digits = value.end - value.start
    width = digits if _MIN_DIGITS <= digits <= 8 else 8
    return with_cid(descriptor, new_cid(avoid=descriptor.cid, digits=width), width)


def with_cid(descriptor: Descriptor, cid: int, digits: int = 8) -> Descriptor:
    """Return `descriptor` with the CID, longContentID in step with it, and a new modification UUID where it has one."""
    changes = {"CID": f"{cid:0{digits}x}"}
    long_id = descriptor.get("ddb.longContentID")
    if long_id is not None and len(long_id) >= 8:
        changes["ddb.longContentID"] = f"{long_id[:-8]}{cid:08x}"
    if descriptor.get(_MODIFICATION):
        changes[_MODIFICATION] = random_uuid()
    return descriptor.with_values(changes)


def random_uuid() -> str:
    """Return a UUID of version 4 (RFC 9562, 5.4); importing the `uuid` module takes longer than all of this."""
    raw = bytearray(os.urandom(16))
    raw[6], raw[8] = raw[6] & 0x0F | 0x40, raw[8] & 0x3F | 0x80
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def on_parent(descriptor: Descriptor, child: Path, parent: Path | None, parent_cid: int) -> Descriptor:
    """Return the descriptor of `child` for another parent; None makes it a base."""
    if parent is None:
        return descriptor.with_parent(NO_PARENT, None)
    return descriptor.with_parent(parent_cid, hint_to(child, parent))


def hint_to(child: Path, parent: Path) -> str:
    """Return the hint from `child` to `parent`: relative, and not read as a protocol by QEMU."""
    return no_protocol(os.path.relpath(parent.parent.resolve() / parent.name, child.parent.resolve()))


def no_protocol(name: str) -> str:
    """Return the name of a file so that QEMU does not take what is before a colon for a protocol: `./r:b.vmdk`."""
    return f"./{name}" if ":" in name.split("/", 1)[0] else name
