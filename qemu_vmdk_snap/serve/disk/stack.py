"""The links of a served chain, the one lock over them, and the log that keeps what was acknowledged.

Whoever reads or writes the chain, or changes which links it has, holds `turn`. Whoever wants to stop the others for a
moment asks for it by `pause`, and gets it before connections that are busy take it again.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from qemu_vmdk_snap import BlockFile, Chain, Link, WritableChain, log
from qemu_vmdk_snap.storage.identity import identity_of_open
from qemu_vmdk_snap.storage.journal.grainlog import GrainLog
from qemu_vmdk_snap.vmdk.grain.extent import GrainExtent
from qemu_vmdk_snap.vmdk.runs import Int64s

_log = log.of(__name__)

MOST_NOTED: Final = 1 << 17
"""Entries after which the tables are stored although no client asked for a flush."""


def log_for(top: Link) -> GrainLog | None:
    """Return a new log for an image that is about to be written; None where there is no place for one."""
    descriptor = top.file.fileno()
    assert descriptor is not None
    try:
        return GrainLog.create(Path(top.path).resolve(), identity_of_open(descriptor), top.cid)
    except OSError as error:
        _log.info("%s: no log of grains (%s): tables are stored before each reply", top.path, error)
        return None


class Stack:
    """An open chain that is served. `links` and `chain` change only in a pause."""

    def __init__(self, links: Sequence[Link], *, read_only: bool) -> None:
        self.read_only = read_only
        self.turn = threading.Lock()
        self.gate = threading.Event()
        """Closed while somebody waits for the turn to pause all connections."""
        self.gate.set()
        self.links: list[Link] = []
        self.descriptors: list[int] = []
        """Of each slot; a slot is a file that holds grains, for as long as the stack is open."""
        self.slots: Int64s = np.zeros(0, np.int64)
        """The slot of each source of the chain."""
        self.top_slots: frozenset[int] = frozenset()
        """The slots that are written in place."""
        self.on_change: list[Callable[[bool], None]] = []
        """Called after each change of links; the argument tells whether places known so far are still right."""
        self.on_moved: list[Callable[[int, int], None]] = []
        """Called with (offset, length) where grains have moved into the top."""
        self.log: GrainLog | None = None
        self.writing = False
        """Whether the top has been written since it became the top."""
        self.touched = False
        """Whether stored grains were written since the last flush."""
        self.write_through = False
        """Whether there is no log, so that the tables are stored before each reply."""
        self._slot_of: dict[int, int] = {}
        self.files: list[BlockFile] = []
        """Of each slot too."""
        self.set_links(links, keep_places=False)

    def set_links(self, links: Sequence[Link], *, keep_places: bool, cid_renewed: bool = False) -> None:
        """Serve these links from now on, the top first; numbers their extents anew."""
        number = 0
        slots = []
        if not keep_places:
            self.descriptors, self.files, self._slot_of = [], [], {}
        for link in links:
            for i, placed in enumerate(link.extents):
                link.extents[i] = placed._replace(source=number)
                slots.append(self._slot(placed.extent.file))
                number += 1
        renewed = cid_renewed or (self.writing and links[0] is self.links[0])
        self.links = list(links)
        self.chain = Chain(links) if self.read_only else WritableChain(links, cid_renewed=renewed)
        self.slots = np.array(slots, np.int64)
        top = links[0].extents
        written = zip(links[0].descriptor.extents, top, strict=True)
        self.top_slots = frozenset(
            self._slot_of[id(placed.extent.file)]
            for line, placed in written
            if line.access == "RW" and placed.extent.file is not None and not self.read_only
        )
        for listener in self.on_change:
            listener(keep_places)

    @property
    def dirty(self) -> bool:
        """Whether anything was written since the last flush."""
        return self.touched or bool(self.log)

    @property
    def top(self) -> Link:
        """The link that is written."""
        return self.links[0]

    def begin_writing(self) -> None:
        """Do what comes before the first write to the top: a new CID, durably, and the log; the caller has the turn."""
        if self.writing:
            return
        assert isinstance(self.chain, WritableChain)
        self.chain.renew_cid()
        self._start(log_for(self.top))

    def _start(self, log: GrainLog | None) -> None:
        self.log, self.writing, self.write_through = log, True, log is None
        for number, placed in enumerate(self.top.extents):
            if isinstance(placed.extent, GrainExtent):
                placed.extent.tell_entries(None if log is None else functools.partial(log.note, number))

    def _stop(self) -> GrainLog | None:
        self.flush()
        for placed in self.top.extents:
            if isinstance(placed.extent, GrainExtent):
                placed.extent.tell_entries(None)
        old, self.log, self.writing, self.write_through = self.log, None, False, False
        return old

    def add_top(self, link: Link, log: GrainLog | None) -> GrainLog | None:
        """Let an empty overlay on the top, whose CID is new, be the top, with its log; return the old one's, ended.

        The caller holds all connections, and removes the old log when he has let them go.
        """
        old = self._stop()
        self.set_links([link, *self.links], keep_places=True, cid_renewed=True)
        self._start(log)
        return old

    @contextlib.contextmanager
    def noting_late(self) -> Iterator[None]:
        """Note what the block names when it has ended: until then the grains have no data. Take it back if it fails."""
        log, named = self.log, list[tuple[int, int, int]]()
        extents = [placed.extent for placed in self.top.extents]

        def remember(number: int, grain: int, sector: int) -> None:
            named.append((number, grain, sector))

        for number, extent in enumerate(extents):
            if isinstance(extent, GrainExtent):
                extent.tell_entries(functools.partial(remember, number))
        try:
            yield
            for entry in named:
                if log is not None:
                    log.note(*entry)
        except BaseException:
            for number, grain, _ in named:
                extent = extents[number]
                assert isinstance(extent, GrainExtent)
                extent.forget_entry(grain)
            raise
        finally:
            for number, extent in enumerate(extents):
                if isinstance(extent, GrainExtent):
                    extent.tell_entries(None if log is None else functools.partial(log.note, number))

    def moved(self, offset: int, length: int) -> None:
        """Tell every export that the range is stored elsewhere now; the caller has the turn."""
        for listener in self.on_moved:
            listener(offset, length)

    def end_writing(self) -> None:
        """Flush, and delete the log: nothing waits any more; the caller has the turn."""
        if self.writing and (old := self._stop()) is not None:
            old.remove()

    def flush(self) -> None:
        """Make all that was written durable, for every connection; the caller has the turn."""
        if self.writing:
            assert isinstance(self.chain, WritableChain)
            if self.touched:
                self.touched = False
                for placed in self.top.extents:
                    if isinstance(placed.extent, GrainExtent):
                        placed.extent.wrote()
            self.chain.flush()
            if self.log is not None:
                self.log.stored()

    def hold(self) -> None:
        """Stop every connection between two batches of requests, until `release`."""
        self.gate.clear()
        self.turn.acquire()

    def release(self) -> None:
        """Let the connections continue; any thread may do it."""
        self.turn.release()
        self.gate.set()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Hold every connection for the block."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def close(self) -> None:
        """Flush, close every file and let go of the locks."""
        try:
            self.end_writing()
        finally:
            for link in self.links:
                link.close()

    def _slot(self, file: BlockFile | None) -> int:
        if file is None:
            return -1
        known = self._slot_of.get(id(file))
        if known is None:
            descriptor = file.fileno()
            assert descriptor is not None
            known = self._slot_of[id(file)] = len(self.descriptors)
            self.descriptors.append(descriptor)
            self.files.append(file)  # its id stays its own
        return known
