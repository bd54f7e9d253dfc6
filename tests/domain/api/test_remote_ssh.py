"""Commands for another host, by a real ssh and a private sshd: a live snapshot of a domain that only it can reach."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap.cli.main import main
from tests.domain.lab import Lab

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64", "ssh", "ssh-keygen", "sshd"),
    pytest.mark.timeout(120),
]

SSHD_CONFIG = """\
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
SetEnv "PATH={path}" "QEMU_VMDK_SNAP_STATE={state}"
"""

SSH_CONFIG = """\
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
StrictHostKeyChecking yes
IdentitiesOnly yes
IdentityAgent none
"""


class Host:
    """A host that is reached by ssh: this machine, with a key, a port and an environment of its own."""

    def __init__(self, folder: Path, path: str) -> None:
        folder.mkdir()
        self.folder, self.key = folder, folder / "key"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for key in (self.key, folder / "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shutil.copyfile(folder / "key.pub", folder / "authorized_keys")
        self.trust(folder / "host.pub")
        words = {"folder": folder, "port": self.port, "path": path, "state": os.environ["QEMU_VMDK_SNAP_STATE"]}
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
        try:
            deadline = time.monotonic() + 20
            while b"Server listening" not in (self.folder / "log").read_bytes():
                assert process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)
            yield self
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture
def host(daemon_lab: Lab, scratch: Path) -> Iterator[Host]:
    here = Path(sys.executable).parent
    with Host(scratch / "host", f"{here}:/usr/sbin:/usr/bin:/sbin:/bin").running() as host:
        yield host


def test_a_live_snapshot_and_back(host: Host, daemon_lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    domain = daemon_lab.define(daemon_lab.disk("a"))
    domain.create()
    name, uri = domain.name(), host.uri(daemon_lab)
    assert main(["snapshot", "create", "-c", uri, name, "s1", "--description", "it's far"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0] == "Domain snapshot s1 created"
    assert "the guest kept running: disk requests waited" in out[2]
    assert main(["snapshot", "list", "-c", uri, name, "--name"]) == 0
    assert capfd.readouterr().out.split() == ["s1"]
    assert domain.snapshotLookupByName("s1").getXMLDesc(0).count("it&apos;s far") == 1
    assert main(["snapshot", "revert", "-c", uri, name, "s1", "--output=json"]) == 0
    assert json.loads(capfd.readouterr().out)["state"] == "shutoff"
    assert not domain.isActive()
    # An error of the command there is its own line, and its own status.
    assert main(["snapshot", "delete", "-c", uri, name, "nothing"]) == 69
    assert capfd.readouterr().err == f"qemu-vmdk-snap: domain {name}: has no snapshot 'nothing'\n"


def test_what_is_not_installed_there_is_said(daemon_lab: Lab, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Host(scratch / "bare", "/usr/bin:/bin").running() as host:
        uri = host.uri(daemon_lab)
        assert main(["snapshot", "list", "-c", uri, "d1"]) == 70
    told = capfd.readouterr().err.splitlines()
    assert told[-1] == (
        f"qemu-vmdk-snap: {uri}: qemu-vmdk-snap is not installed there, or not in the PATH that ssh gives: "
        "install it on 127.0.0.1"
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("key", "Permission denied (publickey)"),
        ("host", "Host key verification failed"),
        ("port", "Connection refused"),
    ],
)
def test_who_cannot_log_in_is_told_by_ssh(
    host: Host, daemon_lab: Lab, wrong: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = host.uri(daemon_lab)
    if wrong == "key":
        (host.folder / "authorized_keys").write_text("")
    elif wrong == "host":
        host.trust(host.folder / "key.pub")
    else:
        uri = uri.replace(f":{host.port}/", ":1/")
    assert main(["snapshot", "list", "-c", uri, "d1"]) == 70
    told = capfd.readouterr().err
    assert says in told
    assert told.splitlines()[-1] == f"qemu-vmdk-snap: {uri}: ssh failed: see above"
