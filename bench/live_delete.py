"""`python -m bench.live_delete`: deleting a snapshot under a running guest, beside libvirt's block-commit of qcow2.

The same guest (the probe, which writes without a rest) on a chain of four links with the same data: once on VMDK, where
this package deletes the snapshot in the middle, once on qcow2, where libvirt commits the link above it into what it
froze (`virsh blockcommit --base --top`). Both disks lie on one file system; with `--xfs` on a fresh XFS with reflinks.
Every round has new chains and new guests, by turns; whichever guest is not measured stands still meanwhile. What the
guest feels is the longest time between two answers to its writes, less the usual one; the total is until the link is
out of the chain. After each round every byte that was stored is read from our chain.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.__main__ import reflink_folder
from bench.live_snapshot import Sample, _forget, _sample, _suspend_others, _writer
from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.delete.run import delete
from tests.e2e.live.live_guest import MIB, boot_disk, domain_xml

if TYPE_CHECKING:
    import libvirt

LINKS = 4


def main() -> int:
    """Measure, print the table, and return 0 when the guest waits no longer than with libvirt's own."""
    parser = argparse.ArgumentParser(prog="python -m bench.live_delete", description=__doc__)
    parser.add_argument("-n", "--rounds", type=int, default=5, help="deletes of each kind (5)")
    parser.add_argument("-m", "--mib", type=int, default=128, help="MiB of data in each of the four links (128)")
    parser.add_argument("--xfs", action="store_true", help="on a fresh XFS with reflinks, where one can be mounted")
    parser.add_argument("--json", type=Path, help="also keep every sample here")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="vmdk-", dir="/tmp") as scratch,
        reflink_folder(Path(scratch)) if args.xfs else contextlib.nullcontext(Path(scratch)) as folder,
    ):
        if folder is None:
            print("no file system with reflinks can be mounted here", file=sys.stderr)
            return 2
        ours, theirs = measure(Path(scratch), folder, args.rounds, args.mib)
    if args.json:
        args.json.write_text(json.dumps({"ours": ours, "libvirt-qcow2": theirs}, indent=1) + "\n")
    ratios = []
    print(f"{'median of ' + str(args.rounds):<24}{'ours, vmdk':>12}{'libvirt, qcow2':>16}{'ratio':>8}")
    for index, what in enumerate(("guest waited, ms", "whole call, ms")):
        mine, other = (statistics.median(sample[index] for sample in samples) for samples in (ours, theirs))
        ratios.append(mine / other if other else 0.0)
        print(f"{what:<24}{mine:>12.1f}{other:>16.1f}{ratios[-1]:>8.2f}")
    return 0 if ratios[0] <= 1.0 else 1


def measure(scratch: Path, folder: Path, rounds: int, mib: int) -> tuple[list[Sample], list[Sample]]:
    """Return the samples of ours and of libvirt's own."""
    conn = open_connection(f"qemu:///embed?root={scratch / 'e'}")
    samples: list[list[Sample]] = [[], []]
    for number in range(rounds):
        home = folder / str(number)
        home.mkdir()
        _round(conn, home, number, mib, samples)
        for path in home.iterdir():
            path.unlink()
    return samples[0], samples[1]


def _round(conn: libvirt.virConnect, home: Path, number: int, mib: int, samples: list[list[Sample]]) -> None:
    domains = [_vmdk(conn, home, number, mib), _qcow2(conn, home, number, mib)]
    takes: list[Callable[[int], object]] = [
        lambda _: delete(conn, domains[0].name(), "s2"),
        lambda _: _commit(domains[1], home / "q-2.qcow2", home / "q-1.qcow2"),
    ]
    try:
        with contextlib.ExitStack() as running:
            for domain in domains:
                domain.create()
            writers = [running.enter_context(_writer(home / f"{name}.sock")) for name in "vq"]
            for which in (0, 1) if number % 2 else (1, 0):
                _suspend_others(domains, which)
                samples[which].append(_sample(writers[which], takes[which], number))
                print(f"round {number}: {'ours' if not which else 'libvirt'}: {samples[which][-1]}", file=sys.stderr)
            for domain in domains:
                with contextlib.suppress(Exception):
                    domain.resume()
        for domain in domains:
            domain.destroy()
        _check(home, mib)
    finally:
        for domain in domains:
            _forget(domain)


def _data(link: int, mib: int) -> bytes:
    """Return the data of one link, the same in both formats; it lies partly over that of the link below."""
    return random.Random(link).randbytes(MIB) * mib


def _place(link: int, mib: int) -> int:
    return 32 * MIB + link * mib * MIB * 3 // 4


def _vmdk(conn: libvirt.virConnect, home: Path, number: int, mib: int) -> libvirt.virDomain:
    base = boot_disk(home / "v.vmdk", (64 + LINKS * mib) * MIB)
    domain = conn.defineXML(domain_xml(f"v{number}", [base], home / "v.sock"))
    for link in range(LINKS):
        with open_chain(_top(home, link), writable=True) as chain:
            chain.write_at(_place(link, mib), _data(link, mib))
        create_snapshot(conn, domain.name(), f"s{link + 1}")
    os.sync()
    return domain


def _qcow2(conn: libvirt.virConnect, home: Path, number: int, mib: int) -> libvirt.virDomain:
    base = home / "q-0.qcow2"
    subprocess.run(
        ["qemu-img", "convert", "-f", "vmdk", "-O", "qcow2", boot_disk(home / "boot", 16 * MIB), base], check=True
    )
    subprocess.run(["qemu-img", "resize", "-q", base, str((64 + LINKS * mib) * MIB)], check=True)
    top = base
    for link in range(LINKS):
        raw = home / "data"
        raw.write_bytes(_data(link, mib))
        words = ["qemu-io", "-f", "qcow2", "-c", f"write -q -s {raw} {_place(link, mib)} {mib * MIB}", top]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        raw.unlink()
        overlay = home / f"q-{link + 1}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", top, "-F", "qcow2", overlay], check=True)
        top = overlay
    os.sync()
    return conn.defineXML(domain_xml(f"q{number}", [top], home / "q.sock", image_format="qcow2"))


def _commit(domain: libvirt.virDomain, top: Path, base: Path) -> None:
    domain.blockCommit("sda", str(base), str(top), 0, 0)
    while domain.blockJobInfo("sda", 0):
        time.sleep(0.002)


def _top(home: Path, link: int) -> Path:
    return home / (f"v-{link:06}.vmdk" if link else "v.vmdk")


def _check(home: Path, mib: int) -> None:
    """See that both chains are shorter by a link, and that ours has every byte that was stored."""
    with open_chain(_top(home, LINKS)) as chain:
        assert chain.depth == LINKS, chain.depth
        for link in range(LINKS):
            length = (mib if link == LINKS - 1 else mib * 3 // 4) * MIB
            assert chain.read_at(_place(link, mib), length) == _data(link, mib)[:length], link
    words = ["qemu-img", "info", "--backing-chain", "--output=json", home / f"q-{LINKS}.qcow2"]
    told = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    assert len(told) == LINKS, len(told)


if __name__ == "__main__":
    sys.exit(main())
