"""The block graph of a running QEMU: which node a disk writes to, what is below it, and which jobs hold it.

    device -- root --> copy-on-read ...      filters: none as a rule, any number
                            | file
                          vmdk (format node) -- backing --> vmdk -- backing --> ...
                            | file                            | file
                          file (file node)                  file

A node is found by its file node. What QEMU displays as the file of a *format* node is no longer a path (`json:{...}`)
once its backing node was given explicitly. A file that we passed is known by the name that we gave its node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PREFIX: Final = "qvs-"
FILE_SUFFIX: Final = "-file"
_DIGITS: Final = 22
"""QEMU takes node names of up to 31 characters; the file node's has a suffix."""
_FORMAT: Final = "vmdk"


@dataclass(frozen=True, slots=True)
class Node:
    """One block node."""

    name: str
    driver: str
    file: str
    """What QEMU displays: a path only for a file node that was opened by one."""
    read_only: bool
    direct: bool
    no_flush: bool
    detect_zeroes: str


@dataclass(frozen=True, slots=True)
class BlockGraph:
    """All nodes, edges and jobs at one moment."""

    nodes: Mapping[str, Node]
    """Empty where the edges alone were asked for: of a long chain that costs a guest far less."""
    children: Mapping[str, Mapping[str, str]]
    """Node -> name of the edge -> node below."""
    jobs: Mapping[str, frozenset[str]]
    """Job -> every node that it works on, those below included."""
    used: frozenset[str]
    """Every node that a device, an export or a job reaches."""

    @classmethod
    def of(cls, graph: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]] = ()) -> BlockGraph:
        """Return it from QEMU's answers to x-debug-query-block-graph and to query-named-block-nodes."""
        names = {one["id"]: one["name"] for one in graph["nodes"] if one["type"] == "block-driver"}
        works = {one["id"]: one["name"] for one in graph["nodes"] if one["type"] == "block-job"}
        children: dict[str, dict[str, str]] = {name: {} for name in names.values()}
        held: dict[str, set[str]] = {name: set() for name in works.values()}
        roots: set[str] = set()
        for edge in graph["edges"]:
            parent, child = edge["parent"], names[edge["child"]]
            if parent in names:
                children[names[parent]][edge["name"]] = child
                continue
            roots.add(child)
            if parent in works:
                held[works[parent]].add(child)
        jobs = {job: frozenset().union(*(_below(name, children) for name in mine)) for job, mine in held.items()}
        used = frozenset().union(*(_below(name, children) for name in roots))
        return cls({one["node-name"]: _node(one) for one in nodes}, children, jobs, used)

    def below(self, name: str) -> frozenset[str]:
        """Return the node and all below it."""
        return _below(name, self.children)

    def job_on(self, name: str) -> str | None:
        """Return a job that works on the node, or on one below it, or has put a filter above; None if there is none."""
        mine = self.below(name)
        return next((job for job, held in self.jobs.items() if mine & held), None)

    def format_node(self, root: str) -> str:
        """Return the format node of the disk whose device uses `root`: below any filters, directly above a file node.

        Of a disk without a format it is the node that the device uses, or a filter.
        """
        file = self.children.get(root, {}).get("file")
        while file is not None and "file" in self.children[file]:
            root, file = file, self.children[file]["file"]
        return root

    def backing(self, name: str) -> str | None:
        """Return the node that the format node is backed by."""
        return self.children.get(name, {}).get("backing")

    def chain(self, top: str) -> tuple[str, ...]:
        """Return the format nodes from `top` down to the base."""
        found = [top]
        while (below := self.backing(found[-1])) is not None:
            found.append(below)
        return tuple(found)

    def node_of(self, path: Path) -> str | None:
        """Return the format node of the image at `path`: by our name for it, or as libvirt opened it by its path."""
        try:
            ours = node_name(path)
        except FileNotFoundError:
            return None
        if ours in self.children:
            return ours
        files = self.file_nodes_of(path)
        return next((name for name, edges in self.children.items() if self._is_format_on(name, edges, files)), None)

    def file_nodes_of(self, path: Path) -> set[str]:
        """Return the file nodes of the image at `path`, also those without a format node above."""
        try:
            ours = f"{node_name(path)}{FILE_SUFFIX}"
        except FileNotFoundError:
            return set()
        if ours in self.children:
            return {ours}
        return {name for name, node in self.nodes.items() if node.driver == "file" and _is_same(node.file, path)}

    def file_of(self, name: str) -> str:
        """Return what QEMU displays as the file of the format node: a path, unless its descriptor was passed."""
        file = self.children.get(name, {}).get("file", name)
        while "file" in self.children.get(file, {}):
            file = self.children[file]["file"]
        return self.nodes[file].file

    def _is_format_on(self, name: str, edges: Mapping[str, str], files: set[str]) -> bool:
        return name in self.nodes and self.nodes[name].driver == _FORMAT and edges.get("file") in files


def node_name(path: Path) -> str:
    """Return the name of the format node that we give the file at `path`: it contains device and inode, not the path.

    A file that QEMU has open keeps its inode, whatever it is renamed to.

    Raises:
        OSError: there is no such file.
    """
    facts = path.stat()
    digest = hashlib.sha256(f"{facts.st_dev}:{facts.st_ino}".encode())
    return PREFIX + digest.hexdigest()[:_DIGITS]


def _is_same(displayed: str, path: Path) -> bool:
    if displayed == str(path):
        return True
    if not displayed.startswith("/") or displayed.startswith("/dev/fdset/"):
        return False
    try:
        return Path(displayed).samefile(path)
    except OSError:
        return False


def _below(name: str, children: Mapping[str, Mapping[str, str]]) -> frozenset[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        here = waiting.pop()
        if here not in seen:
            seen.add(here)
            waiting.extend(children.get(here, {}).values())
    return frozenset(seen)


def _node(one: Mapping[str, Any]) -> Node:
    cache = one["cache"]
    return Node(
        one["node-name"],
        one["drv"],
        str(one["file"]),
        bool(one["ro"]),
        bool(cache["direct"]),
        bool(cache["no-flush"]),
        one["detect_zeroes"],
    )
