"""The identity of an image (its CID) and its name for its parent: the one place where both are written.

A CID changes when a disk is written; longContentID (VMware) ends in it, and VirtualBox keeps a modification UUID beside
it. A parent is named relative to the folder of its overlay, as both may move together.
"""

from __future__ import annotations

import os
from pathlib import Path

from qemu_vmdk_snap.errors import Unsupported
from qemu_vmdk_snap.light import Final
from qemu_vmdk_snap.vmdk.descriptor import NO_PARENT, Descriptor

_MIN_DIGITS: Final = 5
"""A CID with fewer digits is written with eight from then on: five leave a million values to choose from."""

_MODIFICATION: Final = "ddb.uuid.modification"
# VirtualBox finds a parent by these alone: those of an overlay are what its parent has as image and modification.
_IMAGE, _PARENT, _PARENT_MODIFICATION = "ddb.uuid.image", "ddb.uuid.parent", "ddb.uuid.parentmodification"
_NIL: Final = "00000000-0000-0000-0000-000000000000"


def new_cid(*, avoid: int = NO_PARENT, digits: int = 8) -> int:
    """Return a random CID of so many digits that is neither `avoid` nor a value with a special meaning."""
    while True:
        cid = int.from_bytes(os.urandom(4), "big") >> (32 - 4 * digits)
        if cid not in (avoid, 0, NO_PARENT, NO_PARENT - 1):
            return cid


def with_fresh_cid(descriptor: Descriptor) -> Descriptor:
    """Return `descriptor` with a new CID of as many digits as before, and the values derived from it."""
    value = descriptor.values.get("cid")
    if value is None or value.text[:2] in ("0x", "0X"):
        shown = None if value is None else value.text
        feature = f"CID = {shown!r}: such a descriptor is read, but not written: no other program would follow it"
        raise Unsupported(descriptor.path, f"byte {descriptor.base + (value.start if value else 0):#x}: {feature}")
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


def base_uuids() -> dict[str, str]:
    """Return what VirtualBox wants in the disk database of a new image without a parent; keys without `ddb.`.

    VirtualBox adds its UUIDs to an image that it opens, and an overlay made before then would never find its base.
    """
    own = {"uuid.image": random_uuid(), "uuid.modification": random_uuid()}
    return {**own, "uuid.parent": _NIL, "uuid.parentmodification": _NIL}


def overlay_uuids(base: Descriptor) -> dict[str, str]:
    """Return what VirtualBox wants in the disk database of a new overlay, in step with its base; keys without `ddb.`.

    Nothing on a base that has none: it is not written for that, as other overlays may need it as it is.
    """
    if not (image := base.get(_IMAGE)):
        return {}
    own = {"uuid.image": random_uuid(), "uuid.modification": random_uuid()}
    return {**own, "uuid.parent": image, "uuid.parentmodification": base.get(_MODIFICATION) or _NIL}


def fitting_parent(descriptor: Descriptor, parent: Descriptor | None) -> Descriptor:
    """Return an overlay's `descriptor` with the CID, and VirtualBox's UUIDs where it has them, of `parent`."""
    changes = {"parentCID": f"{NO_PARENT if parent is None else parent.cid:08x}"}
    for key, theirs in ((_PARENT, _IMAGE), (_PARENT_MODIFICATION, _MODIFICATION)):
        if descriptor.get(key):
            changes[key] = (None if parent is None else parent.get(theirs)) or _NIL
    return descriptor.with_values(changes)


def on_parent(descriptor: Descriptor, child: Path, parent: Path | None, below: Descriptor | None) -> Descriptor:
    """Return the descriptor of `child` for another parent, whose descriptor is `below`; None makes it a base."""
    fit = fitting_parent(descriptor, below)
    if parent is None or below is None:
        return fit.with_parent(NO_PARENT, None)
    return fit.with_parent(below.cid, hint_to(child, parent))


def hint_to(child: Path, parent: Path) -> str:
    """Return the hint from `child` to `parent`: relative, and not read as a protocol by QEMU."""
    return no_protocol(os.path.relpath(parent.parent.resolve() / parent.name, child.parent.resolve()))


def no_protocol(name: str) -> str:
    """Return the name of a file so that QEMU does not take what is before a colon for a protocol: `./r:b.vmdk`."""
    return f"./{name}" if ":" in name.split("/", 1)[0] else name
