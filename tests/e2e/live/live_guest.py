"""A probe in a libvirt domain that writes all the time, and what its disk may then hold at any point in time.

The writer walks over a few regions in turn; each pass has a seed of its own, so every sector tells which pass wrote it.
Whatever moment a snapshot froze, each sector is of the last pass that had answered, or of the one under way; and in
each region those of the pass under way come first. Anything else is a lost, torn or reordered write.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qemu_vmdk_snap import create_image, open_chain
from qemu_vmdk_snap.harness import ProbeSession, attach, disk_image, pattern

if TYPE_CHECKING:
    import libvirt

MIB: Final = 1 << 20
SECTOR: Final = 512
REGION: Final = 64 * 1024
STARTS: Final = (2 * MIB, 5 * MIB + 4096, 9 * MIB + 512)


def domain_xml(name: str, disks: Sequence[Path], serial: Path, *, image_format: str = "vmdk", extra: str = "") -> str:
    """Return a domain that boots the probe from its first disk, a SATA one."""
    elements = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='{image_format}'/><source file='{path}'/>"
        f"<target dev='{target}' bus='{bus}'/></disk>"
        for path, (target, bus) in zip(disks, (("sda", "sata"), ("vdb", "virtio"), ("vdc", "virtio")), strict=False)
    )
    return (
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory>"
        "<os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os><features><acpi/></features><devices>"
        f"<emulator>/usr/bin/qemu-system-x86_64</emulator>{elements}{extra}<memballoon model='none'/>"
        f"<serial type='unix'><source mode='bind' path='{serial}'/><target port='0'/></serial></devices></domain>"
    )


def boot_disk(path: Path, size: int = 16 * MIB) -> Path:
    """Return a new disk with the probe on it."""
    create_image(path, size, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, disk_image())
    return path


@dataclass(frozen=True)
class Progress:
    """Passes begun and passes ended, at one moment."""

    begun: int
    ended: int


class Writer:
    """Lets the probe write without a rest, in a thread of its own. Pass n has the seed n, from 1 on."""

    def __init__(self, probe: ProbeSession) -> None:
        self.probe = probe
        self.gaps: list[tuple[float, float]] = []
        """(when it answered, how long it took) of each command."""
        self._begun = self._ended = 0
        self._stop = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writer")

    def __enter__(self) -> Writer:
        self._thread.start()
        self.wait(2)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(60)
        if self.error is not None:
            raise self.error

    @property
    def progress(self) -> Progress:
        """What is begun and ended now: read `ended` before a snapshot and `begun` after it."""
        return Progress(self._begun, self._ended)

    def wait(self, passes: int) -> None:
        """Return when so many more passes have ended."""
        until, deadline = self._ended + passes, time.monotonic() + 60
        while self._ended < until:
            assert self.error is None, self.error
            assert time.monotonic() < deadline, "the guest has stopped writing"
            time.sleep(0.002)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._begun += 1
                for start in STARTS:
                    began = time.monotonic()
                    self.probe.pattern(self._begun, start, REGION)
                    self.gaps.append((time.monotonic(), time.monotonic() - began))
                self._ended += 1
        except BaseException as error:
            self.error = error


def check_frozen(path: Path, before: Progress, after: Progress, folders: Sequence[Path] = ()) -> int:
    """Check that the image shows one moment between `before` and `after`; return the last pass that it shows.

    `folders` are where its parents may lie, besides its own.
    """
    with open_chain(path, lock=False, trusted_dirs=folders) as chain:
        data = [chain.read_at(start, REGION) for start in STARTS]
    seen: list[int] = []
    for start, region in zip(STARTS, data, strict=True):
        for index in range(REGION // SECTOR):
            sector = region[index * SECTOR : (index + 1) * SECTOR]
            seen.append(_pass_of(sector, start // SECTOR + index, range(before.ended, after.begun + 1)))
    # One writer, one order: passes never go up along the order in which sectors are written, and span two at most.
    assert seen == sorted(seen, reverse=True), f"{path}: written out of order"
    assert seen[0] - seen[-1] <= 1, f"{path}: passes {seen[-1]} to {seen[0]}"
    return seen[0]


def _pass_of(sector: bytes, lba: int, passes: range) -> int:
    """Return which pass wrote the sector: its first word tells the seed, all of it that nothing is torn."""
    if not any(sector) and passes.start == 0:
        return 0
    state = int.from_bytes(sector[:4], "little")
    for shift in (5, -17, 13):  # xorshift32 backwards
        state = _unshift(state, shift)
    number = state ^ (lba * 0x9E3779B1 & 0xFFFF_FFFF)
    assert number in passes, f"sector {lba} is of pass {number}, not of {passes.start} to {passes.stop - 1}"
    start = next(start // SECTOR for start in STARTS if 0 <= lba - start // SECTOR < REGION // SECTOR)
    at = (lba - start) * SECTOR
    assert sector == _region(number, start)[at : at + SECTOR], f"sector {lba} is torn"
    return number


@functools.lru_cache(maxsize=64)
def _region(number: int, lba: int) -> bytes:
    return pattern(number, lba * SECTOR, REGION)


def _unshift(word: int, shift: int) -> int:
    """Undo `word ^= word << shift` (or, where negative, `>>`) in 32 bits."""
    result = word
    for _ in range(32 // abs(shift) + 1):
        moved = result << shift if shift > 0 else result >> -shift
        result = word ^ moved & 0xFFFF_FFFF
    return result


def start(domain: libvirt.virDomain, serial: Path) -> ProbeSession:
    """Start the domain and return the session with its probe."""
    serial.unlink(missing_ok=True)
    domain.create()
    return attach(serial, seconds=40)
