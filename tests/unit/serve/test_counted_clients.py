"""Who has an export open is counted before he is told so: a change that asks "is anybody there?" sees him."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import create_image, create_overlay
from qemu_vmdk_snap.serve.disk.disk import Disk
from qemu_vmdk_snap.serve.nbd import wire
from qemu_vmdk_snap.serve.nbd.handshake import Agreed, Dropped, shake_hands
from qemu_vmdk_snap.serve.server import Server

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MIB = 1 << 20


class Watched(socket.socket):
    """A socket that notes how many clients the server counted each time it is about to answer."""

    server: Server
    counted: list[int]
    fails_at = -1

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        self.counted.append(self.server.connections)
        if len(self.counted) - 1 == self.fails_at:
            raise BrokenPipeError
        super().sendall(data, flags)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    create_image(tmp_path / "a.vmdk", MIB)
    create_overlay(tmp_path / "b.vmdk", tmp_path / "a.vmdk")
    server = Server(tmp_path / "b.vmdk")
    yield server
    server.close()


def option(number: int, data: bytes) -> bytes:
    return wire.OPTION.pack(wire.OPTION_MAGIC, number, len(data)) + data


def go(name: bytes = b"") -> bytes:
    return option(wire.OPT_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))


def shake(server: Server, *options: bytes, fails_at: int = -1) -> tuple[Agreed | None, list[int]]:
    ours, theirs = socket.socketpair()
    watched = Watched(fileno=ours.detach())
    watched.server, watched.counted, watched.fails_at = server, [], fails_at
    with watched, theirs:
        theirs.sendall(struct.pack(">I", wire.FIXED_NEWSTYLE) + b"".join(options))
        theirs.shutdown(socket.SHUT_WR)
        return shake_hands(watched, server), watched.counted


@pytest.mark.parametrize("choice", [go(), option(wire.OPT_EXPORT_NAME, b"")], ids=["go", "export name"])
def test_a_client_counts_before_it_has_its_answer(server: Server, choice: bytes) -> None:
    agreed, counted = shake(server, choice)
    assert agreed is not None
    assert counted[0] == 0  # the greeting
    assert set(counted[1:]) == {1}
    assert server.connections == 1
    agreed.disk.close()
    assert server.connections == 0


@pytest.mark.parametrize("choice", [go(), option(wire.OPT_EXPORT_NAME, b"")], ids=["go", "export name"])
def test_a_client_that_goes_during_its_answer_is_not_counted(server: Server, choice: bytes) -> None:
    with pytest.raises(BrokenPipeError):
        shake(server, choice, fails_at=1)
    assert server.connections == 0


def test_asking_is_not_choosing(server: Server) -> None:
    queries = struct.pack(">I", 0) + struct.pack(">I", 1) + struct.pack(">I", 15) + b"base:allocation"
    asked = [
        option(wire.OPT_STRUCTURED_REPLY, b""),
        option(wire.OPT_INFO, struct.pack(">IH", 0, 0)),
        option(wire.OPT_SET_META_CONTEXT, queries),
    ]
    with pytest.raises(Dropped):
        shake(server, *asked)
    assert server.connections == 0


def test_a_reader_of_a_frozen_link_counts_there_and_not_at_the_top(server: Server) -> None:
    agreed, _ = shake(server, go(b"a.vmdk"))
    assert agreed is not None
    assert server.connections == 0
    assert Disk.users(server.stack, server.stack.links[1]) == 1
    agreed.disk.close()
    assert Disk.users(server.stack, server.stack.links[1]) == 0
