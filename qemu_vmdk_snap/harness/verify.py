"""Does a guest read from a chain what the engine reads, and what was read before?

Every stored run is read by the guest, whole; of holes and zeroed runs the guest reads samples: their first and last
sectors, and some in between. A difference is narrowed down to the sector, by asking the guest about halves.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NamedTuple

from qemu_vmdk_snap import Chain, FormatError, Run, RunKind, open_chain
from qemu_vmdk_snap.harness.machine import DEFAULT_CONTROLLER, boot
from qemu_vmdk_snap.harness.session import ProbeSession
from qemu_vmdk_snap.units import KIB, MIB, SECTOR_SIZE

PIECE: Final = MIB
"""Stored runs are compared in pieces of so many bytes."""

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


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A sector that a guest sees otherwise than expected, and the link that it comes from."""

    offset: int
    """Guest byte."""
    length: int
    expected: str
    """Who expected something else: `engine`, or `record`."""
    kind: str
    depth: int
    path: str | None
    """The file that stores it, where one does."""
    file_offset: int | None

    def __str__(self) -> str:
        where = f"byte {self.file_offset:#x} of {self.path}" if self.path else "stored nowhere"
        place = f"guest bytes {self.offset:#x} to {self.offset + self.length:#x}"
        reads = f"the guest reads something else than the {self.expected}"
        return f"{place} ({self.kind}, link {self.depth}, {where}): {reads}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was compared and what differed; sizes in bytes, times in seconds."""

    path: str
    capacity: int
    depth: int
    controller: str
    stored: int
    """Stored bytes that the guest read: all there are."""
    sampled: int
    """Bytes read of holes and zeroed runs."""
    pieces: int
    boot_seconds: float
    seconds: float
    mismatches: tuple[Mismatch, ...]

    @property
    def identical(self) -> bool:
        """Whether the guest saw what was expected everywhere."""
        return not self.mismatches


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
    against: Path | None = None,
    log_dir: Path | None = None,
    max_mismatches: int = 16,
    on_piece: Callable[[Checked], None] = lambda _: None,
) -> VerifyReport:
    """Boot the probe on the chain of `image`, read-only, and compare what it reads with what the engine reads.

    `record` is written with the CRC-32 of every piece when all is well; `against` names such a record, made earlier,
    and what the guest reads now is compared with it too: damage that engine and QEMU read alike is found by it alone.

    Raises:
        VmdkSnapError, OSError: the chain cannot be opened, see `open_chain`.
        GuestError: QEMU or the probe failed.
        PluginError: QEMU is not installed.
    """
    expected = _read_record(against) if against is not None else {}
    started = time.monotonic()
    with open_chain(image, trusted_dirs=trusted_dirs) as chain:
        pieces = list(plan(chain.map(), samples))
        work = sorted({*pieces, *expected})
        with boot(image, controller=controller, log_dir=log_dir) as machine:
            run = _Verification(chain, machine.probe, max_mismatches)
            run.check_size()
            for number, piece in enumerate(work):
                run.check(piece, expected.get(piece))
                on_piece(Checked(number + 1, len(work)))
                if len(run.mismatches) >= max_mismatches:
                    break
            machine.power_off()
        report = VerifyReport(
            path=str(image),
            capacity=chain.capacity,
            depth=chain.depth,
            controller=controller,
            stored=sum(piece.length for piece in pieces if piece.kind == "data"),
            sampled=sum(piece.length for piece in pieces if piece.kind != "data"),
            pieces=len(work),
            boot_seconds=machine.boot_seconds,
            seconds=time.monotonic() - started,
            mismatches=tuple(run.mismatches),
        )
    if record is not None and report.identical:
        _write_record(record, chain.capacity, run.seen)
    return report


def plan(runs: Iterator[Run], samples: int) -> Iterator[Piece]:
    """Yield what to compare of `runs`: every stored byte, and samples of what is stored nowhere."""
    holes = 0
    for run in runs:
        if run.kind is RunKind.DATA:
            for start in range(run.offset, run.offset + run.length, PIECE):
                yield Piece(start, min(PIECE, run.offset + run.length - start), "data")
            continue
        holes += 1
        if holes <= MAX_SAMPLED_HOLES:
            yield from _samples(run, samples)


def _samples(run: Run, samples: int) -> Iterator[Piece]:
    kind = run.kind.name.lower()
    if run.length <= SAMPLE * (samples + 2):
        for start in range(run.offset, run.offset + run.length, PIECE):
            yield Piece(start, min(PIECE, run.offset + run.length - start), kind)
        return
    # Evenly spread, the first and the last sectors of the run among them; the same places every time.
    last = run.length - SAMPLE
    for i in range(samples + 2):
        start = last * i // (samples + 1) // SECTOR_SIZE * SECTOR_SIZE
        yield Piece(run.offset + start, SAMPLE, kind)


class _Verification:
    """The comparisons of one boot."""

    def __init__(self, chain: Chain, probe: ProbeSession, max_mismatches: int) -> None:
        self._chain = chain
        self._probe = probe
        self._max = max_mismatches
        self.mismatches: list[Mismatch] = []
        self.seen: dict[Piece, int] = {}

    def check_size(self) -> None:
        """Compare the size of the disk."""
        seen = self._probe.size()
        if seen != self._chain.capacity:
            offset = min(seen, self._chain.capacity)
            self.mismatches.append(Mismatch(offset, abs(seen - self._chain.capacity), "engine", "size", 0, None, None))

    def check(self, piece: Piece, recorded: int | None) -> None:
        """Compare one piece with the engine, and with what was recorded of it."""
        seen = self._probe.crc(piece.offset, piece.length)
        self.seen[piece] = seen
        if seen != zlib.crc32(self._chain.read_at(piece.offset, piece.length)):
            self._narrow(piece.offset, piece.length)
        elif recorded is not None and seen != recorded:
            self._add(piece.offset, piece.length, "record")

    def _narrow(self, offset: int, length: int) -> None:
        """Find the differing sectors in a range that differs, by halves."""
        if len(self.mismatches) >= self._max:
            return
        if length <= SECTOR_SIZE:
            self._add(offset, length, "engine")
            return
        half = length // 2 // SECTOR_SIZE * SECTOR_SIZE
        for start, size in ((offset, half), (offset + half, length - half)):
            if self._probe.crc(start, size) != zlib.crc32(self._chain.read_at(start, size)):
                self._narrow(start, size)

    def _add(self, offset: int, length: int, expected: str) -> None:
        run = next(self._chain.map(offset, length))
        path = str(run.path) if run.path else None
        kind = run.kind.name.lower()
        self.mismatches.append(Mismatch(offset, length, expected, kind, run.depth, path, run.file_offset))


def _write_record(path: Path, capacity: int, seen: dict[Piece, int]) -> None:
    pieces = [[*piece, f"{crc:08x}"] for piece, crc in seen.items()]
    text = json.dumps({"version": _RECORD_VERSION, "capacity": capacity, "pieces": pieces}, indent=0)
    path.write_text(text + "\n")


def _read_record(path: Path) -> dict[Piece, int]:
    rule = "must be what `guest verify --record` writes"
    try:
        value = json.loads(path.read_text())
        version = value["version"]
        pieces = {Piece(int(o), int(n), str(kind)): int(crc, 16) for o, n, kind, crc in value["pieces"]}
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(path, 0, "record", str(error), rule) from error
    if version != _RECORD_VERSION:
        raise FormatError(path, 0, "version", version, rule)
    return pieces


def as_json(report: VerifyReport) -> dict[str, object]:
    """Return the report as plain values, with the verdict."""
    return {**asdict(report), "identical": report.identical}
