"""Answers that are pages of a file: whole, and right whatever becomes of the file before the client takes them."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap import create_image, create_overlay, open_chain
from qemu_vmdk_snap.serve.nbd.pages import Pages
from tests.support.served import Served, io, serving

if TYPE_CHECKING:
    import nbd

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB
AT, LENGTH = 3 * MIB, 128 * KIB


@pytest.fixture
def pages() -> Iterator[Pages]:
    pages = Pages()
    yield pages
    pages.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(300 * KIB))
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def sent(pages: Pages) -> bytes:
    """Return what it sends to a socket that has room for it."""
    length = pages.filled
    one, two = socket.socketpair()
    with one, two:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
        pages.send(one.fileno())
        assert not pages.filled
        return two.recv(length, socket.MSG_WAITALL)


@pytest.mark.parametrize(("offset", "length"), [(0, 64 * KIB), (513, 65 * KIB), (4095, 128 * KIB), (7, 1)])
def test_head_and_data_are_sent(pages: Pages, file: int, offset: int, length: int) -> None:
    for head in (b"first", b"the second"):
        assert pages.put(head, file, offset, length)
        assert sent(pages) == head + os.pread(file, length, offset)


def test_what_cannot_be_sent_whole_is_not_taken(pages: Pages, file: int) -> None:
    assert not pages.put(b"head", file, 290 * KIB, 64 * KIB)  # the file ends before
    assert not pages.put(b"head", file, 400 * KIB, 64 * KIB)
    assert not pages.put(b"head", file, 0, 300 * KIB)  # more than the pipe has room for
    assert pages.put(b"head", file, 0, 64 * KIB)
    assert sent(pages) == b"head" + os.pread(file, 64 * KIB, 0)
    folder = os.open("/", os.O_RDONLY)
    try:
        assert not pages.put(b"head", folder, 0, 64 * KIB)
    finally:
        os.close(folder)
    assert not pages.filled
    assert not pages.put(b"head", file, 0, 64 * KIB)  # not tried again: a plain read is right everywhere


def test_without_a_descriptor_left_nothing_is_taken(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(flags: int) -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe2", refused)
    pages = Pages()
    assert not pages.put(b"head", file, 0, 64 * KIB)
    pages.close()


def asked(served: Served) -> tuple[nbd.NBD, nbd.Buffer, int]:
    """Return a client that has asked for the range, and does not take the answer, which is on its way."""
    import nbd

    client = nbd.NBD()
    client.connect_unix(str(served.path))
    before = served.control("statistics")["reads"]
    buffer = nbd.Buffer(LENGTH)
    cookie = client.aio_pread(buffer, AT)
    deadline = time.monotonic() + 60
    while served.control("statistics")["reads"] == before:
        assert time.monotonic() < deadline
    return client, buffer, cookie


def taken(client: nbd.NBD, buffer: nbd.Buffer, cookie: int) -> bytes:
    while not client.aio_command_completed(cookie):
        client.poll(-1)
    client.shutdown()
    return bytes(buffer.to_bytearray())


@pytest.mark.needs("libnbd", "qemu-io")
def test_an_answer_outlives_the_link_that_it_is_of(scratch: Path) -> None:
    base, top = scratch / "base.vmdk", scratch / "top.vmdk"
    data = random.Random(2).randbytes(LENGTH)
    create_image(base, SIZE)
    with open_chain(base, writable=True) as chain:
        chain.write_at(AT, data)
    create_overlay(top, base)
    with serving(top, scratch) as served:
        waiting = asked(served)
        served.control("merge", delete=str(base))
        deadline = time.monotonic() + 60
        while served.control("status")["merge"]["state"] == "running":
            assert time.monotonic() < deadline
        assert served.control("status")["merge"]["state"] == "done"
        assert not base.exists()
        io(served.uri, f"write -P 7 {AT} {LENGTH}", "write -P 8 5M 1M", "flush")
        assert taken(*waiting) == data
        io(served.uri, f"read -P 7 {AT} {LENGTH}")


@pytest.mark.needs("libnbd", "qemu-io")
def test_an_answer_has_what_its_own_place_holds(scratch: Path) -> None:
    """A client that has no answer yet may see a later write to that place, and never one to another."""
    create_image(scratch / "a.vmdk", SIZE)
    with serving(scratch / "a.vmdk", scratch) as served:
        io(served.uri, f"write -P 1 {AT} {LENGTH}", "flush")
        waiting = asked(served)
        io(served.uri, f"discard {AT} {LENGTH}", "write -P 2 0 2M", f"write -P 3 {AT} {LENGTH}", "write -P 4 5M 2M")
        data = taken(*waiting)
        assert len(data) == LENGTH
        assert set(data) <= {0, 1, 3}
        io(served.uri, f"read -P 3 {AT} {LENGTH}")
