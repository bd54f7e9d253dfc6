"""A policy is found by the UUID of the domain, or else by its name; one that no domain has is reported."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.hooks import install as hooks
from qemu_vmdk_snap.domain.hooks.owners import find_policy, without_domain
from tests.domain.lab import Lab

UUID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
OTHER = "6ba7b811-9dad-11d1-80b4-00c04fd430c8"
NOWHERE = 'connect = "qemu+unix:///system?socket=/nowhere"\n'


class Host:
    """The hook in a folder, and its policies: each is a mistake that names itself."""

    def __init__(self, folder: Path) -> None:
        self.hooks, self.policies = folder / "qemu.d", folder / "do mains"
        self.script = hooks.install(self.hooks, self.policies, {})

    def policy(self, name: str) -> None:
        (self.policies / f"{name}.toml").write_text(f'"word of {name}" = 1\n')

    def call(self, xml: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the hook in libvirt's way."""
        return subprocess.run(
            [self.script, *words],
            input=xml,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": "/usr/bin:/bin"},
        )

    def start(self, name: str, uuid: str = UUID) -> str | None:
        """Run the hook as libvirt does at a start; return which policy it has found."""
        xml = (
            f"<domain type='qemu' id='7'>\n  <name>{name}</name>\n  <uuid>{uuid}</uuid>\n"
            "  <metadata>\n    <a>%s \\n</a>\n  </metadata>\n  <devices/>\n</domain>\n"
        )
        done = self.call(xml, name, "prepare", "begin", "-")
        if done.returncode == 0:
            assert done.stderr == ""
            return None
        assert done.stderr.count("\n") == 1
        return done.stderr.split("'word of ")[1].split("'")[0]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_policy_by_uuid_follows_the_domain(host: Host) -> None:
    assert host.start("web") is None
    host.policy("web")
    assert host.start("web") == "web"
    assert host.start("new name") is None
    host.policy(UUID)
    assert host.start("web") == UUID
    assert host.start("new name") == UUID
    assert host.start("web", OTHER) == "web"
    assert host.start("other", OTHER) is None


@pytest.mark.parametrize("line_end", ["\n", "", "\n\n"])
def test_the_xml_reaches_the_hook_whole(host: Host, tmp_path: Path, line_end: str) -> None:
    (host.policies / f"{UUID}.toml").write_text('verify = "chain"\n')
    lines = (
        "<domain type='qemu' id='7'>",
        "  <name>web</name>",
        f"  <uuid>{UUID}</uuid>",
        "  <title>100%s \\n</title>",
        "  <devices><disk type='file' device='disk'><driver type='vmdk'/>",
        f"  <source file='{tmp_path}/gone.vmdk'/><target dev='vda'/></disk></devices></domain>",
    )
    done = host.call(line_end.join(lines), "web", "prepare", "begin", "-")
    assert done.returncode == 1
    assert f"{tmp_path}/gone.vmdk" in done.stderr


def test_a_release_finds_it_too(host: Host) -> None:
    host.policy(UUID)
    done = host.call(f"<domain>\n<uuid>{UUID}</uuid>\n</domain>\n", "web", "release", "end", "-")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.needs("libvirt", "qemu-system-x86_64")
def test_status_and_after_stop_know_the_domain(host: Host, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = lab.define(lab.disk("a")), lab.define(lab.disk("b"))
    connect = f'connect = "{lab.uri}"\n'
    for name in (first.name(), second.UUIDString(), "gone"):
        (host.policies / f"{name}.toml").write_text(connect)
    (host.policies / "elsewhere.toml").write_text(NOWHERE)
    (host.policies / "bad.toml").write_text("bad = 1")
    states = hooks.status(host.hooks).policies
    lost = without_domain(states)
    assert [(one.domain, one.problem) for one in lost] == [
        ("gone", f"no domain of {lab.uri} has this name or UUID: was it renamed?")
    ]
    assert find_policy(host.policies, first.name()) == host.policies / f"{first.name()}.toml"
    assert find_policy(host.policies, "gone") == host.policies / "gone.toml"
    (host.policies / f"{second.name()}.toml").write_text(connect)
    by_uuid = host.policies / f"{second.UUIDString()}.toml"
    assert find_policy(host.policies, second.name()) == by_uuid
    assert main(["hook", "status", "--dir", str(host.hooks), "--output=json"]) == 1
    shown = {one["domain"]: one["problem"] for one in json.loads(capsys.readouterr().out)["policies"]}
    ignored = f"is ignored: the domain has a policy by its UUID, {second.UUIDString()}.toml"
    assert shown.pop("bad")
    assert shown == {
        first.name(): None,
        second.UUIDString(): None,
        second.name(): ignored,
        "gone": lost[0].problem,
        "elsewhere": None,
    }
