"""A host that is reached by a real ssh: a private sshd on this machine, with keys and an environment of its own."""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.domain.lab import Lab

SSHD_COMMON = """\
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
"""
"""What every sshd of the tests is told: it takes a key of root's, and nothing of this machine."""

SSHD_CONFIG = f"""\
{SSHD_COMMON}\
ListenAddress 127.0.0.1:{{port}}
HostKey {{folder}}/host
AuthorizedKeysFile {{folder}}/authorized_keys
SetEnv "PATH={{path}}" "QEMU_VMDK_SNAP_STATE={{state}}" "QEMU_VMDK_SNAP_HOOKS={{folder}}/hooks.d" \
"QEMU_VMDK_SNAP_HOOKS_DEADLINE=250"
"""

SSH_CONFIG = """\
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
StrictHostKeyChecking yes
IdentitiesOnly yes
IdentityAgent none
"""


def free_port() -> int:
    """Return a port that nobody listens on, and that the system gives to nobody who asks it for any."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10000, max(first, 20000))
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class Host:
    """A host that is reached by ssh: this machine, with a key, a port and an environment of its own."""

    def __init__(self, folder: Path, path: str, state: Path | None = None) -> None:
        folder.mkdir()
        self.pid = 0  # of the sshd that listens
        self.folder, self.key = folder, folder / "key"
        self.port = free_port()
        for key in (self.key, folder / "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shutil.copyfile(folder / "key.pub", folder / "authorized_keys")
        self.trust(folder / "host.pub")
        words = {
            "folder": folder,
            "port": self.port,
            "path": path,
            "state": state or os.environ["QEMU_VMDK_SNAP_STATE"],
        }
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(**words))
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        # The user's own configuration and known hosts stay out of it.
        self.ssh = folder / "ssh"
        self.ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        self.ssh.chmod(0o755)

    def trust(self, public: Path) -> None:
        """Let ssh expect this key of the host."""
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public.read_text()}")

    def uri(self, lab: Lab) -> str:
        """Return what reaches the daemon of the lab by way of this host."""
        user = pwd.getpwuid(os.geteuid()).pw_name
        path, _, query = lab.uri.removeprefix("qemu+unix://").partition("?")
        return f"qemu+ssh://{user}@127.0.0.1:{self.port}{path}?{query}&keyfile={self.key}&command={self.ssh}&no_tty=1"

    @contextlib.contextmanager
    def running(self) -> Iterator[Host]:
        """Run its sshd for the length of the block."""
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it locks up its unprivileged half
        with (self.folder / "log").open("wb") as log:
            words = [str(shutil.which("sshd")), "-D", "-e", "-f", str(self.folder / "sshd_config")]
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.pid = process.pid
        try:
            deadline = time.monotonic() + 100
            while b"Server listening" not in (self.folder / "log").read_bytes():
                assert process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)
            yield self
        finally:
            process.terminate()
            process.wait(60)
