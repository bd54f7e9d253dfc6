"""`demo`: a guest proves a chain of snapshots, from an empty folder, in under a minute."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.units import format_size

if TYPE_CHECKING:
    from qemu_vmdk_snap.cli.demo.scenario import Demo


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo`."""
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in DIR, which must not exist, and keep it afterwards"
    )
    parser.add_argument(
        "--served", action="store_true", help="the second half: a served disk, and a snapshot with the guest's memory"
    )


def run(args: argparse.Namespace, ui: Ui) -> int:
    """Run it, show the table and the tree; exit status 1 on any difference."""
    from qemu_vmdk_snap.cli.demo.scenario import Demo
    from qemu_vmdk_snap.cli.demo.served import ServedDemo

    started = time.monotonic()
    # Not TMPDIR, which can be long: the domain's sockets must fit into 108 bytes.
    folder = args.keep or Path(tempfile.mkdtemp(prefix="vmdk-demo-", dir="/tmp"))
    if args.keep:
        folder = folder.absolute()
        folder.mkdir(parents=True)
    say = (lambda _: None) if ui.json_output else lambda line: ui.text(f"[{time.monotonic() - started:5.1f} s] {line}")
    demo = (ServedDemo if args.served else Demo)(folder, say)
    try:
        same = demo.run()
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    _show(demo, same, time.monotonic() - started, ui)
    if args.keep and not ui.json_output:
        ui.text(f"Kept: {folder}")
    return 0 if same else 1


def _show(demo: Demo, same: bool, seconds: float, ui: Ui) -> None:
    if ui.json_output:
        rows = [
            {**row._asdict(), "expected": f"{row.expected:08x}", "seen": f"{row.seen:08x}", "same": row.same}
            for row in demo.seen
        ]
        ui.json({"same": same, "seconds": seconds, "regions": rows, "snapshots": [s.name for s in demo.snapshots]})
        return
    ui.text()
    ui.text("What the guests saw (CRC-32 of each region), booted read-only on each point of the chain:")
    ui.text()
    names = [point.name for point in demo.points]
    seen = {(row.point, row.region): row for row in demo.seen}
    cells = []
    for region in demo.regions:
        row = [region.name, f"{region.offset / (1 << 20):g} MiB", format_size(len(region.content))]
        for name in names:
            one = seen[name, region.name]
            row.append(f"{one.seen:08x} ok" if one.same else f"{one.seen:08x} EXPECTED {one.expected:08x}")
        cells.append(row)
    ui.table(["region", "at", "length", *names], cells)
    ui.text()
    for line in _tree(demo):
        ui.text(line)
    wrong = [row for row in demo.seen if not row.same]
    ui.text()
    ui.text(
        f"{len(demo.seen)} reads by guests, {len(wrong)} differ, {seconds:.1f} s"
        + ("." if same else ": " + "; ".join(f"{row.point} {row.region}" for row in wrong))
    )


def _tree(demo: Demo) -> Iterator[str]:
    from qemu_vmdk_snap.domain.registry import tree_lines

    yield from tree_lines(demo.snapshots)
    frozen = {point.image.name: point.name for point in demo.points}
    yield "The chain, from the active overlay down:"
    for name, cid, parent_cid in demo.chain:
        parent = "no parent" if parent_cid == 0xFFFF_FFFF else f"parentCID {parent_cid:08x}"
        yield f"  {name:<18} CID {cid:08x}  {parent:<20} {frozen.get(name, '')}"
