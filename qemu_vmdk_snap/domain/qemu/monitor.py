"""QEMU's monitor, reached through libvirt: commands, passed descriptors, and which node each disk of a guest uses.

libvirt marks a domain as tainted (custom-monitor) when it is used like this. QEMU's answers count, not libvirt's
live XML: after a live snapshot that still names the old top, until the guest is started again.
"""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from qemu_vmdk_snap import log
from qemu_vmdk_snap.domain.connect import INSTALL_HINT, libvirt_errors
from qemu_vmdk_snap.domain.qemu.graph import FILE_SUFFIX, BlockGraph, node_name
from qemu_vmdk_snap.domain.qemu.options import DriverOptions
from qemu_vmdk_snap.errors import DomainError, PluginError

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)


_OPAQUE: Final = "qemu-vmdk-snap:"
"""What the descriptors that we pass are marked with."""


@dataclass(frozen=True, slots=True)
class LiveTop:
    """What a disk of a running guest writes to."""

    target: str
    node: str
    """The format node in QEMU, below any filters."""
    settled: bool
    """Whether QEMU has written the CID already: it does so once per open, with the first data."""
    failed: int = 0
    """Failed writes that were reported to the guest since it was started."""
    job: str | None = None
    """A block job that works on the disk."""

    @property
    def by_libvirt(self) -> bool:
        """Whether libvirt opened it: then its live XML is right about the file."""
        return self.node.startswith("libvirt-") and self.node.endswith("-format")

    def is_file(self, path: Path) -> bool:
        """Return whether it is our node for the file at `path`, as it is there now."""
        return path.exists() and self.node == node_name(path)


class Monitor:
    """The monitor of one running domain."""

    def __init__(self, domain: libvirt.virDomain) -> None:
        """Talk to the QEMU of `domain`.

        Raises:
            PluginError: the binding for it is missing.
        """
        self._domain = domain
        self.domain: str = domain.name()
        self._binding = import_binding()

    def execute(self, command: str, /, *, files: Sequence[int] = (), **arguments: object) -> Any:  # noqa: ANN401
        """Return what QEMU answers; underscores in names of arguments stand for dashes.

        Raises:
            DomainError: QEMU refuses, or libvirt cannot ask it.
        """
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        text = json.dumps({"execute": command, "arguments": words})
        _log.debug("domain %s: sent to QEMU: %s", self.domain, text)
        with libvirt_errors(self.domain, f"ask QEMU to {command}"):
            if files:
                answer, _ = self._binding.qemuMonitorCommandWithFiles(self._domain, text, list(files), 0)
            else:
                answer = self._binding.qemuMonitorCommand(self._domain, text, 0)
        reply = json.loads(answer)
        if "error" in reply:
            reason = " ".join(str(reply["error"].get("desc", "no reason given")).split())
            raise DomainError(self.domain, f"QEMU refuses {command}: {reason}")
        return reply["return"]

    def tops(self) -> dict[str, LiveTop]:
        """Return what each disk writes to, by target; a disk without a medium is left out."""
        with libvirt_errors(self.domain, "read its live XML"):
            live = ET.fromstring(self._domain.XMLDesc(0))
        devices = self.execute("query-blockstats")
        graph = self.edges()
        found = {}
        for disk in live.findall("./devices/disk"):
            target, alias = disk.find("target"), disk.find("alias")
            if target is None or alias is None:
                continue
            name = alias.get("name", "")
            device = next((d for d in devices if "node-name" in d and name in _words(d.get("qdev", ""))), None)
            if device is not None:
                found[target.get("dev", "")] = _live_top(target.get("dev", ""), device, graph)
        return found

    def graph(self) -> BlockGraph:
        """Return the block graph as it is now."""
        graph = self.execute("x-debug-query-block-graph")
        return BlockGraph.of(graph, self.execute("query-named-block-nodes", flat=True))

    def edges(self) -> BlockGraph:
        """Return the block graph as it is now, without how each node is opened."""
        return BlockGraph.of(self.execute("x-debug-query-block-graph"))

    def nodes(self) -> set[str]:
        """Return the names of all block nodes."""
        return set(self.edges().children)

    def add_overlay(self, path: Path, options: DriverOptions) -> str:
        """Open the overlay in QEMU, on nothing yet, by a passed descriptor; return the name of its node.

        QEMU's process may not be allowed to open the path (owner, AppArmor, SELinux, mount namespace). One descriptor
        is enough, and only until QEMU has its own copy of it: a file node that is added by itself, without
        `auto-read-only`, stays open for writing while the format node above it is reopened read-only, and writable
        again for a merge.

        Raises:
            DomainError: QEMU refuses; nothing of it is left there.
            OSError: the file cannot be opened, or not with O_DIRECT where the disk needs that.
        """
        return self._add(path, options, os.O_RDWR, backing=None)

    def add_image(self, path: Path, options: DriverOptions, backing: str | None) -> str:
        """Open the image in QEMU, read-only, backed by the node `backing`; return the name of its node.

        Raises:
            DomainError, OSError: see `add_overlay`.
        """
        return self._add(path, options, os.O_RDONLY, backing)

    def _add(self, path: Path, options: DriverOptions, access: int, backing: str | None) -> str:
        node = node_name(path)
        name = f"{node}{FILE_SUFFIX}"
        read_only = access == os.O_RDONLY
        try:
            self._release()
            fdset = self._pass_file(path, access | (os.O_DIRECT if options.direct else 0))
            place: dict[str, Any] = {"filename": f"/dev/fdset/{fdset}", "node-name": name, "read-only": read_only}
            self.execute("blockdev-add", **options.of_file(), **place)
            self.execute("remove-fd", fdset_id=fdset)
            place = {"file": name, "backing": backing, "node-name": node, "read-only": read_only}
            self.execute("blockdev-add", **options.of_format(), **place)
        except BaseException:
            self.drop_overlay(path)
            raise
        return node

    def drop_overlay(self, path: Path) -> None:
        """Close the overlay in QEMU, if it is open there and backs nothing."""
        node, present = node_name(path), self.nodes()
        for name in (node, f"{node}{FILE_SUFFIX}"):
            if name in present:
                self.execute("blockdev-del", node_name=name)
        self._release()

    def _release(self) -> None:
        """Let QEMU close what we have passed and it needs no more: it has its own copies.

        There is some where a command has died before that was used; and while its guest is paused, QEMU puts off
        closing it, until it is asked again.
        """
        for fdset in self.execute("query-fdsets"):
            if any(entry.get("opaque", "").startswith(_OPAQUE) for entry in fdset["fds"]):
                self.execute("remove-fd", fdset_id=fdset["fdset-id"])

    def _pass_file(self, path: Path, flags: int) -> int:
        """Pass a descriptor with exactly the flags that QEMU will ask for: from 9.1 it takes no other."""
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return int(self.execute("add-fd", files=[fd], opaque=f"{_OPAQUE}{path}")["fdset-id"])
        finally:
            os.close(fd)


def refuse_busy(domain: str, top: LiveTop) -> None:
    """Accept a disk whose writes have all succeeded, and that no block job works on.

    Raises:
        DomainError: that is not so.
    """
    if top.job is not None:
        raise DomainError(domain, f"disk {top.target}: the block job {top.job!r} works on it: wait for its end")
    if top.failed:
        reason = f"disk {top.target}: writes of the guest have failed since it was started ({top.failed})"
        raise DomainError(domain, f"{reason}: check its file system and restart the guest, or leave the disk out")


def _live_top(target: str, device: Mapping[str, Any], graph: BlockGraph) -> LiveTop:
    root: str = device["node-name"]
    node = graph.format_node(root)
    # The writes of the node itself: a filter above counts its own.
    entry: Mapping[str, Any] | None = device
    while entry is not None and entry.get("node-name") != node:
        entry = entry.get("parent")
    failed = int(device["stats"]["failed_wr_operations"])
    # A failed write counts as one too, but may have failed before the CID was written.
    settled = entry is not None and entry["stats"]["wr_highest_offset"] > 0 and not failed
    return LiveTop(target, node, settled, failed, graph.job_on(root))


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
