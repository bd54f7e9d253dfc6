"""UEFI variables in a snapshot: a copy is frozen with the disks, and is what the domain has again after a revert.

No record tells of the copy: the XML of the snapshot names it, and that is in the record of every operation.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap import replace_file
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.xml.nvram import frozen_nvram, has_tpm_state, next_copy, nvram_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import libvirt

_MOST_BYTES: Final = 64 << 20
_TRIES: Final = 5


def plan_nvram(domain_xml: str) -> tuple[Path | None, list[tuple[str, str]]]:
    """Return the copy that a snapshot is to freeze, None if there is none; and what it cannot: (what, why)."""
    left_out = []
    if has_tpm_state(domain_xml):
        left_out.append(("tpm", "its state is swtpm's, and stays what it is when the domain is reverted"))
    found = nvram_of(domain_xml)
    if found is None:
        return None, left_out
    reason = _obstacle(found.path, raw=found.raw)
    if reason is not None or found.path is None:
        left_out.append(("nvram", f"{reason}: the UEFI variables stay what they are when the domain is reverted"))
        return None, left_out
    return next_copy(found.path), left_out


def _obstacle(path: Path | None, *, raw: bool) -> str | None:
    if path is None:
        return "the XML names no file of UEFI variables"
    if not raw:
        return f"{path} is no raw file"
    try:
        with path.open("rb") as file:
            too_large = os.fstat(file.fileno()).st_size > _MOST_BYTES
    except FileNotFoundError:
        return f"{path} does not exist yet"
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"no copy can be made in {path.parent}"
    return f"{path} is larger than {_MOST_BYTES >> 20} MiB" if too_large else None


def freeze_nvram(domain_xml: str, copy: Path) -> None:
    """Make the copy of the domain's UEFI variables, durable, with their owner and mode.

    A guest may write meanwhile: what is copied is what two reads in a row agree on, if any do.

    Raises:
        OSError: it cannot be made, or something bears its name.
    """
    found = nvram_of(domain_xml)
    if found is not None and found.path is not None:
        replace_file(copy, _settled(found.path), like=found.path, new=True)


def discard_nvram(conn: libvirt.virConnect, domain: libvirt.virDomain, snapshot_xml: str) -> None:
    """Unlink the copy that a snapshot froze, unless the XML of another snapshot or of a domain names it."""
    copy = frozen_nvram(snapshot_xml) if snapshot_xml else None
    discard_copies(conn, domain, [] if copy is None else [copy])


def discard_copies(conn: libvirt.virConnect, domain: libvirt.virDomain, copies: Collection[Path | str]) -> None:
    """Unlink those of the copies that the XML of no snapshot and no domain names.

    Raises:
        DomainError: libvirt reports an error.
        OSError: one cannot be unlinked.
    """
    if not copies:
        return
    with libvirt_errors(domain.name(), "see who names its UEFI variables"):
        texts = [text for one in conn.listAllDomains() for text in _texts(one)]
    for copy in copies:
        if not any(str(copy) in text for text in texts):
            Path(copy).unlink(missing_ok=True)


def restore_nvram(snapshot_xml: str, domain_xml: str) -> str | None:
    """Let the domain, which must be shut off, have the UEFI variables of the snapshot. Return what hinders that.

    It can be done again. What the domain had is lost, as with firmware that is set back.
    """
    copy, found = frozen_nvram(snapshot_xml), nvram_of(domain_xml)
    if found is None or found.path is None:
        return None
    if copy is None:
        return "the snapshot has no UEFI variables: they stay what they are"
    try:
        data = copy.read_bytes()
        if not found.path.exists() or found.path.read_bytes() != data:
            replace_file(found.path, data, like=found.path if found.path.exists() else copy)
    except OSError as error:
        return f"the UEFI variables stay what they are: {error.filename or copy}: {error.strerror}"
    return None


def _texts(domain: libvirt.virDomain) -> Iterator[str]:
    yield domain.XMLDesc(0)
    for snapshot in domain.listAllSnapshots():
        yield snapshot.getXMLDesc(0)


def _settled(path: Path) -> bytes:
    data = path.read_bytes()
    for _ in range(_TRIES):
        again = path.read_bytes()
        if again == data:
            break
        data = again
    return data
