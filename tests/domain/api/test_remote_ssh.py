"""Commands for another host, by a real ssh and a private sshd: a live snapshot of a domain that only it can reach."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap.cli.main import main
from tests.domain.lab import Lab
from tests.domain.sshd import Host

pytestmark = [
    pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64", "ssh", "ssh-keygen", "sshd"),
    pytest.mark.timeout(300),
]


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
