"""`python -m bench.live_snapshot`: what a guest feels of a live snapshot, beside libvirt's own of qcow2.

The same guest (the probe, which writes without a rest) on the same kind of disk: once on VMDK, snapshotted by this
package, once on qcow2, snapshotted by libvirt's own `snapshot-create-as --disk-only`. Taken in pairs, the first of a
pair by turns, so that what else the machine does falls on both; whichever guest is not measured stands still meanwhile.
What the guest feels is the longest time between two answers to its writes, around the snapshot, less the usual one; the
total is that of the whole call. Both guests run under plain emulation in one in-process libvirt; their writers are
processes of their own, as a thread would wait for this one's interpreter and take that for the guest's wait.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.harness import attach
from tests.e2e.live.live_guest import Writer, boot_disk, domain_xml

if TYPE_CHECKING:
    import libvirt

Sample = tuple[float, float]
"""(milliseconds that the guest waited, milliseconds that the call took)."""


def main() -> int:
    """Measure, print the table, and return 0 when the guest waits no longer than with libvirt's own."""
    parser = argparse.ArgumentParser(prog="python -m bench.live_snapshot", description=__doc__)
    parser.add_argument("-n", "--rounds", type=int, default=20, help="snapshots of each kind (20)")
    parser.add_argument("--json", type=Path, help="also keep every sample here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vmdk-", dir="/tmp") as folder:
        ours, theirs = measure(Path(folder), args.rounds)
    if args.json:
        args.json.write_text(json.dumps({"ours": ours, "libvirt-qcow2": theirs}, indent=1) + "\n")
    ratios = []
    print(f"{'median of ' + str(args.rounds):<24}{'ours, vmdk':>12}{'libvirt, qcow2':>16}{'ratio':>8}")
    for index, what in enumerate(("guest waited, ms", "whole call, ms")):
        mine, other = (statistics.median(sample[index] for sample in samples) for samples in (ours, theirs))
        ratios.append(mine / other)
        print(f"{what:<24}{mine:>12.1f}{other:>16.1f}{ratios[-1]:>8.2f}")
    return 0 if ratios[0] <= 1.0 else 1


def measure(folder: Path, rounds: int) -> tuple[list[Sample], list[Sample]]:
    """Return the samples of ours and of libvirt's own."""
    import libvirt

    conn = open_connection(f"qemu:///embed?root={folder / 'e'}")
    vmdk = boot_disk(folder / "v.vmdk")
    qcow2 = folder / "q.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "qcow2", vmdk, qcow2], check=True)
    domains = [
        conn.defineXML(domain_xml("v", [vmdk], folder / "v.sock")),
        conn.defineXML(domain_xml("q", [qcow2], folder / "q.sock", image_format="qcow2")),
    ]
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    takes: list[Callable[[int], object]] = [
        lambda number: create_snapshot(conn, "v", f"s{number}"),
        lambda number: domains[1].snapshotCreateXML(
            f"<domainsnapshot><name>s{number}</name><disks><disk name='sda' snapshot='external'>"
            f"<source file='{folder}/q-{number}.qcow2'/></disk></disks></domainsnapshot>",
            flags,
        ),
    ]
    samples: list[list[Sample]] = [[], []]
    try:
        with contextlib.ExitStack() as running:
            for domain in domains:
                domain.create()
            writers = [running.enter_context(_writer(folder / f"{name}.sock")) for name in "vq"]
            for number in range(rounds):
                for which in (0, 1) if number % 2 else (1, 0):
                    _suspend_others(domains, which)
                    samples[which].append(_sample(writers[which], takes[which], number))
            for domain in domains:
                _run(domain)  # its writer hangs up only once it answers
    finally:
        for domain in domains:
            _forget(domain)
    return samples[0], samples[1]


@contextlib.contextmanager
def _writer(serial: Path) -> Iterator[Connection]:
    """Have a process that lets the probe write on request, and tells how long each answer took."""
    spawn = multiprocessing.get_context("spawn")
    mine, its = spawn.Pipe()
    process = spawn.Process(target=_write, args=(serial, its))
    process.start()
    its.close()
    try:
        _expect(mine, "attached")
        yield mine
    finally:
        mine.close()
        process.join(30)
        process.kill()


def _write(serial: Path, pipe: Connection) -> None:
    """Be that process: `begin` is answered once the guest writes, `end` with (when, how long) of each answer."""
    with contextlib.closing(attach(serial, seconds=40)) as probe:
        pipe.send("attached")
        with contextlib.suppress(EOFError):
            while pipe.recv() == "begin":
                with Writer(probe) as writer:
                    writer.wait(3)
                    pipe.send("writing")
                    pipe.recv()
                    writer.wait(1)
                pipe.send(writer.gaps)


def _expect(pipe: Connection, word: str) -> None:
    if not pipe.poll(60) or pipe.recv() != word:
        raise RuntimeError(f"the writer is not {word} after a minute")


def _suspend_others(domains: list[libvirt.virDomain], which: int) -> None:
    for index, domain in enumerate(domains):
        if index == which:
            _run(domain)
        elif not _stands(domain):
            domain.suspend()


def _run(domain: libvirt.virDomain) -> None:
    if _stands(domain):
        domain.resume()


def _stands(domain: libvirt.virDomain) -> bool:
    import libvirt

    return bool(domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED)


def _sample(writer: Connection, take: Callable[[int], object], number: int) -> Sample:
    writer.send("begin")
    _expect(writer, "writing")
    began = time.monotonic()
    take(number)
    ended = time.monotonic()
    writer.send("end")
    gaps: list[tuple[float, float]] = writer.recv()
    usual = statistics.median(gap for at, gap in gaps if at < began)
    longest = max(gap for at, gap in gaps if began <= at and at - gap <= ended)
    return max(0.0, longest - usual) * 1000, (ended - began) * 1000


def _forget(domain: libvirt.virDomain) -> None:
    import libvirt

    if domain.isActive():
        domain.destroy()
    domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)


if __name__ == "__main__":
    sys.exit(main())
