"""Commands for another host: what ssh is told to run there, and what its answers mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.cli.remote import local_uri


@pytest.fixture
def ssh(tmp_path: Path) -> Path:
    """Return an ssh that writes its arguments down, then runs the last one here; `status` ends it at once."""
    path = tmp_path / "ssh"
    path.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/words\n"
        f"[ -e {tmp_path}/status ] && exit $(cat {tmp_path}/status)\n"
        'for last; do :; done\nPATH=/usr/bin:/bin exec sh -c "$last"\n'
    )
    path.chmod(0o755)
    return path


def words(ssh: Path) -> list[str]:
    return ssh.with_name("words").read_text().splitlines()


@pytest.mark.parametrize(
    "option", [["-c", "{uri}"], ["-c{uri}"], ["--connect", "{uri}"], ["--connect={uri}"]], ids=" ".join
)
def test_the_same_command_runs_there_on_its_own_libvirt(ssh: Path, option: list[str]) -> None:
    ssh.with_name("status").write_text("67")
    uri = f"qemu+ssh://me@host:2222/system?keyfile=/k&command={ssh}&no_tty=1"
    given = [word.format(uri=uri) for word in option]
    assert main(["snapshot", "create", *given, "my domain", "--name", "it's"]) == 67
    expected = [word.format(uri="qemu:///system") for word in option]
    line = " ".join(["qemu-vmdk-snap snapshot create", *expected, "'my domain'", "--name", "'it'\"'\"'s'"])
    assert words(ssh) == ["-T", "-p", "2222", "-i", "/k", "-o", "BatchMode=yes", "--", "me@host", line]


def test_a_default_uri_counts_too(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh.with_name("status").write_text("0")
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", f"qemu+ssh://host/system?command={ssh}")
    assert main(["snapshot", "list", "d1"]) == 0
    assert words(ssh) == ["-T", "--", "host", "qemu-vmdk-snap snapshot list --connect qemu:///system d1"]
    assert main(["hook", "status", "--dir", "/nowhere"]) == 1  # has nothing to do with a connection


def test_what_must_be_installed_there_is_said(ssh: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uri = f"qemu+ssh://host/system?command={ssh}"
    assert main(["snapshot", "list", "-c", uri, "d1"]) == 70
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"qemu-vmdk-snap: {uri}: qemu-vmdk-snap is not installed there")
    assert last.endswith("install it on host")


@pytest.mark.parametrize(
    ("uri", "status", "text"),
    [
        ("qemu+ssh://host/system?command={ssh}", 70, "ssh failed: see above"),
        ("qemu+ssh://host/system?command=/nowhere/ssh", 70, "/nowhere/ssh: cannot be run: No such file or directory"),
        ("qemu+ssh://-oProxyCommand=x/system?command={ssh}", 64, "must not begin with a dash"),
        ("qemu+ssh://host/system?command={ssh}&colour=red", 64, "'colour' cannot be given to ssh"),
    ],
)
def test_what_cannot_be_is_one_line(
    ssh: Path, uri: str, status: int, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ssh.with_name("status").write_text("255")
    assert main(["snapshot", "list", "-c", uri.format(ssh=ssh), "d1"]) == status
    assert text in capfd.readouterr().err


def test_arguments_are_checked_before_anybody_is_called(ssh: Path) -> None:
    with pytest.raises(SystemExit):
        main(["snapshot", "list", "-c", f"qemu+ssh://host/system?command={ssh}", "d1", "--no-such-option"])
    assert not ssh.with_name("words").exists()


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("qemu+ssh://h/system", "qemu:///system"),
        ("qemu+ssh://u@h/session", "qemu:///session"),
        ("qemu+ssh://h/system?socket=/run/x/sock", "qemu+unix:///system?socket=/run/x/sock"),
    ],
)
def test_what_the_host_calls_its_own_libvirt(uri: str, local: str) -> None:
    assert local_uri(uri) == local
