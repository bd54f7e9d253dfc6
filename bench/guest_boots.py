"""`python -m bench.guest_boots`: from the start of a guest to its verdict, beside a script of QEMU and pexpect.

Both boot the probe under plain emulation from a floppy, ask for the checksum of a sector of the same VMDK disk, and let
it switch off. The script has what such a script has: QEMU's serial port on standard output, and pexpect. Taken in
pairs, the first of a pair by turns; then eight of each at once.

`--linux` compares the boot of the Linux guest with that of the same kernel under QEMU and pexpect alone, whose
initramfs is a program of 160 bytes that writes a line: once with the command line `console=ttyS0 quiet` (plain), once
with that of the guest (tuned). Each round is printed as it is taken, with the seconds to the answer of the first
command (answered) and how many of a processor QEMU had for that (processor): about what an idle machine takes.

`--flakes N` boots N times in a row while `--load K` processes (8) keep the processors busy, and counts what went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pexpect

from bench.bare_linux import boot_bare, smallest_initramfs
from qemu_vmdk_snap import GuestError
from qemu_vmdk_snap.harness import KnownChain, boot, boot_linux, build_guest, floppy_image
from qemu_vmdk_snap.harness.linux.guest import kernel_arguments
from qemu_vmdk_snap.harness.probe import command_line

AT_ONCE = 8
TARGET, TARGET_AT_ONCE, TARGET_LINUX, TARGET_SHELL = 1.1, 1.2, 1.2, 2.5
LONGEST = 60.0  # seconds for a Linux to come up
CRC = b"%08x" % zlib.crc32(b"to be read".ljust(512, b"\0"))

Take = Callable[[], float]


def main() -> int:
    """Measure, print the table, and return 0 when every ratio is within its target and nothing went wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.guest_boots", description=__doc__)
    parser.add_argument("-n", "--rounds", type=int, default=20, help="pairs, and groups of eight (20)")
    parser.add_argument("--linux", action="store_true", help="the Linux guest beside its kernel under QEMU alone")
    parser.add_argument("--flakes", type=int, metavar="N", help="boot N times in a row, and count failures")
    parser.add_argument("--load", type=int, default=8, metavar="K", help="busy processes beside --flakes (8)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vmdk-", dir="/tmp") as name:
        chain = KnownChain(Path(name) / "c", "64M").write("1M", b"to be read")
        floppy = Path(name) / "probe.img"
        floppy.write_bytes(floppy_image())
        if args.flakes:
            return flakes(chain, args.flakes, args.load)
        if args.linux:
            return linux(chain, args.rounds, Path(name))
        ours, theirs = functools.partial(harness, chain), functools.partial(script, chain, floppy)
        rows = [("start to verdict", *pairs(ours, theirs, args.rounds), TARGET)]
        eight = pairs(functools.partial(at_once, ours), functools.partial(at_once, theirs), max(3, args.rounds // 4))
        return show([*rows, (f"{AT_ONCE} at once", *eight, TARGET_AT_ONCE)])


def show(rows: list[tuple[str, list[float], list[float], float]]) -> int:
    """Print medians and ratios."""
    print(f"{'median, seconds':<20}{'ours':>8}{'theirs':>8}{'ratio':>8}{'target':>8}")
    good = True
    for name, ours, theirs, target in rows:
        mine, other = statistics.median(ours), statistics.median(theirs)
        good = good and mine / other <= target
        print(f"{name:<20}{mine:>8.3f}{other:>8.3f}{mine / other:>8.2f}{target:>8.2f}")
    return 0 if good else 1


def pairs(ours: Take, theirs: Take, rounds: int) -> tuple[list[float], list[float]]:
    """Return the times of both, the first of a pair by turns; a pair more goes before, and is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            taken = (ours, theirs)[which]()
            if number:
                times[which].append(taken)
    return times


def at_once(take: Take) -> float:
    """Return how long eight take that start together."""
    started = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda _: take(), range(AT_ONCE)))
    return time.monotonic() - started


def harness(chain: KnownChain) -> float:
    """Return the seconds that a boot by the harness takes."""
    started = time.monotonic()
    with boot(chain.top, accelerator="tcg") as guest:
        assert guest.probe.crc(1 << 20, 512) == int(CRC, 16)
        guest.power_off()
    return time.monotonic() - started


def script(chain: KnownChain, floppy: Path) -> float:
    """Return the seconds that the script takes."""
    started = time.monotonic()
    words = ["-nodefaults", "-display", "none", "-machine", "pc", "-accel", "tcg", "-m", "16", "-serial", "stdio"]
    words += ["-device", "isa-debug-exit,iobase=0x501,iosize=1", "-boot", "order=a"]
    words += ["-drive", f"if=none,id=disk,format=vmdk,file={chain.top},snapshot=on"]
    words += ["-device", "ahci,id=ahci", "-device", "ide-hd,drive=disk,bus=ahci.0"]
    words += ["-drive", f"if=floppy,format=raw,readonly=on,file={floppy}"]
    guest = pexpect.spawn("qemu-system-x86_64", words, echo=False, timeout=60)
    guest.delaybeforesend = None
    guest.expect(rb"00 ok probe")
    guest.send(command_line("01", "crc 800 1"))
    guest.expect(rb"01 ok " + CRC)
    guest.send(command_line("02", "off 0"))
    guest.expect(pexpect.EOF)
    guest.close()
    return time.monotonic() - started


def linux(chain: KnownChain, rounds: int, scratch: Path) -> int:
    """Measure the Linux guest beside its kernel alone, print each round and the table, and return 0 or 1 as `main`."""
    made = build_guest()
    kernel, initrd = made.kernel.with_name("vmlinuz"), scratch / "smallest.cpio"
    initrd.write_bytes(smallest_initramfs())
    plain, tuned = "console=ttyS0 quiet panic=-1", kernel_arguments("virtio-blk", 1, "tcg")
    takes: list[Callable[[], dict[str, float]]] = [
        lambda: ours_linux(chain),
        lambda: {"plain": boot_bare(kernel, initrd, plain, LONGEST)},
        lambda: {"tuned": boot_bare(kernel, initrd, tuned, LONGEST)},
    ]
    rounds_taken: list[dict[str, float]] = []
    for number in range(rounds + 1):
        taken: dict[str, float] = {}
        for take in takes if number % 2 else reversed(takes):
            taken |= take()
        rounds_taken.append(taken)
        words = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in sorted(taken.items()))
        print(f"round {number}: {words}; load {os.getloadavg()[0]:.1f}", flush=True)
    times = {name: [taken[name] for taken in rounds_taken[1:]] for name in rounds_taken[0]}
    shell, processor = statistics.median(times["answered"]), statistics.median(times["processor"])
    rows = [(name, times["booted"], times[name], TARGET_LINUX) for name in ("plain", "tuned")]
    done = show([(f"kernel, {name}", *rest) for name, *rest in rows])  # type: ignore[misc]
    shortest = min(times["answered"])
    print(f"Linux shell: {shell:.2f} s (target {TARGET_SHELL}), shortest {shortest:.2f} s, processor {processor:.2f} s")
    return done


def ours_linux(chain: KnownChain) -> dict[str, float]:
    """Return the seconds to the end of the boot of a Linux, to its first answer, and QEMU's of a processor for both."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with boot_linux(chain.top, accelerator="tcg", seconds=LONGEST) as guest:
        booted = time.monotonic() - started
        guest.check("true", timeout=LONGEST)
        answered = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"booted": booted, "answered": answered, "processor": processor}


def flakes(chain: KnownChain, boots: int, load: int) -> int:
    """Boot so many times with so many busy processes beside, and say what went wrong."""
    times, failures = [], []
    with busy(load):
        for number in range(boots):
            try:
                times.append(harness(chain))
            except (GuestError, AssertionError) as error:
                failures.append(f"boot {number + 1}: {error}")
    for line in failures:
        print(line)
    median, longest = (statistics.median(times), max(times)) if times else (0.0, 0.0)
    average = os.getloadavg()[0]
    print(f"{boots} boots, {len(failures)} failed; median {median:.2f} s, longest {longest:.2f} s, load {average:.1f}")
    return 1 if failures else 0


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many processes busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
