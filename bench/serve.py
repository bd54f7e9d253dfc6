"""`python -m bench.serve`: a served disk beside `qemu-nbd -f vmdk` on the same image, by fio's nbd engine.

The two are run by turns, several rounds a row; the table has the medians of requests (or copies) a second, their ratio,
and the server's CPU time for one request. `--fsync` is used, not `--fdatasync`: fio 3.33's engine answers that with
EINVAL and still prints a figure. The last row is the pause of a live snapshot under load, which has no peer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qemu_vmdk_snap import create_image, create_overlay, open_chain

MIB: Final = 1 << 20
GIB: Final = 1 << 30
_TICK: Final = 1e6 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Row:
    """What fio does, on a chain of which depth, and how good ours must be."""

    name: str
    goal: float
    words: tuple[str, ...]
    depth: int = 1
    fresh: bool = False
    """Whether each run has an empty image of its own."""
    jobs: int = 1


def _row(name: str, goal: float, rw: str, size: str, iodepth: int, *more: str, **options: Any) -> Row:  # noqa: ANN401
    words = (f"--rw={rw}", f"--bs={size}", f"--iodepth={iodepth}", *more)
    return Row(name, goal, words, **options)


ROWS: Final = [
    *(_row(f"read 4K, queue 16, chain of {n}", 2.0, "randread", "4k", 16, depth=n) for n in (1, 3, 10)),
    *(_row(f"write 4K, queue 16, chain of {n}", 2.0, "randwrite", "4k", 16, depth=n) for n in (1, 3, 10)),
    _row("read 4K, queue 1", 1.5, "randread", "4k", 1),
    _row("read 64K sequential", 1.5, "read", "64k", 1),
    _row("write 64K sequential", 1.5, "write", "64k", 1),
    _row("read 1M sequential", 2.0, "read", "1m", 4),
    _row("write 1M sequential", 2.0, "write", "1m", 4),
    _row("write 1M allocating", 1.2, "write", "1m", 4, fresh=True),
    _row("write 4K allocating", 3.0, "randwrite", "4k", 16, fresh=True),
    _row("write 4K allocating, flush every 32", 3.0, "randwrite", "4k", 16, "--fsync=32", fresh=True),
    _row("write 4K, queue 1", 1.0, "randwrite", "4k", 1),
    _row("rewrite 4K, flush every 32", 0.9, "randwrite", "4k", 16, "--fsync=32"),
    _row("read 4K, four connections", 3.0, "randread", "4k", 16, jobs=4),
    _row("write 4K, four connections", 3.0, "randwrite", "4k", 16, jobs=4),
]


@dataclass(slots=True)
class Taken:
    """The samples of one server in one row."""

    rates: list[float] = field(default_factory=list)
    micros: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Median of what was done in a second."""
        return statistics.median(self.rates)

    @property
    def micro(self) -> float:
        """Median of the microseconds of CPU for one."""
        return statistics.median(self.micros)


def main() -> int:
    """Measure the rows and print the table; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="WORD", help="rows whose names have this word (default: all)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where images may lie (6 GiB)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="also keep every sample here")
    args = parser.parse_args()
    if shutil.which("fio") is None:
        parser.error("fio is not installed")
    kept: dict[str, object] = {}
    missed = 0
    print(f"{'row':<38}{'ours':>9}{'qemu-nbd':>10}{'ratio':>7}{'goal':>6}{'us ours':>9}{'us qemu':>9}{'ratio':>7}")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as folder:
        here = Path(folder)
        for row in [one for one in ROWS if not args.rows or any(word in one.name for word in args.rows)]:
            ours, theirs = measured(row, here, args.rounds, args.seconds)
            missed += _show(row.name, row.goal, ours, theirs)
            kept[row.name] = {"ours": [ours.rates, ours.micros], "qemu-nbd": [theirs.rates, theirs.micros]}
        if not args.rows or "nbdcopy" in args.rows:
            missed += _show("nbdcopy to null: (copies/s x 100)", 1.3, *copied(here, args.rounds))
        if not args.rows or "pause" in args.rows:
            pauses = paused(here)
            kept["pause"] = pauses
            middle = statistics.median(pauses) * 1000
            missed += middle > 5.0
            print(f"pause of a snapshot under load: median of 20 {middle:.2f} ms, longest {max(pauses) * 1000:.1f} ms")
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 1 if missed else 0


def _show(name: str, goal: float, ours: Taken, theirs: Taken) -> bool:
    ratio, cpu = ours.rate / theirs.rate, ours.micro / max(theirs.micro, 0.01)
    missed = ratio < goal or cpu > 0.5
    print(
        f"{name:<38}{ours.rate:>9.0f}{theirs.rate:>10.0f}{ratio:>7.2f}{goal:>6.1f}"
        f"{ours.micro:>9.1f}{theirs.micro:>9.1f}{cpu:>7.2f}{'  missed' if missed else ''}",
        flush=True,
    )
    return missed


def measured(row: Row, folder: Path, rounds: int, seconds: float) -> tuple[Taken, Taken]:
    """Return the samples of ours and of qemu-nbd's."""
    found = {"ours": Taken(), "theirs": Taken()}
    image = None if row.fresh else chain(folder, row.depth)
    for number in range(rounds):
        for which in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            target = image or empty(folder)
            with server(which, target, folder) as (uri, pid):
                before = cpu_of(pid)
                rate, count = fio(uri, row, seconds)
                micros = (cpu_of(pid) - before) / max(count, 1)
            found[which].rates.append(rate)
            found[which].micros.append(micros)
    return found["ours"], found["theirs"]


def copied(folder: Path, rounds: int) -> tuple[Taken, Taken]:
    """Return the samples of copying a whole disk to nowhere."""
    found = {"ours": Taken(), "theirs": Taken()}
    image = chain(folder, 1)
    for number in range(rounds):
        for which in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            with server(which, image, folder) as (uri, pid):
                before, began = cpu_of(pid), time.monotonic()
                subprocess.run(["nbdcopy", uri, "null:"], check=True)
                found[which].rates.append(100 / (time.monotonic() - began))
                found[which].micros.append((cpu_of(pid) - before) / 4096)
    return found["ours"], found["theirs"]


def paused(folder: Path, count: int = 20) -> list[float]:
    """Return the seconds for which each of `count` snapshots held the clients, who wrote all the while."""
    image = empty(folder)
    row = Row("", 1.0, ("--rw=randwrite", "--bs=4k", "--iodepth=16"))
    with server("ours", image, folder) as (uri, _):
        load = threading.Thread(target=fio, args=(uri, row, 15.0))
        load.start()
        time.sleep(1.0)
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(folder / "s.control"))
            lines = control.makefile("rb")
            pauses = []
            for number in range(count):
                overlay = str(folder / f"p{number}.vmdk")
                words = json.dumps({"execute": "snapshot", "arguments": {"overlay": overlay}})
                control.sendall(words.encode() + b"\n")
                pauses.append(float(json.loads(lines.readline())["return"]["pause_seconds"]))
                time.sleep(0.3)
        load.join()
    return pauses


def chain(folder: Path, depth: int) -> Path:
    """Return the top of a chain whose links store one after the other of the disk's grains."""
    paths = [folder / f"c{depth}-{number}.vmdk" for number in range(depth)]
    if paths[-1].exists():
        return paths[-1]
    chance = random.Random(depth)
    data = chance.randbytes(MIB)
    for number, path in enumerate(paths):
        create_image(path, GIB) if number == 0 else create_overlay(path, paths[number - 1])
        with open_chain(path, writable=True) as image:
            for grain in range(GIB >> 16):
                if number == 0 or grain % depth == number:
                    image.write_at(grain << 16, data[: 64 << 10])
    return paths[-1]


def empty(folder: Path) -> Path:
    """Return a new, empty image."""
    path = folder / "fresh.vmdk"
    path.unlink(missing_ok=True)
    create_image(path, 16 * GIB)
    return path


@contextmanager
def server(which: str, image: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """Serve the image and yield the URI and the pid of the server."""
    path = folder / "s"
    path.unlink(missing_ok=True)
    if which == "ours":
        words = [sys.executable, "-m", "qemu_vmdk_snap", "serve", "-k", str(path), str(image)]
    else:
        words = ["qemu-nbd", "-f", "vmdk", "-t", "-e", "16", "-k", str(path), str(image)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not path.exists():
            if process.poll() is not None:
                raise RuntimeError(f"{words[0]} ended with {process.returncode}")
            time.sleep(0.02)
        time.sleep(0.2)
        yield f"nbd+unix:///?socket={path}", process.pid
    finally:
        process.terminate()
        process.wait()
        (folder / "s.top").unlink(missing_ok=True)


def fio(uri: str, row: Row, seconds: float) -> tuple[float, int]:
    """Return the requests a second, and how many there were."""
    size = "16g" if row.fresh else "1g"
    words = ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--size={size}", *row.words, "--output-format=json"]
    words += ["--time_based", f"--runtime={seconds}", f"--numjobs={row.jobs}", "--group_reporting", "--randseed=7"]
    if row.fresh:
        words += ["--norandommap"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = job["read"] if job["read"]["total_ios"] else job["write"]
    return side["iops"], side["total_ios"]


def cpu_of(pid: int) -> float:
    """Return the microseconds of CPU that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * _TICK


if __name__ == "__main__":
    raise SystemExit(main())
