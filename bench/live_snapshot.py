"""`python -m bench.live_snapshot`: what a guest feels of a live snapshot, beside libvirt's own of qcow2.

The same guest (the probe, which writes without a rest) on the same kind of disk: once on VMDK, snapshotted by this
package, once on qcow2, snapshotted by libvirt's own `snapshot-create-as --disk-only`. Taken alternately. What the guest
feels is the longest time between two answers to its writes, around the snapshot, less the usual one; the total is that
of the whole call. Both guests run under plain emulation in one in-process libvirt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.snapshot import create_snapshot
from tests.e2e.live_guest import Writer, boot_disk, domain_xml, start

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
        probes = [start(domain, folder / name) for domain, name in zip(domains, ("v.sock", "q.sock"), strict=True)]
        for number in range(rounds):
            for take, probe, kept in zip(takes, probes, samples, strict=True):
                kept.append(_sample(Writer(probe), take, number))
    finally:
        for domain in domains:
            _forget(domain)
    return samples[0], samples[1]


def _sample(writer: Writer, take: Callable[[int], object], number: int) -> Sample:
    with writer:
        writer.wait(3)
        began = time.monotonic()
        take(number)
        ended = time.monotonic()
        writer.wait(1)
    usual = statistics.median(gap for at, gap in writer.gaps if at < began)
    longest = max(gap for at, gap in writer.gaps if began <= at and at - gap <= ended)
    return max(0.0, longest - usual) * 1000, (ended - began) * 1000


def _forget(domain: libvirt.virDomain) -> None:
    import libvirt

    if domain.isActive():
        domain.destroy()
    domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)


if __name__ == "__main__":
    sys.exit(main())
