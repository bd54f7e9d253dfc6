"""What the hook tells syslog: received from a /dev/log of the test's own, in a mount namespace."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.domain.hooks.test_hooks import START, Host

pytestmark = pytest.mark.needs("unshare")
LINE = re.compile(rb"<(\d+)>[A-Z][a-z]{2} [ 1-3]\d \d\d:\d\d:\d\d qemu-vmdk-snap\[(\d+)\]: (.*)", re.DOTALL)
ERROR, INFO = 27, 30  # facility daemon (3) * 8, and the severity


class Log:
    """A /dev that holds a socket named log; who is started by `inside` sees it as the real one."""

    def __init__(self, folder: Path) -> None:
        self.dev = folder / "dev"
        self.dev.mkdir()
        for name in ("null", "urandom"):
            (self.dev / name).touch()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.dev / "log"))
        self.socket.settimeout(60)

    def inside(self, host: Host, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the hook with this /dev."""
        mounts = [f"mount --bind /dev/{name} {self.dev}/{name}" for name in ("null", "urandom")]
        lines = "\n".join([*mounts, f"mount --rbind {self.dev} /dev", 'exec "$@"'])
        unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        return subprocess.run(
            [*unshare, "sh", "-ec", lines, "sh", host.script, *words],
            input=host.xml(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C"},
        )

    def heard(self) -> tuple[int, str]:
        """Return priority and text of the next datagram, which must be as syslog(3) writes them."""
        found = LINE.fullmatch(self.socket.recv(65536))
        assert found is not None
        return int(found[1]), found[3].decode()


@pytest.fixture
def log(scratch: Path) -> Iterator[Log]:
    log = Log(scratch)
    yield log
    log.socket.close()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_refused_start_is_an_error_of_one_line(host: Host, log: Log) -> None:
    host.policy('verify = "chain"')
    host.base.unlink()
    done = log.inside(host, "d1", *START)
    assert done.returncode == 1
    priority, text = log.heard()
    assert priority == ERROR
    assert "\n" not in text
    assert text.startswith("domain d1: ")
    assert "its parent 'a.vmdk' does not exist" in text
    assert done.stderr == f"qemu-vmdk-snap: {text}\n"


def test_a_clean_start_is_told_and_no_more(host: Host, log: Log) -> None:
    host.policy("revert-on-start = true")
    done = log.inside(host, "d1", *START)
    assert (done.returncode, done.stderr) == (0, "")
    assert log.heard() == (INFO, "domain d1: reverted vda for a clean start")
    assert log.inside(host, "other", *START).returncode == 0  # it has no policy: nobody hears of it
    log.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        log.socket.recv(1)


def test_a_stuck_log_holds_up_no_guest(host: Host, log: Log) -> None:
    """Nobody reads: the queue of the socket is full, where syslog(3) itself would wait for ever."""
    host.policy("revert-on-start = true")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as full:
        full.setblocking(False)
        full.connect(str(log.dev / "log"))
        with contextlib.suppress(BlockingIOError):
            while True:
                full.send(b"x")
    assert log.inside(host, "d1", *START).returncode == 0  # at its own deadline it would fail


def test_no_log_at_all(host: Host, log: Log) -> None:
    (log.dev / "log").unlink()
    host.policy("revert-on-start = true")
    assert log.inside(host, "d1", *START).returncode == 0
