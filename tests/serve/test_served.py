from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vmdk_snap import check_image, create_image, create_overlay, open_chain
from tests.support.served import ControlError, io, refusal, serving

MIB = 1 << 20

pytestmark = pytest.mark.needs("nbdinfo", "nbdcopy", "qemu-img", "qemu-io")


AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="nbd")
os.execv(sys.executable, [sys.executable, "-m", "qemu_vmdk_snap", "serve", sys.argv[2]])
"""


def tool(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


def chain_of(folder: Path, depth: int, size: int = 64 * MIB) -> Path:
    top = folder / "d0.vmdk"
    create_image(top, size)
    for number in range(depth):
        with open_chain(top, writable=True) as chain:
            chain.write_at(number * 3 * MIB + 512, bytes([number + 1]) * MIB)
            chain.write_at(40 * MIB, bytes([number + 1]) * 70000)
        if number < depth - 1:
            below, top = top, folder / f"d{number + 1}.vmdk"
            create_overlay(top, below)
    return top


def assert_clean(path: Path) -> None:
    report = check_image(path)
    assert not report.findings, [str(finding) for finding in report.findings]


def test_it_says_one_line_when_it_is_ready_and_leaves_nothing_behind(scratch: Path) -> None:
    create_image(scratch / "a.vmdk", MIB)
    with serving(scratch / "a.vmdk", scratch) as served:
        assert served.ready == f"serving {scratch}/a.vmdk on {scratch}/s (control {scratch}/s.control)\n"
        assert (scratch / "s.control").stat().st_mode & 0o777 == 0o600
        status = served.control("status")
        assert (status["top"], status["size"], status["clean"]) == (f"{scratch}/a.vmdk", MIB, True)
    assert served.stop() == ""
    assert sorted(path.name for path in scratch.iterdir()) == ["a.vmdk"]


def test_nbdinfo_lists_the_top_and_each_link_below_it(scratch: Path) -> None:
    top = chain_of(scratch, 3)
    with serving(top, scratch) as served:
        told = json.loads(tool("nbdinfo", "--json", "--list", served.uri))
    assert [one["export-name"] for one in told["exports"]] == ["", "d1.vmdk", "d0.vmdk"]
    assert [one["is_read_only"] for one in told["exports"]] == [False, True, True]
    first = told["exports"][0]
    assert first["can_multi_conn"]
    assert first["can_fast_zero"]
    assert first["can_fua"]
    assert first["block_size_preferred"] == 65536
    assert first["contexts"] == [
        "base:allocation",
        "qemu-vmdk-snap:since:d1.vmdk",
        "qemu-vmdk-snap:since:d0.vmdk",
    ]


def test_every_link_reads_what_its_chain_reads(scratch: Path) -> None:
    top = chain_of(scratch, 3)
    with serving(top, scratch) as served:
        for name, path in (("", top), ("d1.vmdk", scratch / "d1.vmdk"), ("d0.vmdk", scratch / "d0.vmdk")):
            tool("nbdcopy", served.export(name), scratch / "copy.raw")
            with open_chain(path, lock=False) as chain:
                assert (scratch / "copy.raw").read_bytes() == chain.read_at(0, chain.capacity), name


def test_what_is_copied_in_compares_equal_and_is_a_clean_image(scratch: Path) -> None:
    raw = scratch / "in.raw"
    raw.write_bytes(os.urandom(5 * MIB) + bytes(3 * MIB) + os.urandom(MIB + 512))
    create_image(scratch / "a.vmdk", raw.stat().st_size)
    with serving(scratch / "a.vmdk", scratch) as served:
        tool("nbdcopy", raw, served.uri)
        assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, served.uri)
    assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "vmdk", raw, scratch / "a.vmdk")
    assert_clean(scratch / "a.vmdk")


def test_zeros_over_nothing_allocate_nothing(scratch: Path) -> None:
    create_image(scratch / "a.vmdk", 1 << 30)
    size = (scratch / "a.vmdk").stat().st_size
    with serving(scratch / "a.vmdk", scratch) as served:
        io(served.uri, "write -z 0 512M", "write -z -u 3k 700M", "discard 0 1G", "flush")
        served.until_left()
    assert (scratch / "a.vmdk").stat().st_size == size


def test_zeros_and_discards_over_data_of_every_link(scratch: Path) -> None:
    top = chain_of(scratch, 2)
    with open_chain(top) as chain:
        model = bytearray(chain.read_at(0, chain.capacity))
    with serving(top, scratch) as served:
        for offset, length in ((0, 2 * MIB), (3 * MIB + 100, 70000), (40 * MIB + 65536, 512)):
            io(served.uri, f"write -z {offset} {length}")
            model[offset : offset + length] = bytes(length)
        io(served.uri, f"write -z -u {3 * MIB} {MIB}", "write -P 9 0 4k", "write -z -u 64M 0")
        model[3 * MIB : 4 * MIB] = bytes(MIB)
        model[:4096] = b"\x09" * 4096
    with open_chain(top) as chain:
        assert chain.read_at(0, chain.capacity) == model
    assert_clean(top)


def test_the_map_of_a_served_disk_is_that_of_its_chain(scratch: Path) -> None:
    top = chain_of(scratch, 2)
    with serving(top, scratch) as served:
        extents = json.loads(tool("nbdinfo", "--json", "--map", served.uri))
    with open_chain(top) as chain:
        stored = [(run.offset, run.length) for run in chain.map() if run.kind.name == "DATA"]
    told = [(one["offset"], one["length"]) for one in extents if one["type"] == 0]
    assert _covered(told) == _covered(stored)


def _covered(runs: list[tuple[int, int]]) -> set[int]:
    return {at for offset, length in runs for at in range(offset >> 16, offset + length + 65535 >> 16)}


def test_a_snapshot_freezes_the_top_under_its_clients(scratch: Path) -> None:
    import nbd

    create_image(scratch / "a.vmdk", 16 * MIB)
    with serving(scratch / "a.vmdk", scratch) as served:
        client = nbd.NBD()
        client.connect_unix(str(scratch / "s"))
        client.pwrite(b"A" * 8192, 0)
        done = served.control("snapshot", overlay=str(scratch / "b.vmdk"))
        assert (done["frozen"], done["top"]) == (f"{scratch}/a.vmdk", f"{scratch}/b.vmdk")
        assert done["pause_seconds"] > 0
        client.pwrite(b"B" * 4096, 4096)
        assert client.pread(8192, 0) == b"A" * 4096 + b"B" * 4096
        assert served.control("status")["chain"] == [f"{scratch}/b.vmdk", f"{scratch}/a.vmdk"]
        old = nbd.NBD()
        old.set_export_name("a.vmdk")
        old.connect_unix(str(scratch / "s"))
        assert old.pread(8192, 0) == b"A" * 8192
        with pytest.raises(ControlError, match="exists"):
            served.control("snapshot", overlay=str(scratch / "b.vmdk"))
        client.shutdown()
        old.shutdown()
    for name, expected in (("a", b"A" * 8192), ("b", b"A" * 4096 + b"B" * 4096)):
        with open_chain(scratch / f"{name}.vmdk") as chain:
            assert chain.read_at(0, 8192) == expected
        assert_clean(scratch / f"{name}.vmdk")
    status, line = refusal(scratch / "a.vmdk", scratch / "t")
    assert status == 68
    assert line.startswith(f"qemu-vmdk-snap: {scratch}/a.vmdk: is still needed: {scratch}/b.vmdk")


def test_a_held_snapshot_is_taken_back_when_its_connection_ends(scratch: Path) -> None:
    create_image(scratch / "a.vmdk", MIB)
    with serving(scratch / "a.vmdk", scratch) as served:
        io(served.uri, "write -P 1 0 64k")
        control = served.connect_control()
        token = control("snapshot-prepare", overlay=str(scratch / "b.vmdk"))["token"]
        assert control("snapshot-switch", token=token, hold=True)["top"] == f"{scratch}/b.vmdk"
        assert served.control("status")["held"] is True
        with pytest.raises(ControlError, match="held"):
            served.control("flush")
        control.close()
        io(served.uri, "write -P 2 0 4k", "read -P 1 4k 60k")
        assert served.control("status")["chain"] == [f"{scratch}/a.vmdk"]
        control = served.connect_control()
        token = control("snapshot-prepare", overlay=str(scratch / "b.vmdk"))["token"]
        control("snapshot-switch", token=token, hold=True)
        control("release")
        control.close()
        io(served.uri, "write -P 3 0 4k", "read -P 1 4k 60k")
        assert served.control("status")["chain"] == [f"{scratch}/b.vmdk", f"{scratch}/a.vmdk"]
    with open_chain(scratch / "a.vmdk") as chain:
        assert chain.read_at(0, 4096) == b"\x02" * 4096


def test_a_switch_serves_another_chain_and_refuses_under_clients(scratch: Path) -> None:
    import nbd

    create_image(scratch / "a.vmdk", MIB)
    with serving(scratch / "a.vmdk", scratch) as served:
        io(served.uri, "write -P 1 0 64k")
        served.control("snapshot", overlay=str(scratch / "b.vmdk"))
        io(served.uri, "write -P 2 0 64k")
        create_overlay(scratch / "c.vmdk", scratch / "a.vmdk")
        served.until_left()
        client = nbd.NBD()
        client.connect_unix(str(scratch / "s"))
        with pytest.raises(ControlError, match="1 clients are connected"):
            served.control("switch", top=str(scratch / "c.vmdk"))
        served.control("switch", top=str(scratch / "c.vmdk"), force=True)
        assert client.pread(4, 0) == b"\x01" * 4
        with pytest.raises(ControlError, match="still needed"):
            served.control("switch", top=str(scratch / "a.vmdk"), force=True)
        client.pwrite(b"\x05" * 4, 0)
        client.shutdown()
        served.control("switch", top=str(scratch / "b.vmdk"))
        io(served.uri, "read -P 2 0 64k")
        served.control("stop")
        served.process.wait(60)
    with open_chain(scratch / "c.vmdk") as chain:
        assert chain.read_at(0, 4) == b"\x05" * 4


def test_what_was_acknowledged_is_there_after_a_kill(scratch: Path) -> None:
    import nbd

    create_image(scratch / "a.vmdk", 64 * MIB)
    with serving(scratch / "a.vmdk", scratch) as served:
        client = nbd.NBD()
        client.connect_unix(str(scratch / "s"))
        for number in range(200):
            client.pwrite(bytes([number]) * 4096, number * 200_000)
        served.kill()
    with serving(scratch / "a.vmdk", scratch) as served:
        client = nbd.NBD()
        client.connect_unix(str(scratch / "s"))
        for number in range(200):
            assert client.pread(4096, number * 200_000) == bytes([number]) * 4096
        client.shutdown()
    assert_clean(scratch / "a.vmdk")


def test_a_killed_server_is_followed_on_the_top_that_it_had(scratch: Path) -> None:
    create_image(scratch / "a.vmdk", MIB)
    with serving(scratch / "a.vmdk", scratch) as served:
        served.control("snapshot", overlay=str(scratch / "b.vmdk"))
        io(served.uri, "write -P 2 0 64k")
        served.kill()
    with serving(scratch / "a.vmdk", scratch) as served:
        assert served.control("status")["top"] == f"{scratch}/b.vmdk"
        io(served.uri, "read -P 2 0 64k")
        control = served.connect_control()  # whose end would take the overlay back
        control("snapshot-prepare", overlay=str(scratch / "c.vmdk"))
        io(served.uri, "write -P 3 0 4k")
        served.kill()
        control.close()
    with serving(scratch / "a.vmdk", scratch) as served:  # the overlay is there, and reads what its base reads
        assert served.control("status")["top"] == f"{scratch}/c.vmdk"
        io(served.uri, "read -P 3 0 4k", "read -P 2 4k 60k")


def test_what_changed_since_a_link_was_frozen(scratch: Path) -> None:
    create_image(scratch / "a.vmdk", 8 * MIB)
    with serving(scratch / "a.vmdk", scratch) as served:
        io(served.uri, "write -P 1 0 8M")
        served.control("snapshot", overlay=str(scratch / "b.vmdk"))
        io(served.uri, "write -P 2 1M 64k")
        served.control("snapshot", overlay=str(scratch / "c.vmdk"))
        io(served.uri, "write -P 3 3M 70k", "write -z 5M 64k")
        since = {
            name: [
                (one["offset"], one["length"])
                for one in json.loads(tool("nbdinfo", "--json", f"--map=qemu-vmdk-snap:since:{name}", served.uri))
                if one["type"] == 1
            ]
            for name in ("a.vmdk", "b.vmdk")
        }
    assert since["b.vmdk"] == [(3 * MIB, 2 << 16), (5 * MIB, 1 << 16)]
    assert since["a.vmdk"] == [(MIB, 1 << 16), *since["b.vmdk"]]


def test_sockets_that_systemd_passes(scratch: Path) -> None:
    create_image(scratch / "a.vmdk", MIB)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(scratch / "n.sock"))
        listener.listen()
        words = [sys.executable, "-c", AS_SYSTEMD, str(listener.fileno()), str(scratch / "a.vmdk")]
        with subprocess.Popen(words, pass_fds=[listener.fileno()], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == (
                f"serving {scratch}/a.vmdk on {scratch}/n.sock (control {scratch}/n.sock.control)\n"
            )
            io(f"nbd+unix:///?socket={scratch}/n.sock", "write -P 1 0 64k", "read -P 1 0 64k")
            process.terminate()
        assert process.returncode == 0
    assert (scratch / "n.sock").exists()
    assert not (scratch / "n.sock.control").exists()


def test_others_are_kept_from_a_served_image(scratch: Path) -> None:
    create_image(scratch / "a.vmdk", MIB)
    with serving(scratch / "a.vmdk", scratch) as served:
        status, line = refusal(scratch / "a.vmdk", scratch / "other")
        assert "lock" in line
        assert status == 75
        assert "another server listens there" in refusal(scratch / "a.vmdk", scratch / "s")[1]
        done = subprocess.run(["qemu-img", "info", scratch / "a.vmdk"], capture_output=True, text=True, check=False)
        assert "lock" in done.stderr
        assert served.control("status")["pid"] == served.process.pid
