"""Does a guest read from a chain what the engine reads, and what was read before?

Every stored run is read by the guest, whole; of holes and zeroed runs the guest reads samples: their first and last
sectors, and some in between. A difference from the engine is narrowed down to the sector, by asking the guest about
halves; one from a record to the block, since a record has a checksum of each block.
"""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NamedTuple

from qemu_vmdk_snap import Chain, FormatError, InvalidRequest, Run, RunKind, open_chain
from qemu_vmdk_snap.harness.hardware import DEFAULT_CONTROLLER, REACH
from qemu_vmdk_snap.harness.known.raw import RawReference, differing_sectors, is_raw
from qemu_vmdk_snap.harness.machine import boot
from qemu_vmdk_snap.harness.session import ProbeError, ProbeSession
from qemu_vmdk_snap.units import KIB, MIB, SECTOR_SIZE, format_size

PIECE: Final = MIB
"""Stored runs are compared in pieces of so many bytes."""

BLOCK: Final = 64 * KIB
"""A record has a checksum for each so many bytes of a piece: a grain of the usual size."""

SAMPLE: Final = 64 * KIB
DEFAULT_SAMPLES: Final = 8
"""Places looked at in each hole, besides its ends."""

MAX_SAMPLED_HOLES: Final = 1024
_RECORD_VERSION: Final = 1


class Piece(NamedTuple):
    """A stretch that is compared at once; bytes."""

    offset: int
    length: int
    kind: str
    """`data`, `zero` or `hole`."""


class Sums(NamedTuple):
    """CRC-32 of a piece and of its blocks."""

    whole: int
    blocks: tuple[int, ...]


class Plan(NamedTuple):
    """What to compare of a chain."""

    pieces: list[Piece]
    holes_left_out: int
    """Holes and zeroed runs beyond the first `MAX_SAMPLED_HOLES`."""


class Record(NamedTuple):
    """What a guest read earlier."""

    capacity: int
    pieces: dict[Piece, Sums]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A place that a guest sees otherwise than expected, and the link that it comes from."""

    offset: int
    """Guest byte."""
    length: int
    expected: str
    """Who expected something else: `engine`, `record`, or `raw`."""
    kind: str
    """`data`, `zero` or `hole`; or `size` where the disk does not end where it should."""
    depth: int
    path: str | None
    """The file that stores it, where one does."""
    file_offset: int | None
    failure: str | None = None
    """What the guest says when it cannot read there at all."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        place = f"guest bytes {self.offset:#x} to {self.offset + self.length:#x}"
        expected = "raw image" if self.expected == "raw" else self.expected
        if self.kind == "size":
            return f"{place}: there to the guest or to the {expected}, but not to both"
        where = f"byte {self.file_offset:#x} of {self.path}" if self.path else "stored nowhere"
        reads = f"cannot read ({self.failure})" if self.failure else f"reads something else than the {expected}"
        return f"{place} ({self.kind}, link {self.depth}, {where}): the guest {reads}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was compared and what differed; sizes in bytes, times in seconds."""

    path: str
    against: str | None
    """The record or raw image that it was compared with too: without one, guest and engine may be wrong alike."""
    capacity: int
    depth: int
    controller: str
    stored: int
    """Stored bytes that the guest read: all there are."""
    sampled: int
    """Bytes read of holes and zeroed runs."""
    holes_left_out: int
    """Holes and zeroed runs that the guest was not asked about: those beyond the first `MAX_SAMPLED_HOLES`."""
    pieces: int
    boot_seconds: float
    seconds: float
    mismatches: tuple[Mismatch, ...]

    @property
    def identical(self) -> bool:
        """Whether the guest saw what was expected everywhere."""
        return not self.mismatches

    def as_dict(self) -> dict[str, object]:
        """Return the report with JSON's own types, as `guest verify --output=json` shows it."""
        answer = {name.replace("_", "-"): value for name, value in asdict(self).items()}
        return answer | {"identical": self.identical, "mismatches": [one.as_dict() for one in self.mismatches]}


class Checked(NamedTuple):
    """How far a verification is."""

    done: int
    total: int


def verify_image(
    image: Path | str,
    *,
    controller: str = DEFAULT_CONTROLLER,
    samples: int = DEFAULT_SAMPLES,
    trusted_dirs: Sequence[Path | str] = (),
    record: Path | None = None,
    against: Path | str | None = None,
    log_dir: Path | None = None,
    max_mismatches: int = 16,
    on_piece: Callable[[Checked], None] = lambda _: None,
) -> VerifyReport:
    """Boot the probe on the chain of `image`, read-only, and compare what it reads with what the engine reads.

    `record` is written with the CRC-32 of every piece when all is well. `against` names such a record, made earlier, or
    a raw image with what should be read, and what the guest reads now is compared with it too: damage that engine and
    QEMU read alike is found by it alone. It ends early after `max_mismatches`.

    Raises:
        VmdkSnapError, OSError: the chain cannot be opened, see `open_chain`.
        InvalidRequest: `against` is a VMDK image, or the BIOS does not see the whole of so large a disk on this
            controller.
        FormatError: `against` is neither a record nor a raw image of this disk.
        GuestError: QEMU or the probe failed.
        PluginError: QEMU is not installed.
    """
    if samples < 0:
        raise InvalidRequest("samples", f"{samples} is negative")
    raw = RawReference(against) if against is not None and is_raw(against) else None
    earlier = _read_record(Path(against)) if against is not None and raw is None else None
    started = time.monotonic()
    with open_chain(image, trusted_dirs=trusted_dirs) as chain, contextlib.ExitStack() as stack:
        if raw is not None:
            stack.callback(raw.close)
            raw.check_length(chain.capacity)
        _check_reach(Path(image), chain.capacity, controller)
        planned = plan(chain.map(), samples)
        with boot(image, controller=controller, log_dir=log_dir) as machine:
            run = _Verification(chain, machine.probe, max_mismatches, raw)
            compared = run.check_all(planned.pieces, earlier, on_piece)
            machine.power_off()
        report = VerifyReport(
            path=str(image),
            against=None if against is None else str(against),
            capacity=chain.capacity,
            depth=chain.depth,
            controller=controller,
            stored=sum(piece.length for piece in planned.pieces if piece.kind == "data"),
            sampled=sum(piece.length for piece in planned.pieces if piece.kind != "data"),
            holes_left_out=planned.holes_left_out,
            pieces=compared,
            boot_seconds=machine.boot_seconds,
            seconds=time.monotonic() - started,
            mismatches=tuple(run.mismatches),
        )
    if record is not None and report.identical:
        _write_record(record, Record(report.capacity, run.seen))
    return report


def _check_reach(image: Path, capacity: int, controller: str) -> None:
    reach = REACH.get(controller)
    if reach is not None and capacity > reach:
        raise InvalidRequest(image, f"the BIOS sees only {format_size(reach)} of a disk on {controller}: take another")


def plan(runs: Iterator[Run], samples: int) -> Plan:
    """Return what to compare of `runs`: every stored byte, and samples of what is stored nowhere."""
    pieces: list[Piece] = []
    holes = 0
    for run in runs:
        if run.kind is RunKind.DATA:
            pieces += _pieces(run)
            continue
        holes += 1
        if holes <= MAX_SAMPLED_HOLES:
            pieces += _samples(run, samples)
    return Plan(pieces, max(0, holes - MAX_SAMPLED_HOLES))


def _pieces(run: Run) -> Iterator[Piece]:
    end = run.offset + run.length
    for start in range(run.offset, end, PIECE):
        yield Piece(start, min(PIECE, end - start), run.kind.name.lower())


def _samples(run: Run, samples: int) -> Iterator[Piece]:
    kind = run.kind.name.lower()
    if run.length <= SAMPLE * (samples + 2):
        yield from _pieces(run)
        return
    # Evenly spread, the first and the last sectors of the run among them; the same places every time.
    last = run.length - SAMPLE
    for i in range(samples + 2):
        start = last * i // (samples + 1) // SECTOR_SIZE * SECTOR_SIZE
        yield Piece(run.offset + start, SAMPLE, kind)


class _Verification:
    """The comparisons of one boot."""

    def __init__(self, chain: Chain, probe: ProbeSession, max_mismatches: int, raw: RawReference | None = None) -> None:
        self._chain = chain
        self._probe = probe
        self._max = max_mismatches
        self._raw = raw
        self._failure = ""
        self.mismatches: list[Mismatch] = []
        self.seen: dict[Piece, Sums] = {}

    def check_all(self, pieces: list[Piece], earlier: Record | None, on_piece: Callable[[Checked], None]) -> int:
        """Compare the size, then every piece, planned now or recorded earlier, and return how many."""
        end = self._check_size(earlier)
        recorded = earlier.pieces if earlier is not None else {}
        # Where the disk ends too early there is nothing to read: the size is wrong, and that is told.
        wanted = {*pieces, *recorded, *self._in_raw(pieces)}
        work = [piece for piece in sorted(wanted) if piece.offset + piece.length <= end]
        for number, piece in enumerate(work):
            if len(self.mismatches) >= self._max:
                return number
            self._check(piece, recorded.get(piece))
            on_piece(Checked(number + 1, len(work)))
        return len(work)

    def _in_raw(self, planned: list[Piece]) -> Iterator[Piece]:
        """Yield what the raw image stores and no planned piece covers: holes of the chain are read by samples only."""
        if self._raw is None:
            return
        covered = sorted((piece.offset, piece.offset + piece.length) for piece in planned)
        for offset, length in self._raw.stored(self._chain.capacity):
            for start, end in _outside(offset, offset + length, covered):
                for at in range(start, end, PIECE):
                    yield Piece(at, min(PIECE, end - at), "data")

    def _check_size(self, earlier: Record | None) -> int:
        """Compare the sizes of the disk, and return the smallest."""
        seen = self._probe.size()
        ends: dict[str, int] = {"engine": self._chain.capacity}
        if earlier is not None:
            ends["record"] = earlier.capacity
        if self._raw is not None:
            ends["raw"] = self._raw.capacity
        for expected, end in ends.items():
            if seen != end:
                self.mismatches.append(Mismatch(min(seen, end), abs(seen - end), expected, "size", 0, None, None))
        return min(seen, *ends.values())

    def _check(self, piece: Piece, recorded: Sums | None) -> None:
        """Compare one piece with the engine, and with what was recorded of it."""
        data = self._chain.read_at(piece.offset, piece.length)
        sums = Sums(zlib.crc32(data), tuple(zlib.crc32(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)))
        seen = self._ask(piece.offset, piece.length)
        if seen != sums.whole:
            self._narrow(piece.offset, piece.length)
            return
        self.seen[piece] = sums
        if self._raw is not None:
            for start, length in differing_sectors(data, self._raw.read(piece.offset, piece.length)):
                self._add(piece.offset + start, length, "raw")
        if recorded is not None and sums != recorded:
            wrong = [i for i, (now, then) in enumerate(zip(sums.blocks, recorded.blocks, strict=True)) if now != then]
            for start in (i * BLOCK for i in wrong[: self._max - len(self.mismatches)]):
                self._add(piece.offset + start, min(BLOCK, piece.length - start), "record")
            if not wrong:  # only the sum of the whole is another: the record contradicts itself, which is no proof
                self._add(piece.offset, piece.length, "record")

    def _ask(self, offset: int, length: int) -> int | None:
        """Return the CRC-32 of what the guest reads, or None when it cannot read."""
        try:
            return self._probe.crc(offset, length)
        except ProbeError as error:
            self._failure = error.answer
            return None

    def _narrow(self, offset: int, length: int) -> None:
        """Find the differing sectors in a range that differs, by halves."""
        if len(self.mismatches) >= self._max:
            return
        if length <= SECTOR_SIZE:
            failure = self._failure if self._ask(offset, length) is None else None
            self._add(offset, length, "engine", failure)
            return
        half = length // 2 // SECTOR_SIZE * SECTOR_SIZE
        for start, size in ((offset, half), (offset + half, length - half)):
            if self._ask(start, size) != zlib.crc32(self._chain.read_at(start, size)):
                self._narrow(start, size)

    def _add(self, offset: int, length: int, expected: str, failure: str | None = None) -> None:
        run = next(self._chain.map(offset, length))
        path = str(run.path) if run.path else None
        kind = run.kind.name.lower()
        self.mismatches.append(Mismatch(offset, length, expected, kind, run.depth, path, run.file_offset, failure))


def _outside(start: int, end: int, taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the parts of a stretch that are in none of those taken, which are sorted and do not overlap."""
    for first, last in taken:
        if last <= start:
            continue
        if first >= end:
            break
        if first > start:
            yield start, first
        start = last
    if start < end:
        yield start, end


def _write_record(path: Path, record: Record) -> None:
    """Write it as JSON, a piece a line: offset, length, kind, CRC-32, the CRC-32s of its blocks in one word."""
    lines = [
        json.dumps([*piece, f"{sums.whole:08x}", "".join(f"{crc:08x}" for crc in sums.blocks)])
        for piece, sums in record.pieces.items()
    ]
    head = {"version": _RECORD_VERSION, "capacity": record.capacity, "block": BLOCK}
    path.write_text(json.dumps(head)[:-1] + ', "pieces": [\n' + ",\n".join(lines) + "\n]}\n")


def _read_record(path: Path) -> Record:
    rule = "must be what `guest verify --record` writes, or a raw image"
    try:
        value = json.loads(path.read_text())
        head = value["version"], value["block"]
        record = Record(int(value["capacity"]), dict(_read_piece(*fields) for fields in value["pieces"]))
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(path, 0, "record", str(error), rule) from error
    if head != (_RECORD_VERSION, BLOCK):
        raise FormatError(path, 0, "version and block", head, rule)
    return record


def _read_piece(offset: int, length: int, kind: str, whole: str, blocks: str) -> tuple[Piece, Sums]:
    if offset % SECTOR_SIZE or length % SECTOR_SIZE or offset < 0 or not 0 < length <= PIECE:
        raise ValueError(f"a piece of {length} bytes at {offset}")
    if len(blocks) != 8 * -(-length // BLOCK):
        raise ValueError(f"{len(blocks) // 8} blocks in {length} bytes")
    sums = tuple(int(blocks[i : i + 8], 16) for i in range(0, len(blocks), 8))
    return Piece(offset, length, kind), Sums(int(whole, 16), sums)
