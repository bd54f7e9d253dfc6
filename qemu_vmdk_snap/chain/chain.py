"""The chain: the top link first, every parent below it, read and written as the one disk that the guest sees.

        guest offset  0        64K       128K      192K
    top (depth 0)     [ data  ][  hole  ][  zero  ][  hole  ]
    parent (1)        [ data  ][  data  ][  data  ][  hole  ]
    base (2)          [ data  ][  data  ][  data  ][  hole  ]
    guest sees          top      parent    zeros     zeros

Invariants: a parent is opened for reading only, and only after its CID equals the parentCID of the link above; before
the first byte of data is written after an open, the top's new CID is durable.
"""

from __future__ import annotations

import contextlib
from _thread import RLock  # what threading calls by that name, without its start
from collections.abc import Collection, Iterator, Sequence
from enum import IntEnum
from pathlib import Path

from qemu_vmdk_snap import log
from qemu_vmdk_snap.chain.link import Link, open_link
from qemu_vmdk_snap.chain.parent import Descent, find_parent
from qemu_vmdk_snap.chain.resolver import Resolver, confined
from qemu_vmdk_snap.chain.small import continues, is_small, small_rows
from qemu_vmdk_snap.chain.windows import ROW_GRAINS, TABLE_GRAINS, windows
from qemu_vmdk_snap.errors import CidMismatch, InvalidRequest, VmdkSnapError
from qemu_vmdk_snap.light import Literal, NamedTuple, Self, overload
from qemu_vmdk_snap.light import numpy as np
from qemu_vmdk_snap.storage.blockfile import BlockFile, Buffer, FileOpener, open_posix, open_posix_or_device
from qemu_vmdk_snap.vmdk.extent import Below, PlacedExtent
from qemu_vmdk_snap.vmdk.runs import COMPRESSED, DATA, HOLE, NO_SOURCE, Row, RunTable

_log = log.of(__name__)


class RunKind(IntEnum):
    """What a run of the map is."""

    HOLE = 0
    """Not stored in any link: reads as zeros."""
    ZERO = 1
    """A link marks it as zeros, whatever its parents contain."""
    DATA = 2
    """Stored in a link."""


class Run(NamedTuple):
    """A stretch of the guest's disk that one link stores in one piece. Offsets and lengths are bytes."""

    offset: int
    length: int
    kind: RunKind
    depth: int
    """Which link answers: 0 is the top. For a hole, the base."""
    path: Path | None
    """The file that stores it; None unless the kind is DATA."""
    file_offset: int | None
    """Where in that file; of the compressed grain's record where `compressed`. None unless the kind is DATA."""
    compressed: bool


class Source(NamedTuple):
    """An extent of some link, as the `sources` of a run table number them."""

    depth: int
    placed: PlacedExtent


class Chain:
    """An open backing chain. Hold it in a `with` block, or close it: its files stay locked until then.

    Threads: any number of threads may call `read_at`, `map`, `rows`, `tables`, `resolve`, `read_row` and
    `read_row_into` at once. A map shows each of its windows as it was when that window was resolved. `read_below`,
    `close` and the links belong to one thread, while no other uses the chain.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.links = tuple(links)
        self.sources = [Source(depth, placed) for depth, link in enumerate(links) for placed in link.extents]
        self.path = links[0].path
        self.capacity = links[0].capacity
        self._grain: tuple[int, int, bytes] = (NO_SOURCE, 0, b"")  # the last grain inflated: source, file offset, bytes

    @property
    def depth(self) -> int:
        """How many links there are; 1 is an image without a parent."""
        return len(self.links)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at guest offset `offset`, as the guest sees them.

        Raises:
            InvalidRequest: the range is not inside the disk.
            FormatError: a table of some link names a grain outside its file.
        """
        self._check_range(offset, length)
        return self.read_below(0, offset, length)

    def read_below(self, depth: int, offset: int, length: int) -> bytes:
        """Return what is seen from the link at `depth` downwards; zeros past the end of a shorter link."""
        parts = []
        while length > 0:
            part = self._read_piece(depth, offset, length)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def map(self, offset: int = 0, length: int | None = None) -> Iterator[Run]:
        """Yield where each part of the range is stored, in order, without gaps, neighbours joined.

        Raises:
            InvalidRequest: the range is not inside the disk.
        """
        for row in self.rows(offset, length):
            yield self.describe(row)

    def rows(self, offset: int = 0, length: int | None = None) -> Iterator[Row]:
        """Yield the same as `map` as plain integers, joined across windows too."""
        length = self.capacity - offset if length is None else length
        self._check_range(offset, length)
        if is_small(self.links):
            yield from small_rows(self.links, offset, offset + length)
            return
        last: Row | None = None
        for table in self.tables(offset, length):
            rows = table.rows()
            if last is not None:  # neighbours within a table are joined already
                if continues(last, rows[0]):
                    rows[0] = last._replace(length=last.length + rows[0].length)
                else:
                    yield last
            last = rows.pop()
            yield from rows
        if last is not None:
            yield last

    def tables(self, offset: int = 0, length: int | None = None) -> Iterator[RunTable]:
        """Yield the range's runs as tables, one for each bounded window of the disk, neighbours joined within it."""
        length = self.capacity - offset if length is None else length
        self._check_range(offset, length)
        for start, end in self.windows(offset, offset + length, TABLE_GRAINS):
            yield self.resolve(start, end)

    def windows(self, start: int, end: int, grains: int = ROW_GRAINS) -> Iterator[tuple[int, int]]:
        """Yield the windows in which [start, end) may be resolved, at any depth, without much memory."""
        return windows([link.extents for link in self.links], start, end, grains)

    def resolve(self, start: int, end: int, depth: int = 0) -> RunTable:
        """Return the runs of [start, end) as seen from the link at `depth`; memory grows with its grains."""
        table = self.links[depth].resolve(start, end)
        for link in self.links[depth + 1 :]:
            holes = np.flatnonzero(table.kinds == HOLE)
            if not len(holes):
                break
            table = table.over(link.resolve(start, end))
        return table.coalesced()

    def describe(self, row: Row) -> Run:
        """Return `row` of one of this chain's tables with its link and file in place of the source's number."""
        if row.source == NO_SOURCE:
            kind = RunKind.HOLE if row.kind == HOLE else RunKind.ZERO
            return Run(row.offset, row.length, kind, len(self.links) - 1, None, None, False)
        depth, placed = self.sources[row.source]
        file = placed.extent.file
        if row.kind < DATA or file is None:
            return Run(row.offset, row.length, RunKind.ZERO, depth, None, None, False)
        compressed = row.kind == COMPRESSED
        return Run(row.offset, row.length, RunKind.DATA, depth, file.path, row.file_offset, compressed)

    def read_row(self, row: Row, skip: int, length: int) -> bytes:
        """Return `length` bytes from byte `skip` of `row`, one of this chain's rows."""
        if row.kind < DATA:
            return bytes(length)
        _, placed = self.sources[row.source]
        if row.kind == DATA:
            return self._stored(placed, row.file_offset + skip, length)
        inside = (row.offset + skip - placed.start) % placed.extent.grain_bytes
        return self._inflated(placed, row.file_offset)[inside : inside + length]

    def read_row_into(self, row: Row, skip: int, view: memoryview) -> None:
        """Fill `view` from byte `skip` of `row`, without allocating a buffer."""
        file = self.file_of(row)
        if file is None:
            view[:] = self.read_row(row, skip, len(view))
            return
        done = file.read_into(row.file_offset + skip, view)
        if done < len(view):
            view[done:] = bytes(len(view) - done)

    def file_of(self, row: Row) -> BlockFile | None:
        """Return the file that stores `row` as it is, for the kernel to copy from; None where there is none."""
        return self.sources[row.source].placed.extent.file if row.kind == DATA else None

    def close(self) -> None:
        """Close every file of the chain and release its locks; closing twice does nothing."""
        for link in self.links:
            link.close()

    def __enter__(self) -> Self:
        """Return the chain itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the chain."""
        self.close()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.capacity:
            path = self.links[0].path
            raise InvalidRequest(path, f"{length} bytes at {offset} are not inside the disk of {self.capacity} bytes")

    def _read_piece(self, depth: int, offset: int, length: int) -> bytes:
        for link in self.links[depth:]:
            if offset >= link.capacity:
                return bytes(length)
            placed = link.at(offset)
            kind, file_offset, left = placed.extent.lookup(offset - placed.start)
            length = min(length, left)
            if kind == HOLE:
                continue
            if kind == DATA:
                return self._stored(placed, file_offset, length)
            if kind == COMPRESSED:
                inside = (offset - placed.start) % placed.extent.grain_bytes
                return self._inflated(placed, file_offset)[inside : inside + length]
            return bytes(length)
        return bytes(length)

    @staticmethod
    def _stored(placed: PlacedExtent, file_offset: int, length: int) -> bytes:
        file = placed.extent.file
        data = b"" if file is None else file.read_at(file_offset, length)
        # Some writers end the file inside the last grain: the missing part is zeros.
        return data if len(data) == length else data + bytes(length - len(data))

    def _inflated(self, placed: PlacedExtent, file_offset: int) -> bytes:
        source, offset, data = self._grain
        if (source, offset) != (placed.source, file_offset):
            data = placed.extent.read_grain(file_offset)
            self._grain = (placed.source, file_offset, data)
        return data


class WritableChain(Chain):
    """An open chain whose top link takes writes; the top is locked against every other writer and reader.

    Threads: as `Chain`; `write_at`, `renew_cid` and `flush` as well. A lock lets one of those that read or change the
    tables run at a time.
    """

    def __init__(self, links: Sequence[Link], *, cid_renewed: bool = False) -> None:
        """Take open links; `cid_renewed` where the top has got its new CID since it was opened."""
        super().__init__(links)
        self._cid_renewed = cid_renewed
        self._closed = False
        self._turn = RLock()

    def read_at(self, offset: int, length: int) -> bytes:
        """Return what `Chain.read_at` does; a write of another thread is seen as a whole or not at all."""
        with self._turn:
            return super().read_at(offset, length)

    def resolve(self, start: int, end: int, depth: int = 0) -> RunTable:
        """Return what `Chain.resolve` does, between two writes."""
        with self._turn:
            return super().resolve(start, end, depth)

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write `data` at guest offset `offset`: into the top link alone. Durable after `flush`.

        Raises:
            InvalidRequest: the range is not inside the disk.
            Unsupported: the kind of the top link does not allow the write.
            OSError: the system refused (no space, I/O error); data that was flushed before is unchanged.
        """
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        if not len(view):
            return
        with self._turn:
            self.renew_cid()
            top = self.links[0]
            for placed, first, last in top.overlapping(offset, offset + len(view)):
                start = placed.start + first - offset
                piece = view[start : start + last - first]
                placed.extent.write(first, piece, self._below(placed))

    def renew_cid(self) -> None:
        """Make a new CID of the top durable, once for each open: all that follows may change what the guest sees."""
        with self._turn:
            if not self._cid_renewed:
                self.links[0].renew_cid()  # barrier: whoever finds new data under the old CID would trust it
                self._cid_renewed = True

    def flush(self) -> None:
        """Return when everything written so far is durable."""
        with self._turn:
            self.links[0].flush()

    def close(self) -> None:
        """Flush and close."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            super().close()

    def __exit__(self, *exc: object) -> None:
        """Flush and close; an error inside the block is not hidden by one of the flush."""
        if not any(exc):
            self.close()
            return
        with contextlib.suppress(OSError, VmdkSnapError):
            self.close()

    def _below(self, placed: PlacedExtent) -> Below:
        return lambda offset, length: self.read_below(1, placed.start + offset, length)


@overload
def open_chain(
    path: Path | str,
    *,
    writable: Literal[False] = False,
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    lock: bool = True,
    check_cids: bool = True,
    allow_devices: bool = False,
) -> Chain: ...


@overload
def open_chain(
    path: Path | str,
    *,
    writable: Literal[True],
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    lock: bool = True,
    check_cids: bool = True,
    allow_devices: bool = False,
) -> WritableChain: ...


def open_chain(
    path: Path | str,
    *,
    writable: bool = False,
    trusted_dirs: Sequence[Path | str] = (),
    resolver: Resolver | None = None,
    opener: FileOpener = open_posix,
    lock: bool = True,
    check_cids: bool = True,
    allow_devices: bool = False,
) -> Chain:
    """Open an image and every parent below it, locked as QEMU locks them, and check that each parent may be trusted.

    Parents and extents are opened beside the file that names them and below `trusted_dirs`, nowhere else; `resolver`
    replaces that rule. `lock=False` is qemu-img's `-U`: read an image that may be in use for writing.
    `allow_devices` lets extents be block devices below /dev, with the system's own opener.

    Raises:
        OSError: a file cannot be opened.
        FormatError: a file is not a VMDK image, or breaks the format.
        CidMismatch: a parent was written after its overlay was made.
        CorruptChain: a parent is missing, outside the folders that may be opened, or the chain is a loop; or, for
            writing, an interrupted operation on the image is not finished.
        LockBusy: another process has locked an image.
        Unsupported: the kind of an image, or the requested access to it, is not supported.
    """
    if allow_devices:
        opener, trusted_dirs = open_posix_or_device, [*trusted_dirs, "/dev"]
    find = resolver or confined(trusted_dirs)
    links: list[Link] = []
    try:
        _open_links(Path(path), links, find, opener, frozenset([0] if writable else []), lock, check_cids)
        if writable:
            from qemu_vmdk_snap.storage.journal.record import refuse_pending  # JSON and digests: readers need none

            refuse_pending(links[0].path)
        _log.debug("%s: chain of %d opened for %s", path, len(links), "writing" if writable else "reading")
        return WritableChain(links) if writable else Chain(links)
    except BaseException:
        for link in links:
            link.close()
        raise


def open_links(
    path: Path | str,
    *,
    writable_depths: Collection[int],
    resolver: Resolver,
    opener: FileOpener = open_posix,
    check_cids: bool = True,
) -> Chain:
    """Open a chain whose links at `writable_depths` are held for writing: for operations that change links themselves.

    Nothing is written through the chain, and no CID is renewed: that is up to the operation. Raises what `open_chain`
    does.
    """
    links: list[Link] = []
    try:
        _open_links(Path(path), links, resolver, opener, writable_depths, True, check_cids)
        return Chain(links)
    except BaseException:
        for link in links:
            link.close()
        raise


def _open_links(
    path: Path,
    links: list[Link],
    find: Resolver,
    opener: FileOpener,
    writable: Collection[int],
    lock: bool,
    check_cids: bool,
) -> None:
    descent = Descent()
    sources = 0
    while True:
        descent.step(path)
        link = _open_one(path, links, find, opener, writable, sources, lock)
        links.append(link)
        sources += len(link.extents)
        if len(links) > 1 and check_cids and links[-2].parent_cid != link.cid:
            raise CidMismatch(links[-2].path, link.path, links[-2].parent_cid, link.cid)
        parent = find_parent(link.descriptor, find)
        if parent is None:
            return
        path = parent


def _open_one(
    path: Path,
    above: list[Link],
    find: Resolver,
    opener: FileOpener,
    writable: Collection[int],
    sources: int,
    lock: bool,
) -> Link:
    write = len(above) in writable
    owner = above[-1].path if above else None
    return open_link(path, opener=opener, writable=write, resolver=find, first_source=sources, lock=lock, owner=owner)
