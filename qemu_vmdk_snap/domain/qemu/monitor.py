"""QEMU's monitor, reached through libvirt: commands, passed descriptors, and which node each disk of a guest uses.

libvirt marks a domain as tainted (custom-monitor) when it is spoken to like this. What QEMU says counts, not libvirt's
live XML: after a live snapshot that still names the old top, until the guest is started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from qemu_vmdk_snap.domain.connect import INSTALL_HINT, libvirt_errors
from qemu_vmdk_snap.errors import DomainError, PluginError

if TYPE_CHECKING:
    import libvirt

_PREFIX: Final = "qvs-"
_DIGITS: Final = 22
"""QEMU takes node names of up to 31 characters; the file node's has a suffix."""


@dataclass(frozen=True, slots=True)
class LiveTop:
    """What a disk of a running guest writes to."""

    target: str
    node: str
    """The format node in QEMU."""
    settled: bool
    """Whether QEMU has written the CID already: it does so once per open, with the first data."""

    @property
    def by_libvirt(self) -> bool:
        """Whether libvirt opened it: then its live XML is right about the file."""
        return self.node.startswith("libvirt-")

    def is_file(self, path: Path) -> bool:
        """Return whether it is our node for the file at `path`, as it is there now."""
        return path.exists() and self.node == node_name(path)


def node_name(path: Path) -> str:
    """Return the name of the format node that we give the file at `path`: it tells path, device and inode.

    Raises:
        OSError: there is no such file.
    """
    facts = path.stat()
    digest = hashlib.sha256(f"{facts.st_dev}:{facts.st_ino}:".encode() + os.fsencode(path))
    return _PREFIX + digest.hexdigest()[:_DIGITS]


class Monitor:
    """The monitor of one running domain."""

    def __init__(self, domain: libvirt.virDomain) -> None:
        """Talk to the QEMU of `domain`.

        Raises:
            PluginError: the binding for it is missing.
        """
        self._domain = domain
        self._name = domain.name()
        self._binding = import_binding()

    def execute(self, command: str, /, *, files: Sequence[int] = (), **arguments: object) -> Any:  # noqa: ANN401
        """Return what QEMU answers; underscores in names of arguments stand for dashes.

        Raises:
            DomainError: QEMU refuses, or libvirt cannot ask it.
        """
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        text = json.dumps({"execute": command, "arguments": words})
        with libvirt_errors(self._name, f"ask QEMU to {command}"):
            if files:
                answer, _ = self._binding.qemuMonitorCommandWithFiles(self._domain, text, list(files), 0)
            else:
                answer = self._binding.qemuMonitorCommand(self._domain, text, 0)
        reply = json.loads(answer)
        if "error" in reply:
            reason = " ".join(str(reply["error"].get("desc", "no reason given")).split())
            raise DomainError(self._name, f"QEMU refuses {command}: {reason}")
        return reply["return"]

    def tops(self) -> dict[str, LiveTop]:
        """Return what each disk writes to, by target; a disk without a medium is left out."""
        with libvirt_errors(self._name, "read its live XML"):
            live = ET.fromstring(self._domain.XMLDesc(0))
        devices = self.execute("query-blockstats")
        found = {}
        for disk in live.findall("./devices/disk"):
            target, alias = disk.find("target"), disk.find("alias")
            if target is None or alias is None:
                continue
            name = alias.get("name", "")
            device = next((d for d in devices if "node-name" in d and name in _words(d.get("qdev", ""))), None)
            if device is not None:
                stats = device["stats"]
                # A failed write counts as one too, but may have failed before the CID was written.
                settled = stats["wr_highest_offset"] > 0 and not stats["failed_wr_operations"]
                found[target.get("dev", "")] = LiveTop(target.get("dev", ""), device["node-name"], settled)
        return found

    def nodes(self) -> set[str]:
        """Return the names of all block nodes."""
        return {node["node-name"] for node in self.execute("query-named-block-nodes", flat=True)}

    def add_overlay(self, path: Path, cache: dict[str, bool]) -> str:
        """Open the overlay in QEMU, on nothing yet, by a passed descriptor; return the name of its node.

        QEMU's process may not be allowed to open the path (owner, AppArmor, SELinux, mount namespace). One descriptor
        is enough, and only until QEMU has its own copy of it: a file node that is added by itself, without
        `auto-read-only`, stays open for writing while the format node above it is reopened read-only, and writable
        again for a merge.

        Raises:
            DomainError: QEMU refuses; nothing of it is left there.
        """
        node = node_name(path)
        try:
            fdset = self._pass_file(path)
            name = f"{node}-file"
            self.execute("blockdev-add", driver="file", filename=f"/dev/fdset/{fdset}", node_name=name, cache=cache)
            self.execute("remove-fd", fdset_id=fdset)
            self.execute("blockdev-add", driver="vmdk", file=name, backing=None, node_name=node, cache=cache)
        except BaseException:
            self.drop_overlay(path)
            raise
        return node

    def drop_overlay(self, path: Path) -> None:
        """Close the overlay in QEMU, as far as it is open there and nothing stands on it."""
        node, present = node_name(path), self.nodes()
        for name in (node, f"{node}-file"):
            if name in present:
                self.execute("blockdev-del", node_name=name)
        self._release(path)

    def _release(self, path: Path) -> None:
        """Let QEMU close what it was passed for the file, where a command has died before it used that."""
        for fdset in self.execute("query-fdsets"):
            if any(entry.get("opaque") == str(path) for entry in fdset["fds"]):
                self.execute("remove-fd", fdset_id=fdset["fdset-id"])

    def _pass_file(self, path: Path) -> int:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return int(self.execute("add-fd", files=[fd], opaque=str(path))["fdset-id"])
        finally:
            os.close(fd)


def _words(qdev: str) -> list[str]:
    """Return the parts of a device's path: `/machine/peripheral/virtio-disk0/virtio-backend`, or only its id."""
    return qdev.split("/")


def import_binding() -> ModuleType:
    """Return the binding that reaches QEMU's monitor and the guest's agent.

    Raises:
        PluginError: it is missing.
    """
    try:
        import libvirt_qemu
    except ImportError as error:
        raise PluginError("libvirt_qemu", f"its Python binding is missing: {INSTALL_HINT}") from error
    module: ModuleType = libvirt_qemu
    return module
