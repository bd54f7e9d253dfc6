"""Where the sockets of served disks are: short paths, in a folder that only this user may change and QEMU may enter."""

from __future__ import annotations

import contextlib
import os
import stat
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap.domain.connect import embed_root, libvirt_errors
from qemu_vmdk_snap.domain.xml.served import ServedDisk
from qemu_vmdk_snap.errors import InvalidRequest

if TYPE_CHECKING:
    import libvirt

RUN_VARIABLE: Final = "QEMU_VMDK_SNAP_RUN"
CONTROL_SUFFIX: Final = ".control"
LOG_SUFFIX: Final = ".log"
NOTE_SUFFIX: Final = ".top"
_MAX_SOCKET: Final = 107
"""Bytes that the kernel takes as the path of a Unix socket."""

_OF_ROOT: Final = Path("/run/qemu-vmdk-snap")


def place_for(
    conn: libvirt.virConnect, domain: libvirt.virDomain, target: str, environ: Mapping[str, str] = os.environ
) -> ServedDisk:
    """Return where the disk would be served. Its domain's XML keeps that; nothing is made.

    Raises:
        InvalidRequest: the path of a socket would be too long, or this user has no folder for sockets.
    """
    uuid = domain.UUIDString()
    root = embed_root(conn.getURI())
    if environ.get(RUN_VARIABLE):
        socket = Path(environ[RUN_VARIABLE], f"{uuid}-{target}.sock")
    elif root is not None:
        socket = root / "s" / f"{uuid.replace('-', '')[:16]}-{target}.sock"  # the root takes up to 60 bytes
    elif os.geteuid() == 0:
        socket = _OF_ROOT / f"{uuid}-{target}.sock"
    elif environ.get("XDG_RUNTIME_DIR"):
        socket = Path(environ["XDG_RUNTIME_DIR"], "qemu-vmdk-snap", f"{uuid}-{target}.sock")
    else:
        raise InvalidRequest("XDG_RUNTIME_DIR", f"is not set, so there is no folder for sockets: set {RUN_VARIABLE}")
    disk = ServedDisk(target, socket, socket.with_name(socket.name + CONTROL_SUFFIX))
    if len(os.fsencode(disk.control)) > _MAX_SOCKET:
        raise InvalidRequest(disk.control, f"is longer than the {_MAX_SOCKET} bytes of a socket: set {RUN_VARIABLE}")
    return disk


def make_folder(disk: ServedDisk) -> None:
    """Make the folder of the sockets, which QEMU's user may pass through and nobody else may change.

    Raises:
        InvalidRequest: it is another user's, or others may write it and so could plant sockets.
    """
    folder = disk.socket.parent
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o711, parents=True)
        folder.chmod(0o711)  # whatever the umask says
    facts = folder.lstat()
    if facts.st_uid == os.geteuid() and not facts.st_mode & stat.S_IXOTH:
        folder.chmod(stat.S_IMODE(facts.st_mode) | stat.S_IXGRP | stat.S_IXOTH)  # a server keeps its own log there, too
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid not in (0, os.geteuid()):
        raise InvalidRequest(folder, "is no folder of this user: another one could plant sockets there")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InvalidRequest(folder, "may be written by others, who could plant sockets there (chmod go-w)")


def log_of(disk: ServedDisk) -> Path:
    """Return the file that the server's messages go to."""
    return disk.socket.with_name(disk.socket.name + LOG_SUFFIX)


def note_of(disk: ServedDisk) -> Path:
    """Return the file in which the server notes its top, for one that follows it."""
    return disk.socket.with_name(disk.socket.name + NOTE_SUFFIX)


def qemu_owner(conn: libvirt.virConnect, domain_xml: str) -> str | None:
    """Return `UID:GID` that libvirt starts QEMU as, by numbers; None where that is whoever asks.

    The domain's own `<seclabel model='dac'>` counts before that of the host, as libvirt has it.
    """
    if os.geteuid() != 0:
        return None
    labels = [
        one.findtext("label", "")
        for one in ET.fromstring(domain_xml).findall("seclabel")
        if one.get("model") == "dac" and one.get("type") == "static"
    ]
    with libvirt_errors("-", "ask for the user that QEMU runs as"):
        host = ET.fromstring(conn.getCapabilities()).findall("./host/secmodel")
    dac = [model for model in host if model.findtext("model") == "dac"]
    base = [one for model in dac for one in model.findall("baselabel")]
    labels += [one.text or "" for one in base if one.get("type") in ("kvm", "qemu")]
    for label in labels:
        user, colon, group = label.replace("+", "").partition(":")
        if colon and user.isdigit() and group.isdigit():
            return None if (int(user), int(group)) == (0, 0) else f"{user}:{group}"
    return None
