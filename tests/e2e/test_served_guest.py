"""Does a guest run on when the server of its disk is killed and started again, and what does it find?"""

from __future__ import annotations

import threading
import time
import zlib
from pathlib import Path

import pytest

from qemu_vmdk_snap import check_image, create_image, open_chain
from qemu_vmdk_snap.harness import Machine, boot, pattern
from tests.support.qemu import qemu_img
from tests.support.served import Served, serving

MIB = 1 << 20
SIZE = 32 * MIB

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")


@pytest.fixture
def on_socket(scratch: Path) -> str:
    """Return what makes the machine's disk what is served on the socket, waited for when it is gone."""
    return f"file.driver=nbd,file.server.type=unix,file.server.path={scratch}/s,file.reconnect-delay=60"


def write(machine: Machine, seed: int) -> None:
    for piece in range(8):
        machine.probe.pattern(seed + piece, piece * 4 * MIB, MIB // 2)


def assert_reads(machine: Machine, seed: int) -> None:
    for piece in range(8):
        expected = zlib.crc32(pattern(seed + piece, piece * 4 * MIB, MIB // 2))
        assert machine.probe.crc(piece * 4 * MIB, MIB // 2) == expected, piece


def test_the_guest_runs_on_through_snapshots_and_the_death_of_its_server(scratch: Path, on_socket: str) -> None:
    create_image(scratch / "a.vmdk", SIZE)
    with (
        serving(scratch / "a.vmdk", scratch) as first,
        boot(scratch / "a.vmdk", image_format="raw", writable=True, drive=on_socket) as guest,
    ):
        write(guest, 100)
        first.control("snapshot", overlay=str(scratch / "b.vmdk"))
        writer = threading.Thread(target=write, args=(guest, 200))
        writer.start()
        written, deadline = first.control("statistics")["writes"], time.monotonic() + 60
        while first.control("statistics")["writes"] == written and writer.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        first.kill()
        second = Served(scratch / "a.vmdk", scratch / "s")
        try:
            writer.join()
            assert_reads(guest, 200)
            second.control("merge", delete=str(scratch / "a.vmdk"))
            write(guest, 300)
            assert_reads(guest, 300)
            while second.control("status")["merge"]["state"] == "running":
                time.sleep(0.02)
            assert second.control("status")["chain"] == [f"{scratch}/b.vmdk"]
            guest.power_off()
            second.stop()
        finally:
            if second.process.poll() is None:
                second.kill()
            second.close()
    with open_chain(scratch / "b.vmdk") as chain:
        for piece in range(8):
            assert chain.read_at(piece * 4 * MIB, MIB // 2) == pattern(300 + piece, piece * 4 * MIB, MIB // 2)
    assert not check_image(scratch / "b.vmdk").findings
    qemu_img("check", "-f", "vmdk", scratch / "b.vmdk")
