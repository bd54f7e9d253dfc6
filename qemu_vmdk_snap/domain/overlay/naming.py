"""The name of a disk's next overlay, and of a snapshot without a name."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final, Literal

from qemu_vmdk_snap.errors import InvalidRequest

NamingRule = Literal["number", "uuid"]
"""How overlays are named; see `next_overlay`."""

_NUMBERED: Final = re.compile(r"^(?P<stem>.+)-\d{6}$")
_NOT_XML: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_MAX_NAME: Final = 255
_MAX_SNAPSHOT_NAME: Final = 250 - len(".xml")
"""Bytes. libvirt keeps each snapshot in a file NAME.xml, written under a slightly longer name first."""


def next_overlay(disk: Path, taken: Collection[Path] = (), rule: NamingRule = "number") -> Path:
    """Return the first free name after VMware's rule: `NAME-000001.vmdk` beside `NAME.vmdk`, and so on from there.

    The number of a disk that is itself an overlay is increased. With the rule `uuid` it is `UUID.vmdk`, a random one.
    Names in `taken` and names that exist are skipped. The name is a proposal: it must be created without overwriting.

    Raises:
        InvalidRequest: every number is taken, the name would be too long, or there is no such rule.
    """
    if rule == "uuid":
        return _uuid_overlay(disk, taken)
    if rule != "number":
        raise InvalidRequest("naming", f"{rule!r} must be number or uuid")
    stem = disk.name.removesuffix(".vmdk")
    match = _NUMBERED.match(stem)
    base, number = (match["stem"], int(stem[-6:])) if match else (stem, 0)
    for candidate in range(number + 1, 1_000_000):
        path = disk.with_name(f"{base}-{candidate:06d}.vmdk")
        if len(os.fsencode(path.name)) > _MAX_NAME:
            raise InvalidRequest(disk, f"its overlay's name {path.name[:40]}... would be longer than {_MAX_NAME} bytes")
        if path not in taken and not os.path.lexists(path):
            return path
    raise InvalidRequest(disk, f"no name {base}-NNNNNN.vmdk is left for its overlay")


def _uuid_overlay(disk: Path, taken: Collection[Path]) -> Path:
    import uuid

    while True:
        path = disk.with_name(f"{uuid.uuid4()}.vmdk")
        if path not in taken and not os.path.lexists(path):
            return path


def default_snapshot_name(taken: Collection[str] = (), now: float | None = None) -> str:
    """Return the seconds since 1970, as virsh names a snapshot, or the next second that no snapshot has."""
    second = int(time.time() if now is None else now)
    while str(second) in taken:
        second += 1
    return str(second)


def check_snapshot_name(name: str) -> None:
    """Accept what libvirt accepts as a name and can use as a file name, in one line.

    Raises:
        InvalidRequest: it does not.
    """
    subject = f"snapshot name {name[:40]!r}"
    if not name:
        raise InvalidRequest(subject, "must not be empty")
    if "/" in name:
        raise InvalidRequest(subject, "must not contain '/'")
    if name.startswith("."):
        raise InvalidRequest(subject, "must not start with '.'")
    if not name.isprintable() or name != name.strip():
        raise InvalidRequest(subject, "must be printable, without spaces at its ends")
    if len(os.fsencode(name)) > _MAX_SNAPSHOT_NAME:
        raise InvalidRequest(subject, f"must be at most {_MAX_SNAPSHOT_NAME} bytes long")


def check_description(text: str) -> None:
    """Accept text that XML can contain.

    Raises:
        InvalidRequest: it contains a control character.
    """
    if _NOT_XML.search(text):
        raise InvalidRequest("description", "must not contain control characters")


def check_domain_name(name: str) -> None:
    """Accept what libvirt accepts as the name of a domain, and what can begin the name of a file.

    Raises:
        InvalidRequest: it does not.
    """
    subject = f"domain name {name[:40]!r}"
    if not name or name.startswith((".", "-")) or "/" in name:
        raise InvalidRequest(subject, "must not be empty, contain '/', or start with '.' or '-'")
    if not name.isprintable() or name != name.strip():
        raise InvalidRequest(subject, "must be printable, without spaces at its ends")
    if len(os.fsencode(name)) > _MAX_SNAPSHOT_NAME - len("-vda.vmdk"):
        raise InvalidRequest(subject, f"must be at most {_MAX_SNAPSHOT_NAME - len('-vda.vmdk')} bytes long")
