"""The rows of the table: what is run, by which target it is judged, and how the two results are compared."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import images
from bench.images import GIB, MIB
from bench.measure import OURS, Taken, repeated, timed
from qemu_vmdk_snap import create_image, create_overlay


@dataclass(frozen=True, slots=True)
class Place:
    """Where images may lie: a folder on ext4 (or what the disk has), one on XFS with reflinks or None; and a scale."""

    plain: Path
    reflink: Path | None
    scale: float
    """Sizes are multiplied by it; 1 is what the targets speak of."""

    def size(self, length: int) -> int:
        """Return `length` scaled, in whole MiB."""
        return max(16 * MIB, int(length * self.scale) // MIB * MIB)


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table."""

    name: str
    title: str
    target: float | None
    """Ours through theirs must not be above this."""
    peak_target: int | None
    ours: float
    theirs: float | None
    ours_peak: int
    theirs_peak: int | None
    agreed: str
    """How the results were compared."""

    @property
    def ratio(self) -> float | None:
        """Ours through theirs."""
        return None if self.theirs is None else self.ours / self.theirs


Row = Callable[[Place, Path], Result]
ROWS: Final[dict[str, tuple[Row, bool]]] = {}
"""Name -> the function, and whether it needs the file system with reflinks."""


def row(name: str, *, reflink: bool = False) -> Callable[[Row], Row]:
    """Enter a function into the table."""

    def enter(function: Row) -> Row:
        ROWS[name] = (function, reflink)
        return function

    return enter


def both(ours: Callable[[], Taken], theirs: Callable[[], Taken], *, times: int = 3) -> tuple[Taken, Taken]:
    """Run both, after one run of each that only warms the caches.

    Before each the disk is at rest: who waits for it must not wait for what another run has left to write.
    """
    ours()
    theirs()
    return repeated(ours, os.sync, times), repeated(theirs, os.sync, times)


def result(name: str, title: str, target: float, peak: int | None, taken: tuple[Taken, Taken], agreed: str) -> Result:
    """Return the row of two measurements."""
    ours, theirs = taken
    return Result(name, title, target, peak, ours.seconds, theirs.seconds, ours.peak_bytes, theirs.peak_bytes, agreed)


def fresh(path: Path) -> Path:
    """Return a path that names nothing."""
    path.unlink(missing_ok=True)
    return path


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need(condition: bool, what: str) -> None:
    """Refuse to report times of results that differ."""
    if not condition:
        raise RuntimeError(f"the results differ: {what}")


def canonical_map(path: Path) -> Iterator[tuple[Any, ...]]:
    """Yield the runs of a `map --output=json`, neighbours joined: qemu-img cuts them otherwise than we do."""
    last: list[Any] | None = None
    for entry in json.loads(path.read_text()):
        offset = entry.get("offset")
        kind = (entry["zero"], entry["data"], entry["depth"] if entry["data"] else 0)
        if last is not None and last[2] == kind and (offset is None or offset == last[3] + last[1]):
            last[1] += entry["length"]
            continue
        if last is not None:
            yield tuple(last)
        last = [entry["start"], entry["length"], kind, offset]
    if last is not None:
        yield tuple(last)


@row("map-256g")
def map_256g(place: Place, folder: Path) -> Result:
    """Map 256 GiB over 6 links, 1 % of the grains in each overlay."""
    size = place.size(256 * GIB)
    top = images.table_only_chain(folder, size, 6, 0.01, max(4, size // (64 * MIB)))
    mine, theirs = folder / "ours.json", folder / "theirs.json"
    taken = both(
        lambda: timed([OURS, "image", "map", "--output=json", top], output=mine),
        lambda: timed(["qemu-img", "map", "-f", "vmdk", "--output=json", top], output=theirs),
        times=2,
    )
    need(list(canonical_map(mine)) == list(canonical_map(theirs)), "map")
    return result("map-256g", "map --output=json, 256 GiB, 6 links", 0.10, 200 * MIB, taken, "run by run")


@row("map-16t")
def map_16t(place: Place, folder: Path) -> Result:
    """Map 16 TiB over 10 links."""
    size = place.size(16 << 40)
    top = images.table_only_chain(folder, size, 10, 0.001, 200)
    mine = folder / "ours.json"
    taken = repeated(lambda: timed([OURS, "image", "map", "--output=json", top], output=mine), None, 1)
    covered = sum(entry["length"] for entry in json.loads(mine.read_text()))
    need(covered == size, "the map does not cover the disk")
    title = "map --output=json, 16 TiB, 10 links"
    return Result("map-16t", title, None, 300 * MIB, taken.seconds, None, taken.peak_bytes, None, "covers the disk")


def _convert(
    name: str, title: str, target: float | None, place: Place, folder: Path, output: str, *tail: str
) -> Result:
    top = images.half_full_chain(folder, place.size(4 * GIB), 3)
    mine, theirs = folder / f"ours.{output}", folder / f"theirs.{output}"
    taken = both(
        lambda: timed([OURS, "image", "convert", "-f", "vmdk", "-O", output, *tail, top, fresh(mine)]),
        lambda: timed(["qemu-img", "convert", "-f", "vmdk", "-O", output, top, fresh(theirs)]),
    )
    if output == "raw":
        need(sha256(mine) == sha256(theirs), "sha256")
    else:
        subprocess.run(["qemu-img", "compare", "-q", "-f", output, "-F", output, mine, theirs], check=True)
    agreed = "sha256" if output == "raw" else "qemu-img compare"
    return result(name, title, target, 150 * MIB, taken, agreed)


@row("convert-raw")
def convert_raw(place: Place, folder: Path) -> Result:
    """Convert 4 GiB, half of it stored over 3 links, to raw."""
    return _convert("convert-raw", "convert to raw, 4 GiB half full, 3 links, ext4", 0.5, place, folder, "raw")


@row("convert-sparse")
def convert_sparse(place: Place, folder: Path) -> Result:
    """Convert the same to monolithicSparse."""
    title = "convert to monolithicSparse, 4 GiB half full, 3 links, ext4"
    return _convert("convert-sparse", title, 0.5, place, folder, "vmdk")


@row("convert-raw-xfs", reflink=True)
def convert_raw_xfs(place: Place, folder: Path) -> Result:
    """Convert to raw where the file system shares extents."""
    return _convert("convert-raw-xfs", "convert to raw, the same on XFS with reflinks", 0.05, place, folder, "raw")


@row("convert-sparse-xfs", reflink=True)
def convert_sparse_xfs(place: Place, folder: Path) -> Result:
    """Convert to monolithicSparse where the file system shares extents."""
    title = "convert to monolithicSparse, the same on XFS with reflinks"
    return _convert("convert-sparse-xfs", title, 0.05, place, folder, "vmdk")


@row("convert-raw-unsafe")
def convert_raw_unsafe(place: Place, folder: Path) -> Result:
    """Convert to raw as qemu-img does by default, not waiting for the disk."""
    title = "convert to raw, ext4, with qemu-img's default `-t unsafe`"
    return _convert("convert-raw-unsafe", title, None, place, folder, "raw", "-t", "unsafe")


@row("convert-raw-xfs-unsafe", reflink=True)
def convert_raw_xfs_unsafe(place: Place, folder: Path) -> Result:
    """Convert to raw where the file system shares extents, not waiting for the disk."""
    title = "convert to raw, XFS, with `-t unsafe`"
    return _convert("convert-raw-xfs-unsafe", title, None, place, folder, "raw", "-t", "unsafe")


@row("convert-sparse-xfs-unsafe", reflink=True)
def convert_sparse_xfs_unsafe(place: Place, folder: Path) -> Result:
    """Convert to monolithicSparse where the file system shares extents, not waiting for the disk."""
    title = "convert to monolithicSparse, XFS, with `-t unsafe`"
    return _convert("convert-sparse-xfs-unsafe", title, None, place, folder, "vmdk", "-t", "unsafe")


def _commit(name: str, title: str, target: float, place: Place, folder: Path) -> Result:
    origin = folder / "origin"
    origin.mkdir()
    images.overlay_with_data(origin, place.size(2 * GIB), place.size(GIB))

    def prepared(which: str) -> Callable[[], None]:
        def prepare() -> None:
            shutil.rmtree(folder / which, ignore_errors=True)
            (folder / which).mkdir()
            for image in origin.iterdir():
                subprocess.run(["cp", "--reflink=auto", image, folder / which], check=True)
            subprocess.run(["sync", "-f", folder], check=True)  # what the copy left to write is not the commit's

        return prepare

    mine = [OURS, "image", "commit", "-q", folder / "ours" / "top.vmdk"]
    theirs = ["qemu-img", "commit", "-q", "-f", "vmdk", folder / "theirs" / "top.vmdk"]
    taken = (
        repeated(lambda: timed(mine), prepared("ours"), 3),
        repeated(lambda: timed(theirs), prepared("theirs"), 3),
    )
    bases = [folder / "ours" / "base.vmdk", folder / "theirs" / "base.vmdk"]
    subprocess.run(["qemu-img", "compare", "-q", "-f", "vmdk", "-F", "vmdk", *bases], check=True)
    return result(name, title, target, 150 * MIB, taken, "qemu-img compare of the bases")


@row("commit")
def commit(place: Place, folder: Path) -> Result:
    """Commit 1 GiB."""
    return _commit("commit", "commit of 1 GiB, ext4", 0.5, place, folder)


@row("commit-xfs", reflink=True)
def commit_xfs(place: Place, folder: Path) -> Result:
    """Commit 1 GiB where the file system shares extents."""
    return _commit("commit-xfs", "commit of 1 GiB, XFS with reflinks", 0.05, place, folder)


@row("compare")
def compare(place: Place, folder: Path) -> Result:
    """Compare two equal chains."""
    top = images.half_full_chain(folder, place.size(4 * GIB), 3)
    other = folder / "other"
    other.mkdir()
    for image in folder.glob("link-*.vmdk"):
        shutil.copy(image, other)
    pair = [top, other / top.name]
    taken = both(
        lambda: timed([OURS, "image", "compare", "-q", *pair]),
        lambda: timed(["qemu-img", "compare", "-q", "-f", "vmdk", "-F", "vmdk", *pair]),
    )
    return result("compare", "compare of two equal 4 GiB chains", 0.7, None, taken, "both say identical")


def _ext4_of_usr(path: Path, size: int) -> None:
    """Make a raw image with an ext4 file system that holds as much of /usr as half of it takes."""
    tree, room = path.with_name("tree"), size // 2
    tree.mkdir()
    for source in sorted(Path("/usr").rglob("*")):
        if source.is_symlink() or not source.is_file():
            continue
        length = source.stat().st_size
        if length > room:
            continue
        room -= length
        target = tree / source.relative_to("/usr")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        if room < MIB:
            break
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, path], check=True)
    shutil.rmtree(tree)


@row("to-stream")
def to_stream(place: Place, folder: Path) -> Result:
    """Convert a file system to streamOptimized."""
    source = folder / "usr.raw"
    _ext4_of_usr(source, place.size(2 * GIB))
    mine, theirs = folder / "ours.vmdk", folder / "theirs.vmdk"
    tail = ["-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", source]
    taken = both(
        lambda: timed([OURS, "image", "convert", *tail, fresh(mine)]),
        lambda: timed(["qemu-img", "convert", *tail, fresh(theirs)]),
        times=1,
    )
    subprocess.run(["qemu-img", "compare", "-q", "-f", "vmdk", "-F", "vmdk", mine, theirs], check=True)
    title = "convert to streamOptimized, ext4 with part of /usr"
    return result("to-stream", title, 0.25, 300 * MIB, taken, "qemu-img compare")


@row("from-stream")
def from_stream(place: Place, folder: Path) -> Result:
    """Convert streamOptimized to raw."""
    source, stream = folder / "usr.raw", folder / "usr.vmdk"
    _ext4_of_usr(source, place.size(2 * GIB))
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", source, stream],
        check=True,
    )
    mine, theirs = folder / "ours.raw", folder / "theirs.raw"
    tail = ["-f", "vmdk", "-O", "raw", stream]
    taken = both(
        lambda: timed([OURS, "image", "convert", *tail, fresh(mine)]),
        lambda: timed(["qemu-img", "convert", *tail, fresh(theirs)]),
    )
    need(sha256(mine) == sha256(theirs) == sha256(source), "sha256")
    return result("from-stream", "convert from streamOptimized to raw", 0.5, None, taken, "sha256")


@row("check")
def check(place: Place, folder: Path) -> Result:
    """Check 256 GiB of tables."""
    size = place.size(256 * GIB)
    top = images.table_only_chain(folder, size, 1, 0.01, 1)
    taken = both(
        lambda: timed([OURS, "image", "check", "-q", top]),
        lambda: timed(["qemu-img", "check", "-q", "-f", "vmdk", top]),
    )
    return result("check", "check, 256 GiB, every grain stored", 1.0, None, taken, "both find no error")


@row("check-small")
def check_small(place: Place, folder: Path) -> Result:
    """Check a small image: what it takes to start."""
    top = images.half_full_chain(folder, place.size(GIB), 1)
    taken = both(
        lambda: timed([OURS, "image", "check", "-q", top]),
        lambda: timed(["qemu-img", "check", "-q", "-f", "vmdk", top]),
        times=9,
    )
    ours, theirs = taken
    title = "check, 1 GiB half full: what it takes to start"
    peaks = ours.peak_bytes, theirs.peak_bytes
    return Result("check-small", title, None, None, ours.seconds, theirs.seconds, *peaks, "both find no error")


def start(name: str, title: str, place: Place, folder: Path, ours: list[object], theirs: list[object]) -> Result:
    """Run a short command on a small chain of two images, as a process: `TOP` stands for the overlay."""
    top = images.half_full_chain(folder, place.size(64 * MIB), 2)
    named = [[top if word == "TOP" else word for word in words] for words in (ours, theirs)]
    taken = both(lambda: timed([OURS, *named[0]]), lambda: timed(["qemu-img", *named[1]]), times=15)
    return result(name, f"{title} of a small chain, as a process", 5.0, None, taken, "both succeed")


@row("start-info")
def start_info(place: Place, folder: Path) -> Result:
    """Show what a small image is."""
    return start("start-info", "info", place, folder, ["image", "info", "TOP"], ["info", "-f", "vmdk", "TOP"])


@row("start-map")
def start_map(place: Place, folder: Path) -> Result:
    """Map a small chain."""
    return start("start-map", "map", place, folder, ["image", "map", "TOP"], ["map", "-f", "vmdk", "TOP"])


@row("start-check")
def start_check(place: Place, folder: Path) -> Result:
    """Check a small image."""
    return start("start-check", "check", place, folder, ["image", "check", "TOP"], ["check", "-f", "vmdk", "TOP"])


@row("start-measure")
def start_measure(place: Place, folder: Path) -> Result:
    """Measure a small chain as a raw image."""
    tail: list[object] = ["-O", "raw", "-f", "vmdk", "TOP"]
    return start("start-measure", "measure -O raw", place, folder, ["image", "measure", *tail], ["measure", *tail])


@row("create")
def create(place: Place, folder: Path) -> Result:
    """Make an overlay, as a process."""
    base = folder / "base.vmdk"
    create_image(base, place.size(64 * GIB), durable=False)
    mine, theirs = folder / "ours.vmdk", folder / "theirs.vmdk"
    taken = both(
        lambda: timed([OURS, "image", "create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", fresh(mine)]),
        lambda: timed(["qemu-img", "create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", fresh(theirs)]),
        times=9,
    )
    subprocess.run(["qemu-img", "compare", "-q", "-f", "vmdk", "-F", "vmdk", mine, theirs], check=True)
    return result("create", "create -b, as a process", 4.0, None, taken, "qemu-img compare")


@row("create-call")
def create_call(place: Place, folder: Path) -> Result:
    """Make an overlay by a library call, without waiting for the disk."""
    base = folder / "base.vmdk"
    create_image(base, place.size(64 * GIB), durable=False)
    seconds = []
    for number in range(200):
        started = time.perf_counter()
        create_overlay(folder / f"overlay-{number}.vmdk", base, durable=False)
        seconds.append(time.perf_counter() - started)
    subprocess.run(["qemu-img", "check", "-q", folder / "overlay-199.vmdk"], check=True)
    title = "create_overlay(durable=False), one call (target 2 ms)"
    return Result("create-call", title, None, None, statistics.median(seconds), None, 0, None, "qemu-img check")
