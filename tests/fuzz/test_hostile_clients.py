from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, open_chain
from qemu_vmdk_snap.serve.nbd import wire
from tests.support.served import Served, io, serving

MIB = 1 << 20
CASES = int(os.environ.get("VMDK_FUZZ_CASES", "40"))
SEED = os.environ.get("VMDK_FUZZ_SEED", "clients")
BOUND = 256 * MIB
"""More than the server takes with all that these tests leave open, less than what one of them asks for."""

pytestmark = pytest.mark.needs("qemu-io")


@pytest.fixture
def served(scratch: Path) -> Iterator[Served]:
    create_image(scratch / "a.vmdk", 64 * MIB)
    with serving(scratch / "a.vmdk", scratch) as server:
        io(server.uri, "write -P 7 0 64M", "flush")
        yield server
        io(server.uri, "read -P 7 0 32M")  # the others are unharmed
        assert server.memory() < BOUND
        assert server.stop() == ""  # and no thread has died of something unforeseen
    with open_chain(scratch / "a.vmdk") as chain:
        assert chain.read_at(0, 32 * MIB) == b"\x07" * 32 * MIB


def connected(served: Served) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(str(served.path))
    except OSError:
        client.close()
        raise
    client.settimeout(60)
    return client


def option(number: int, data: bytes) -> bytes:
    return wire.OPTION.pack(wire.OPTION_MAGIC, number, len(data)) + data


def go(name: bytes = b"") -> bytes:
    return option(wire.OPT_GO, struct.pack(">I", len(name)) + name + b"\0\0")


def in_transmission(served: Served, *, structured: bool = True) -> socket.socket:
    client = connected(served)
    words = struct.pack(">I", 3) + (option(wire.OPT_STRUCTURED_REPLY, b"") if structured else b"") + go()
    client.sendall(words)
    wanted = wire.GREETING.size + (20 if structured else 0) + 20 + 12 + 20
    got = b""
    while len(got) < wanted:
        got += (more := client.recv(wanted - len(got)))
        if not more:
            client.close()
            raise ConnectionResetError
    return client


def request(command: int, offset: int, length: int, *, flags: int = 0, magic: int = wire.REQUEST_MAGIC) -> bytes:
    return wire.REQUEST.pack(magic, flags, command, 5, offset, length)


def ended(client: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        while client.recv(1 << 16):
            pass
    return True


def error_in(client: socket.socket) -> int:
    magic, error, cookie = wire.SIMPLE_REPLY.unpack(client.recv(16, socket.MSG_WAITALL))
    assert (magic, cookie) == (wire.SIMPLE_MAGIC, 5)
    return int(error)


def test_requests_that_cannot_be_are_refused_and_the_client_goes_on(served: Served) -> None:
    with in_transmission(served, structured=False) as client:
        for command, offset, length, expected in (
            (wire.READ, 64 * MIB, 1, wire.EINVAL),
            (wire.READ, (1 << 64) - 4096, 8192, wire.EINVAL),
            (wire.READ, 0, 33 * MIB, wire.EINVAL),
            (wire.READ, 0, 0, wire.EINVAL),
            (wire.TRIM, 63 * MIB, 2 * MIB, wire.EINVAL),
            (wire.WRITE_ZEROES, 1 << 63, 1, wire.ENOSPC),
            (wire.BLOCK_STATUS, 0, MIB, wire.EINVAL),
            (5, 0, 4096, wire.EINVAL),
            (99, 0, 0, wire.EINVAL),
        ):
            client.sendall(request(command, offset, length))
            assert error_in(client) == expected, (command, offset, length)
        client.sendall(request(wire.WRITE, 64 * MIB - 1, 4096) + bytes(4096))
        assert error_in(client) == wire.ENOSPC
        client.sendall(request(wire.WRITE, 63 * MIB, 3 * MIB) + bytes(3 * MIB))
        assert error_in(client) == wire.ENOSPC
        client.sendall(request(wire.WRITE, 0, 4096, flags=0x8000) + bytes(4096))
        assert error_in(client) == wire.EINVAL
        client.sendall(request(wire.FLUSH, 0, 0))
        assert error_in(client) == 0


def test_wrong_magic_and_huge_writes_end_the_connection(served: Served) -> None:
    for words in (request(wire.READ, 0, 512, magic=1), request(wire.WRITE, 0, 0xFFFFFFFF), os.urandom(4096)):
        with in_transmission(served) as client:
            client.sendall(words)
            assert ended(client)
    for words in (b"\xff" * 64, struct.pack(">I", 3) + option(99, b"")[:12] + struct.pack(">I", 1 << 31)):
        with connected(served) as client:
            client.sendall(words)
            assert ended(client)


def test_half_requests_and_silence_hold_up_nobody(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for words in (b"", request(wire.WRITE, 40 * MIB, MIB)[:20], request(wire.WRITE, 40 * MIB, MIB) + bytes(1000)):
            for _ in range(5):
                client = stack.enter_context(in_transmission(served))
                client.sendall(words)
        for _ in range(5):
            stack.enter_context(connected(served)).sendall(b"\0\0")
        io(served.uri, "read -P 7 0 32M")
        served.control("snapshot", overlay=str(served.path.with_name("b.vmdk")))


def test_clients_that_never_read_hold_up_nobody(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for structured in (True, False) * 4:
            client = stack.enter_context(in_transmission(served, structured=structured))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(2000):
                    client.send(request(wire.READ, 0, 32 * MIB) + request(wire.READ, 4096, 4096))
        io(served.uri, "read -P 7 0 32M")
        assert served.memory() < BOUND


def test_more_clients_than_there_are_places(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connected(served))
    deadline = time.monotonic() + 60
    while not takes_clients(served):  # until it has seen that those are gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    io(served.uri, "read -P 7 0 1M")


def takes_clients(served: Served) -> bool:
    with contextlib.ExitStack() as stack, contextlib.suppress(ConnectionError):
        for _ in range(8):
            stack.enter_context(in_transmission(served))
        return True
    return False


def test_mutated_sessions(served: Served) -> None:
    chance = random.Random(SEED)
    queries = struct.pack(">I", 0) + struct.pack(">I", 1) + struct.pack(">I", 15) + b"base:allocation"
    session = (
        struct.pack(">I", 3)
        + option(wire.OPT_STRUCTURED_REPLY, b"")
        + option(wire.OPT_LIST, b"")
        + option(wire.OPT_LIST_META_CONTEXT, queries)
        + option(wire.OPT_SET_META_CONTEXT, queries)
        + go()
        + request(wire.READ, 0, 4096)
        + request(wire.BLOCK_STATUS, 0, MIB)
        + request(wire.WRITE, 40 * MIB, 512)
        + bytes(512)
        + request(wire.WRITE_ZEROES, 50 * MIB, MIB)
        + request(wire.DISCONNECT, 0, 0)
    )
    writes_end = session.index(request(wire.WRITE, 40 * MIB, 512))
    for _ in range(CASES):
        mutant = bytearray(session)
        for _ in range(chance.choice([1, 1, 2, 5])):
            mutant[chance.randrange(4, writes_end)] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        with connected(served) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(mutant[: chance.choice([len(mutant), chance.randrange(len(mutant))])])
                client.shutdown(socket.SHUT_WR)
            assert ended(client)


def test_a_hostile_control_client_gets_errors(served: Served) -> None:
    control = served.connect_control()
    for line in (
        b"{}\n",
        b"[]\n",
        b"nonsense\n",
        b'{"execute": ["a"]}\n',
        b'{"execute": "snapshot"}\n',
        b"[" * 60000 + b"\n",
    ):
        answer = control.raw(line)
        assert answer["error"]["code"] == "invalid-request", line[:40]
    for arguments in ({"overlay": "relative"}, {"overlay": 5}, {"overlay": "/nowhere/x.vmdk"}, {"overlay": "/a\0b"}):
        with pytest.raises(Exception, match=r"(path|No such)"):
            control("snapshot", **arguments)
    assert control("status")["clean"]
    control.close()
    for line in (b"x" * 200_000, b'{"execute": "status"'):
        control = served.connect_control()
        with contextlib.suppress(ConnectionError):
            control.raw(line + b"\n") if line.startswith(b"x") else None
        control.close()
