"""Of two servers that begin to listen at one path at once, one does, and nobody takes its socket away."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest

from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.serve import sockets
from qemu_vmdk_snap.serve.sockets import listen


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_several_listens(scratch: Path, stale: bool) -> None:
    path = scratch / "s"
    for _ in range(20):
        path.unlink(missing_ok=True)
        if stale:
            listen(path, mode=0o600).close()
        start = threading.Barrier(4)
        found: list[socket.socket] = []

        def begin(start: threading.Barrier = start, found: list[socket.socket] = found) -> None:
            start.wait()
            with contextlib.suppress(InvalidRequest):
                found.append(listen(path, mode=0o600))

        threads = [threading.Thread(target=begin) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 1
        assert connects(path)
        assert [name.name for name in scratch.iterdir()] == ["s"]
        found[0].close()


def test_a_folder_that_somebody_locks_is_waited_for_and_no_longer(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_PATIENCE", 0.1)
    with sockets._alone_in(scratch), listen(scratch / "s", mode=0o600):
        assert connects(scratch / "s")
