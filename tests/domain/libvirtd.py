"""A real libvirtd with its virtlogd, private to the tests: sockets, configuration and state in a folder of its own.

As root it is a system daemon in a mount namespace, where the folder lies over libvirt's own ones; as anyone else it is
a session daemon, which finds its folders by XDG variables. The machine's own libvirt sees nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_BINDS = {"etc": "/etc/libvirt", "lib": "/var/lib/libvirt", "cache": "/var/cache/libvirt", "log": "/var/log/libvirt"}
_WAIT = 100.0

LIBVIRTD_CONF = """\
auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "2:file:{folder}/libvirtd.log"
"""

QEMU_CONF = """\
security_driver = "none"
user = "+{uid}"
group = "+{gid}"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
"""


class Daemon:
    """The private daemon. `folder` must be short: sockets lie in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = os.geteuid() == 0
        self._processes: list[subprocess.Popen[bytes]] = []
        for name in (*_BINDS, "run", "config/libvirt"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        conf = folder / "etc" if self.root else folder / "config" / "libvirt"
        (conf / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(folder=folder))
        (conf / "virtlogd.conf").write_text(f'log_outputs = "3:file:{folder}/virtlogd.log"\n')
        (conf / "qemu.conf").write_text(QEMU_CONF.format(uid=os.geteuid(), gid=os.getegid()))
        self.conf = conf

    @property
    def socket(self) -> Path:
        """Where the daemon listens."""
        return self.folder / "run" / ("libvirt-sock" if self.root else "libvirt/libvirt-sock")

    @property
    def uri(self) -> str:
        """What to connect to."""
        return f"qemu+unix:///{'system' if self.root else 'session'}?socket={self.socket}"

    def ensure(self) -> Daemon:
        """Start what is not running, so that a test which lost the daemon does not take the next one with it."""
        if any(process.poll() is not None for process in self._processes) or len(self._processes) < 2:
            self.stop()
            self.start()
        return self

    def start(self) -> None:
        """Start both daemons and wait until libvirtd, this one and no other, answers, and virtlogd listens."""
        if not self._processes:
            self._spawn("virtlogd")
        self._spawn("libvirtd")
        deadline = time.monotonic() + _WAIT
        while not (self._takes_logs() and self._answers()):
            if self._processes[-1].poll() is not None or time.monotonic() > deadline:
                told = self._evidence()
                self.stop()
                raise AssertionError(f"libvirtd does not answer at {self.socket}: {told}")
            time.sleep(0.1)

    def restart(self) -> None:
        """Kill libvirtd without a word, as a crash would, and start it again; guests and virtlogd go on."""
        libvirtd = self._processes.pop()
        libvirtd.kill()
        libvirtd.wait(_WAIT)
        self.socket.unlink(missing_ok=True)
        self.start()

    def stop(self) -> None:
        """End both daemons."""
        while self._processes:
            process = self._processes.pop()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def virsh(self, *words: str) -> str:
        """Return what virsh prints."""
        done = subprocess.run(
            ["virsh", "-c", self.uri, *words], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _evidence(self) -> str:
        """Return what the daemon said, and where its threads stand."""
        parts = [(self.folder / name).read_text()[-8000:] for name in ("libvirtd.err", "libvirtd.log")]
        process = self._processes[-1]
        parts.append(f"exit status {process.poll()}")
        for task in sorted(Path(f"/proc/{process.pid}/task").glob("*")):
            parts.append(" ".join((task / name).read_text().strip() for name in ("comm", "wchan", "syscall")))
        return "\n".join(parts)

    def _takes_logs(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket.with_name("virtlogd-sock"))) == 0

    def _answers(self) -> bool:
        with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
            if (self.folder / "libvirtd.pid").read_text().strip() != str(self._processes[-1].pid):
                return False  # another one's, or that of the one before
            words = ["virsh", "-c", self.uri, "uri"]
            return (
                self.socket.exists()
                and not subprocess.run(words, capture_output=True, timeout=30, check=False).returncode
            )
        return False

    def _spawn(self, program: str) -> None:
        words = [
            program,
            "--config",
            str(self.conf / f"{program}.conf"),
            "--pid-file",
            str(self.folder / f"{program}.pid"),
        ]
        env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        if self.root:
            mounts = [f"mkdir -p {there} && mount --bind {self.folder / here} {there}" for here, there in self._binds()]
            words = ["unshare", "--mount", "sh", "-ec", "\n".join([*mounts, 'exec "$@"']), "sh", *words]
        else:
            env |= {"XDG_RUNTIME_DIR": str(self.folder / "run"), "XDG_CONFIG_HOME": str(self.folder / "config")}
            env |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "XDG_DATA_HOME": str(self.folder / "lib")}
        with (self.folder / f"{program}.err").open("ab") as err:
            self._processes.append(subprocess.Popen(words, env=env, stdout=err, stderr=err, stdin=subprocess.DEVNULL))

    def _binds(self) -> list[tuple[str, str]]:
        return [*_BINDS.items(), ("run", "/run/libvirt")]


def obstacle() -> str | None:
    """Return why a private daemon cannot be had here, or None."""
    if os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        return "a system daemon of its own needs a mount namespace, which this root may not make"
    return None


@contextlib.contextmanager
def private_daemon(folder: Path) -> Iterator[Daemon]:
    """Have a daemon of our own in `folder` for the length of the block; `ensure` starts it."""
    if reason := obstacle():
        pytest.skip(reason)
    daemon = Daemon(folder)
    try:
        yield daemon
    finally:
        daemon.stop()
