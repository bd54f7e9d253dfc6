"""Exchange the backing chain beneath a running guest: new images take the place of links that are frozen.

QEMU's `blockdev-reopen` gives an overlay another backing node while the guest writes; no block job has a part in it.

    overlay --> U --> L --> below         before: `upper` is the overlay, U and L go
    overlay --> image --> below           after: `image` reads as U did, and has the CID of U

The steps, for all disks at once:

    1  everything is checked: QEMU checks nothing of it, and gives the guest wrong data or I/O errors afterwards
    2  the new images are added, read-only, by passed descriptors; from here on QEMU has them locked
    3  one `blockdev-reopen` for every overlay in question: all of them or none
    4  the graph is compared with what it is to be; if it differs, the old nodes are put back
    5  the nodes of the links that went are closed

The module knows QEMU and files, no XML and no record of what is pending. Killed at any point, each overlay has its old
or its new chain, which read the same; `is_exchanged` and `close_unused` settle the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from qemu_vmdk_snap import CidMismatch, CorruptChain, confined, open_chain, read_facts, read_links
from qemu_vmdk_snap.domain.qemu.graph import BlockGraph, node_name
from qemu_vmdk_snap.domain.qemu.monitor import Monitor, refuse_busy
from qemu_vmdk_snap.domain.qemu.options import DriverOptions
from qemu_vmdk_snap.errors import DomainError

_OLDEST: Final = (6, 1)
"""`blockdev-reopen` is stable from QEMU 6.1 on."""


class Exchange(NamedTuple):
    """What is exchanged below one overlay. A disk may have several, with links that stay between them."""

    target: str
    upper: Path
    """The overlay directly above the links that go: the one that the guest writes to, or a frozen one."""
    images: tuple[Path, ...]
    """What takes their place, the nearest first, each backed by the next: as a rule one."""
    below: Path | None
    """The link that stays and the last image is backed by; None where that is a base."""
    options: DriverOptions
    """Those of the disk: QEMU does not report discard and aio, so they are passed in."""


@dataclass(frozen=True, slots=True)
class ExchangeReport:
    """What an exchange did."""

    reopened: float
    """Milliseconds that the `blockdev-reopen` took as seen from outside; no vCPU stops for it."""
    closed: tuple[str, ...]
    """The nodes that are gone."""
    left: tuple[str, ...]
    """Nodes that are not needed any more and could not be closed: they stay open and locked."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One exchange, in names of nodes."""

    exchange: Exchange
    top: str
    """What the guest writes to."""
    upper: str
    old: str
    """What the overlay is backed by before."""
    below: str | None
    removed: tuple[str, ...]
    """The format nodes that go, from the top."""

    @property
    def new(self) -> str:
        return node_name(self.exchange.images[0])


def can_exchange(monitor: Monitor) -> bool:
    """Return whether this QEMU is able to."""
    version = monitor.execute("query-version")["qemu"]
    return (version["major"], version["minor"]) >= _OLDEST


def check_exchanges(monitor: Monitor, exchanges: Sequence[Exchange], folders: Sequence[Path] = ()) -> None:
    """Accept what `exchange` can do; nothing is changed. `folders` are where links of the chains may lie.

    That an image reads as the links whose place it takes is for the caller to compare.

    Raises:
        DomainError: a disk or a link is not there, a block job works on the disk, or a write of the guest has failed.
        CidMismatch: the CID of an image is not the one that the link above it names.
        CorruptChain: an image is backed by another file than it must be, or has another size.
        FormatError, Unsupported, LockBusy, OSError: an image cannot be read.
    """
    with _checked(monitor, exchanges, folders):
        pass


def exchange(monitor: Monitor, exchanges: Sequence[Exchange], folders: Sequence[Path] = ()) -> ExchangeReport:
    """Do all of them in one step; one that has been done is left as it is.

    Raises:
        VmdkSnapError, OSError: see `check_exchanges`; or QEMU refuses. Every disk has its old chain, and QEMU knows
            nothing of the images; only where QEMU or libvirt is gone, `is_exchanged` finds out which one it has.
    """
    with _checked(monitor, exchanges, folders) as (graph, steps):
        if not steps:
            return ExchangeReport(0.0, (), ())
        _drop_images(monitor, steps)  # what a dead command has left: nothing uses it
        try:
            for step in steps:
                _add_images(monitor, step)
            reopened = _reopen(monitor, graph, steps)
        except BaseException:
            with contextlib.suppress(DomainError):  # QEMU may be gone
                _drop_images(monitor, steps)
            raise
    closed, left = _close(monitor, [name for step in steps for name in step.removed])
    return ExchangeReport(reopened, closed, left)


def is_exchanged(monitor: Monitor, one: Exchange) -> bool:
    """Return whether the overlay is backed by the first image; both are named as they are now."""
    graph = monitor.graph()
    upper = graph.node_of(one.upper)
    return upper is not None and one.images[0].exists() and graph.backing(upper) == node_name(one.images[0])


def close_unused(monitor: Monitor, files: Sequence[Path]) -> tuple[str, ...]:
    """Close the nodes of those files that nothing in QEMU uses any more; return the nodes that are gone."""
    graph = monitor.graph()
    formats = [name for file in files if (name := graph.node_of(file)) is not None and name not in graph.used]
    formats.sort(key=lambda name: -len(graph.below(name)))  # each before what it is backed by
    closed, _ = _close(monitor, formats)
    left = {name for file in files for name in graph.file_nodes_of(file)} - {*closed, *graph.used}
    return closed + _close(monitor, sorted(left))[0]


@contextlib.contextmanager
def _checked(
    monitor: Monitor, exchanges: Sequence[Exchange], folders: Sequence[Path]
) -> Iterator[tuple[BlockGraph, list[_Step]]]:
    """Give the graph and what is left to do; the images are held against writers for the length of the block."""
    tops = monitor.tops()
    graph = monitor.graph()
    steps = []
    with contextlib.ExitStack() as held:
        for one in exchanges:
            if one.target not in tops:
                raise DomainError(monitor.domain, f"the running guest has no disk {one.target}")
            refuse_busy(monitor.domain, tops[one.target])
            step = _step(monitor.domain, graph, one, tops[one.target].node)
            if step is not None:
                near = {one.upper.parent, *(image.parent for image in one.images), *folders}
                trusted = sorted(near if one.below is None else near | {one.below.parent})
                _check_old(monitor.domain, graph, step, trusted)
                _check_images(graph, step, trusted)
                held.enter_context(open_chain(one.images[0], trusted_dirs=trusted))
                steps.append(step)
        _check_together(monitor.domain, steps)
        yield graph, steps


def _step(domain: str, graph: BlockGraph, one: Exchange, top: str) -> _Step | None:
    """Return what is to be done in the graph; None where it has been done."""
    chain = graph.chain(top)
    upper, below = _position(domain, graph, chain, one, one.upper), len(chain)
    if one.below is not None:
        below = _position(domain, graph, chain, one, one.below)
    removed = chain[upper + 1 : below]
    if removed == tuple(map(node_name, one.images)):
        return None
    if not removed:
        raise DomainError(domain, f"disk {one.target}: no link is between {one.upper} and {one.below or 'the end'}")
    taken = [image for image in one.images if graph.node_of(image) in graph.used]
    if taken:
        raise DomainError(domain, f"disk {one.target}: the guest uses {taken[0]} already")
    return _Step(one, top, chain[upper], removed[0], chain[below] if below < len(chain) else None, removed)


def _position(domain: str, graph: BlockGraph, chain: Sequence[str], one: Exchange, file: Path) -> int:
    name = graph.node_of(file)
    if name not in chain:
        raise DomainError(domain, f"disk {one.target}: {file} is not in the chain that the running guest uses")
    return chain.index(name)


def _check_old(domain: str, graph: BlockGraph, step: _Step, trusted: Sequence[Path]) -> None:
    """Compare the chain that QEMU has with that of the files: what is cut out of one is to be what the other loses."""
    links = read_links(step.exchange.upper, trusted_dirs=trusted)
    chain = graph.chain(step.upper)
    if [graph.node_of(link.path) for link in links] != list(chain):
        named = ", ".join(str(link.path) for link in links[1:])
        reason = f"disk {step.exchange.target}: QEMU has another chain below {step.exchange.upper} than its files"
        raise DomainError(domain, f"{reason}: {named or 'no parent'}")
    replaced = links[1]
    image = read_facts(step.exchange.images[0], trusted_dirs=trusted)
    if image.capacity != replaced.capacity:
        reason = f"has {image.capacity} bytes, but {replaced.path}, whose place it takes, has {replaced.capacity}"
        raise CorruptChain(image.path, reason)


def _check_images(graph: BlockGraph, step: _Step, trusted: Sequence[Path]) -> None:
    """Accept an overlay, images and a link below of which each is backed by the next."""
    one, find = step.exchange, confined(trusted)
    files = [one.upper, *one.images, *([] if one.below is None else [one.below])]
    links = [read_facts(file, resolver=find) for file in files]
    for above, link in itertools.pairwise(links):
        if link.cid != above.parent_cid:
            raise CidMismatch(above.path, link.path, above.parent_cid, link.cid)
        if above is links[0] or above.is_base:  # the overlay names the link whose name the image takes later
            continue
        named = None if above.hint is None else find(above.path, above.hint, "parent")
        later = named is not None and link.path in one.images and graph.node_of(named) in step.removed
        if named is None or not (later or named.samefile(link.path)):
            raise CorruptChain(above.path, f"is backed by {named or 'no file'}, not by {link.path}")
    if one.below is None and not links[-1].is_base:
        raise CorruptChain(links[-1].path, f"is backed by {links[-1].hint or 'a file'}, and is to be a base")


def _check_together(domain: str, steps: Sequence[_Step]) -> None:
    """Accept exchanges that leave each other alone."""
    uppers = [step.upper for step in steps]
    removed = [name for step in steps for name in step.removed]
    for step in steps:
        if uppers.count(step.upper) > 1 or step.upper in removed or step.below in removed:
            ends = f"{step.exchange.upper} or {step.exchange.below}"
            raise DomainError(
                domain, f"disk {step.exchange.target}: another exchange of the same call needs {ends} too"
            )


def _add_images(monitor: Monitor, step: _Step) -> None:
    backing = step.below
    for image in reversed(step.exchange.images):
        backing = monitor.add_image(image, step.exchange.options, backing)


def _drop_images(monitor: Monitor, steps: Sequence[_Step]) -> None:
    for step in steps:
        for image in step.exchange.images:
            monitor.drop_overlay(image)


def _reopen(monitor: Monitor, graph: BlockGraph, steps: Sequence[_Step]) -> float:
    """Give every overlay its new backing node, and return how many milliseconds that took."""
    for step in steps:
        _flush(step.exchange.upper)  # QEMU flushes the node while its requests wait
    old = [_options(graph, step, step.old) for step in steps]
    new = [_options(graph, step, step.new) for step in steps]
    started = time.perf_counter()
    try:
        monitor.execute("blockdev-reopen", options=new)
    except DomainError:
        # It may be the answer alone that was lost.
        if not _as_expected(graph, monitor.graph(), steps):
            raise
    took = (time.perf_counter() - started) * 1000
    if not _as_expected(graph, monitor.graph(), steps):
        monitor.execute("blockdev-reopen", options=old)
        raise DomainError(monitor.domain, "QEMU has another block graph after the exchange than it was asked for")
    return took


def _options(graph: BlockGraph, step: _Step, backing: str) -> dict[str, Any]:
    """Return all options of the overlay's node: QEMU sets back what is left out, without a message."""
    node = graph.nodes[step.upper]
    known = replace(step.exchange.options, direct=node.direct, no_flush=node.no_flush, detect_zeroes=node.detect_zeroes)
    return {
        **known.of_format(),
        "node-name": step.upper,
        "file": graph.children[step.upper]["file"],
        "backing": backing,
        "read-only": node.read_only,
    }


def _as_expected(before: BlockGraph, after: BlockGraph, steps: Sequence[_Step]) -> bool:
    """Return whether the disks have the nodes of before, but for the new ones and the backing edges of the overlays."""
    mine = frozenset().union(*(before.below(step.top) for step in steps))
    expected = {name: dict(before.children[name]) for name in mine}
    for step in steps:
        expected[step.upper]["backing"] = step.new
        names: list[str | None] = [*map(node_name, step.exchange.images), step.below]
        if [after.backing(name) for name in names if name is not None][: len(names) - 1] != names[1:]:
            return False
    return all(_unchanged(before, after, name) and after.children[name] == edges for name, edges in expected.items())


def _unchanged(before: BlockGraph, after: BlockGraph, name: str) -> bool:
    """Return whether the node is opened as it was; its displayed file may be another."""
    here = after.nodes.get(name)
    return here is not None and replace(here, file="") == replace(before.nodes[name], file="")


def _close(monitor: Monitor, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Close the format nodes, which nothing uses, and the nodes below them; return those gone and those that stay."""
    graph = monitor.edges()
    closed, left = [], []
    for format_node in names:
        name: str | None = format_node
        while name is not None:
            try:
                monitor.execute("blockdev-del", node_name=name)
            except DomainError:
                left.append(name)
                break
            closed.append(name)
            name = graph.children.get(name, {}).get("file")
    return tuple(closed), tuple(left)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
