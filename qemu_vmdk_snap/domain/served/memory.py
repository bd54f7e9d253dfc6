"""The memory of a guest in a file: saved at the instant that its served disks stand still, and brought back.

libvirt saves the memory and leaves the guest paused (`snapshot='manual'`: the disks are left to the caller), and it
restores such a file like any saved state. It registers nothing: the snapshot is registered by us. libvirt's own revert
is never called: it refuses on 9.0, and ends the guest before it does on later versions.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import quoteattr

from qemu_vmdk_snap import log
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import libvirt_errors
from qemu_vmdk_snap.domain.xml.served import ServedDisk, served_view, with_notes_of
from qemu_vmdk_snap.errors import DomainError, InvalidRequest

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)
_MAGIC: Final = (b"LibvirtQemudSave", b"LibvirtQemudPart")
"""Of a saved state that is complete, and of one that is being written. Source: libvirt, src/qemu/qemu_saveimage.h."""

_HEADER: Final = struct.Struct("<16sII")
_HEADER_BYTES: Final = 92
_MAX_XML: Final = 1 << 20
_NOT_WRITTEN: Final = ("is a cdrom", "is a floppy", "is read-only")
"""Refusals of disks whose contents a return to the snapshot need not bring back."""


def check_memory(
    domain: libvirt.virDomain,
    file: Path,
    disks: Sequence[xml.Disk],
    taking_part: Collection[str],
    served: Collection[str],
) -> None:
    """Accept a snapshot with memory: the guest runs, and every disk that it writes is served and takes part.

    Raises:
        DomainError: that is not so, and which disk it is.
        InvalidRequest: something bears the name of the file, or it has no folder.
    """
    name = domain.name()
    if not domain.isActive():
        raise DomainError(name, "is shut off: there is no memory to save; take the snapshot without --memspec")
    for disk in disks:
        if (disk.refusal or "").startswith(_NOT_WRITTEN):
            continue
        if disk.target not in served and disk.refusal is None:
            ways = f"`serve attach {name} {disk.target}`, while it is shut off, lets our server serve it"
            raise DomainError(name, f"disk {disk.target}: QEMU's vmdk driver cannot save the guest's memory: {ways}")
        if disk.target not in taking_part:
            reason = f"disk {disk.target} {disk.refusal or 'is left out'}"
            raise DomainError(name, f"{reason}: memory without what the guest writes there could never be restored")
    with libvirt_errors(name, "read its live XML"):
        live = {disk.target for disk in xml.list_disks(domain.XMLDesc(0), lambda _pool, _volume: file)}
    for target in sorted(live - {disk.target for disk in disks}):  # libvirt would put an overlay of its own on it
        raise DomainError(name, f"disk {target} was plugged in while it runs, and is not in its persistent XML")
    if not file.is_absolute():
        raise InvalidRequest(file, "must be an absolute path: libvirt writes it")
    if os.path.lexists(file):
        raise InvalidRequest(file, "exists: it is not overwritten")
    if not file.parent.is_dir():
        raise InvalidRequest(file, "is in no folder that is there")


def save_memory(domain: libvirt.virDomain, file: Path, served: Collection[str], others: Collection[str]) -> None:
    """Save the guest's memory in the file while it runs, and leave it paused at the instant that the file has.

    Raises:
        DomainError: libvirt cannot.
    """
    import libvirt

    disks = [(target, "manual") for target in served] + [(target, "no") for target in others]
    text = (
        f"<domainsnapshot><name>memory</name><memory snapshot='external' file={quoteattr(str(file))}/><disks>"
        + "".join(f"<disk name={quoteattr(target)} snapshot='{mode}'/>" for target, mode in disks)
        + "</disks></domainsnapshot>"
    )
    # Live: the guest runs on until all but its last pages are written.
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
    with libvirt_errors(domain.name(), "save its memory"):
        domain.snapshotCreateXML(text, flags)
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)  # barrier: the snapshot is registered only once its memory is durable
    finally:
        os.close(fd)
    _log.info("domain %s: its memory is in %s", domain.name(), file)


def saved_xml(file: Path, domain: str, uuid: str, *, complete: bool = True) -> str:
    """Return the XML of the domain inside a saved state.

    Raises:
        DomainError: it is none, none of this domain, or not complete where that is asked for.
        OSError: it cannot be read.
    """
    if not file.exists():
        raise DomainError(domain, f"{file}, which has its memory, is not there")
    with file.open("rb") as saved:
        head = saved.read(_HEADER_BYTES)
        if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
            raise DomainError(domain, f"{file} is no saved memory of libvirt's")
        magic, _version, length = _HEADER.unpack_from(head)
        text = saved.read(min(length, _MAX_XML)).split(b"\0")[0].decode("utf-8", "replace")
    if f"<uuid>{uuid}</uuid>" not in text:
        raise DomainError(domain, f"{file} is the saved memory of another domain")
    if complete and magic != _MAGIC[0]:
        raise DomainError(domain, f"{file} is not complete: saving it was interrupted")
    return text


def check_restorable(
    domain: libvirt.virDomain, file: Path, targets: Collection[str], served: Mapping[str, ServedDisk]
) -> None:
    """Accept a file with memory that the domain can resume from, on these disks, which are `served`.

    Raises:
        DomainError: it cannot; nothing has been changed.
        OSError: the file cannot be read.
    """
    name = domain.name()
    text = saved_xml(file, name, domain.UUIDString())
    then = xml.root_of(text).findtext("name", "")
    if then != name:
        raise DomainError(name, f"had the name {then!r} when {file} was made, and libvirt restores it under that alone")
    hosts = {host.get("socket") for host in xml.root_of(text).iterfind("./devices/disk/source/host")}
    for target in targets:
        if target not in served:
            raise DomainError(name, f"disk {target}: the snapshot has memory, and its XML tells of no served disk")
        if str(served[target].socket) not in hosts:
            reason = f"disk {target}: the memory in {file} expects it elsewhere than at {served[target].socket}"
            raise DomainError(name, reason)


def restore_memory(conn: libvirt.virConnect, domain: libvirt.virDomain, file: Path, now: str, *, paused: bool) -> None:
    """Let the shut-off domain, whose disks are served as they were then, resume from the file.

    `now` is its persistent XML, a direct view: what it says of served disks goes into the live XML.

    Raises:
        DomainError: libvirt cannot.
    """
    import libvirt

    flags = libvirt.VIR_DOMAIN_SAVE_PAUSED if paused else libvirt.VIR_DOMAIN_SAVE_RUNNING
    with libvirt_errors(domain.name(), f"restore its memory from {file}"):
        then = conn.saveImageGetXMLDesc(str(file), libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE)
        conn.restoreFlags(str(file), with_notes_of(served_view(then), served_view(now)), flags)
    _log.info("domain %s: its memory is restored from %s", domain.name(), file)


def memory_files(domain: str, uuid: str, snapshots: Iterable[str]) -> list[Path]:
    """Return the files with the memory of a domain that these snapshots name, by their XML, and that are there."""
    found = []
    for text in snapshots:
        file = xml.parse_snapshot(text).memory_file
        with contextlib.suppress(DomainError, OSError):
            if file is not None and saved_xml(file, domain, uuid, complete=False):
                found.append(file)
    return list(dict.fromkeys(found))


def unlink_memory(file: str | None, domain: str, uuid: str) -> bool:
    """Delete the file if it is saved memory of the domain, complete or not; return whether it was.

    Raises:
        OSError: it cannot be deleted.
    """
    if file is None:
        return False
    path = Path(file)
    with contextlib.suppress(FileNotFoundError, DomainError):
        if path.stat().st_size:  # an empty one was made, and nothing has been written
            saved_xml(path, domain, uuid, complete=False)
        path.unlink()
        _log.info("domain %s: %s is deleted", domain, path)
        return True
    return False
