"""Does a guest read what was written? The first sector where it does not is named, with the file that stores it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from qemu_vmdk_snap import Chain, Run, RunKind, open_chain
from qemu_vmdk_snap.errors import CidMismatch, VmdkSnapError, printable
from qemu_vmdk_snap.harness.known.content import Content
from qemu_vmdk_snap.harness.probe import ProbeError
from qemu_vmdk_snap.harness.stale import refuse_stale
from qemu_vmdk_snap.units import KIB, MIB, SECTOR_SIZE

__tracebackhide__ = True

_PIECE: Final = MIB
_SAMPLE: Final = 64 * KIB
_SHOWN: Final = 8


class Reader(Protocol):
    """What a guest is asked; a probe's session is one."""

    @property
    def name(self) -> str:
        """What the guest is called in errors."""

    def size(self) -> int:
        """Return the bytes of the disk."""

    def crc(self, offset: int, length: int) -> int:
        """Return the CRC-32 of the bytes in the range."""

    def dump(self, offset: int) -> bytes:
        """Return one sector."""


class Stored(NamedTuple):
    """Where a wrong byte comes from."""

    depth: int
    """The link, 0 is the top."""
    kind: str
    """`data`, `zero` or `hole`."""
    path: Path | None
    file_offset: int | None
    """Of the first wrong byte; of the grain's record where `compressed`."""
    compressed: bool = False

    def __str__(self) -> str:
        """Return it as an error has it."""
        if self.path is None:
            return f"link {self.depth}, {self.kind}, stored nowhere"
        grain = "compressed in the grain at " if self.compressed else ""
        place = f"{grain}byte {self.file_offset:#x} of {self.path}" if self.file_offset is not None else str(self.path)
        return f"link {self.depth}, {self.kind}, {place}"


class WrongContent(AssertionError):
    """A guest reads something else than was written; bytes."""

    def __init__(
        self,
        guest: str,
        offset: int,
        written: bytes,
        read: bytes | str,
        stored: Stored | str,
        engine: bool | None,
        cids: str = "",
    ) -> None:
        super().__init__(guest, offset, written, read, stored, engine, cids)
        self.guest = guest
        self.offset = offset
        """The first sector that is wrong; or, if `written` is empty, where the shorter of two disks ends."""
        self.written = written
        self.read = read
        """What the guest reads there, or what it says when it cannot read."""
        self.stored = stored
        """Where it comes from, or why that is not known."""
        self.engine = engine
        """Whether the engine reads what was written; None where this is unknown, or where the CIDs do not fit."""
        self.cids = cids
        """Which CIDs of the chain do not fit, so that the engine refuses to read it."""

    def __str__(self) -> str:
        """Return what is wrong and where."""
        place = f"guest {self.guest}: sector {self.offset // SECTOR_SIZE} (byte {self.offset:#x})"
        if isinstance(self.read, str):
            found = f"cannot be read: {self.read}"
        else:
            first = _first_difference(self.read, self.written)
            end = first + _SHOWN
            found = (
                f"reads something else than was written, from byte {self.offset + first:#x} on: "
                f"{self.read[first:end].hex(' ')} instead of {self.written[first:end].hex(' ')}"
            )
        engine = {True: "; the engine reads what was written", False: "; the engine reads it wrong too", None: ""}
        cids = f"; the CIDs of the chain do not fit: {self.cids}" if self.cids else ""
        return printable(f"{place} {found} ({self.stored}){engine[self.engine]}{cids}")


class WrongSize(AssertionError):
    """The disk does not end where it should; bytes."""

    def __init__(self, guest: str, written: int, read: int) -> None:
        super().__init__(guest, written, read)
        self.guest, self.written, self.read = guest, written, read

    def __str__(self) -> str:
        """Return both sizes."""
        return printable(f"guest {self.guest}: the disk has {self.read} bytes, not {self.written}")


def assert_reads(
    probe: Reader, content: Content, *, image: Path | None, samples: int = 8, trusted_dirs: tuple[Path, ...] = ()
) -> int:
    """Let the guest read all that was written, all that `image` stores, and samples of the rest; return the bytes.

    Raises:
        WrongContent, WrongSize: it reads something else; the first such sector is named.
        GuestError: the guest does not answer.
    """
    size = probe.size()
    if size != content.capacity:
        raise WrongSize(probe.name, content.capacity, size)
    done = 0
    for offset, length in _work(content, image, samples, trusted_dirs):
        wanted = content.read(offset, length)
        try:
            same = probe.crc(offset, length) == zlib.crc32(wanted)
        except ProbeError:
            same = False
        if not same:
            raise _first_wrong(probe, content, offset, length, image, trusted_dirs) from None
        done += length
    return done


def _work(content: Content, image: Path | None, samples: int, trusted: tuple[Path, ...]) -> Iterator[tuple[int, int]]:
    """Yield what to read, in pieces, in order: what is known to be data whole, and of the rest samples."""
    whole = [*content.stretches(), *_stored(image, trusted)]
    at = 0
    for start, length in [*sorted(whole), (content.capacity, 0)]:
        if start > at:
            yield from _sampled(at, start - at, samples)
        for offset in range(max(start, at), start + length, _PIECE):
            yield offset, min(_PIECE, start + length - offset, content.capacity - offset)
        at = max(at, start + length)


def _sampled(offset: int, length: int, samples: int) -> Iterator[tuple[int, int]]:
    if length <= _SAMPLE * (samples + 2):
        for at in range(offset, offset + length, _PIECE):
            yield at, min(_PIECE, offset + length - at)
        return
    last = length - _SAMPLE
    for i in range(samples + 2):
        yield offset + last * i // (samples + 1) // SECTOR_SIZE * SECTOR_SIZE, _SAMPLE


def _stored(image: Path | None, trusted: tuple[Path, ...]) -> list[tuple[int, int]]:
    """Return what the image stores anywhere in its chain: a grain that nobody wrote must not hide."""
    if image is None:
        return []
    try:
        with _opened(image, trusted) as chain:
            return [(run.offset, run.length) for run in chain.map() if run.kind is RunKind.DATA]
    except (VmdkSnapError, OSError):  # what is wrong with it shows in the guest
        return []


def _opened(image: Path, trusted: tuple[Path, ...]) -> Chain:
    # The guest has it open, and a CID that does not fit must not keep us from telling where data comes from.
    return open_chain(image, lock=False, check_cids=False, trusted_dirs=trusted)


def _first_wrong(
    probe: Reader, content: Content, offset: int, length: int, image: Path | None, trusted: tuple[Path, ...]
) -> WrongContent:
    """Return the error for the first wrong sector of a range that is wrong, found by halves."""

    def wrong(at: int, size: int) -> str | None:
        try:
            return None if probe.crc(at, size) == zlib.crc32(content.read(at, size)) else ""
        except ProbeError as error:
            return error.answer

    while length > SECTOR_SIZE:
        half = length // 2 // SECTOR_SIZE * SECTOR_SIZE
        if wrong(offset, half) is not None:
            length = half
        else:
            offset, length = offset + half, length - half
    failure = wrong(offset, length)
    read = failure or probe.dump(offset)
    written = content.read(offset, length)
    first = 0 if isinstance(read, str) else _first_difference(read, written)
    return WrongContent(probe.name, offset, written, read, *_place(image, trusted, offset, first, written))


def _first_difference(read: bytes, written: bytes) -> int:
    return next((i for i, (a, b) in enumerate(zip(read, written, strict=True)) if a != b), 0)


def _place(
    image: Path | None, trusted: tuple[Path, ...], offset: int, first: int, written: bytes
) -> tuple[Stored | str, bool | None, str]:
    """Return where byte `first` of the sector is, whether the engine reads the sector right, and stale CIDs."""
    if image is None:
        return "the image is not known", None, ""
    try:
        with _opened(image, trusted) as chain:
            run: Run = next(chain.map(offset, SECTOR_SIZE))
            engine = chain.read_at(offset, SECTOR_SIZE) == written
    except (VmdkSnapError, OSError) as error:
        return f"the engine cannot say where it is stored: {error}", None, ""
    cids = _misfit(image)
    at = run.file_offset if run.file_offset is None or run.compressed else run.file_offset + first
    stored = Stored(run.depth, run.kind.name.lower(), run.path, at, run.compressed)
    return stored, None if cids else engine, cids


def _misfit(image: Path) -> str:
    """Return which CIDs of the chain do not fit: without checking them the engine reads what it else refuses."""
    try:
        refuse_stale([image])
    except CidMismatch as error:
        return str(error)
    return ""
