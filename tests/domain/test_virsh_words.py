"""`snapshot list`, `parent`, `dumpxml` and the options of `create` beside virsh's own, on a real daemon."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.revert.run import revert
from tests.domain.lab import Lab, contents, xml_of
from tests.domain.libvirtd import Daemon
from tests.support.schemas import check

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64")


@pytest.fixture
def domain(daemon_lab: Lab) -> libvirt.virDomain:
    """Return a domain with the tree z - (m - a, 端末), made in this order."""
    domain = daemon_lab.define(daemon_lab.disk("a"))
    for name in ("z", "m", "a"):
        create_snapshot(daemon_lab.conn, domain.name(), name)
    revert(daemon_lab.conn, domain.name(), "z")
    time.sleep(1.05 - time.time() % 1)
    create_snapshot(daemon_lab.conn, domain.name(), "端末")
    return domain


def test_beside_virsh(
    daemon: Daemon, daemon_lab: Lab, domain: libvirt.virDomain, capsys: pytest.CaptureFixture[str]
) -> None:
    name = domain.name()

    def ours(command: str, *words: str) -> str:
        assert main(["snapshot", command, "-c", daemon_lab.uri, *words]) == 0
        return capsys.readouterr().out

    def listed(*words: str) -> list[str]:
        return ours("list", "--name", *words, name).split()

    assert listed() == ["z", "m", "a", "端末"]  # by time; virsh: by name
    for words in (
        ("--topological",),
        ("--from", "z"),
        ("--from", "z", "--descendants"),
        ("--current",),
        ("--leaves",),
        ("--no-leaves",),
        ("--roots",),
        ("--inactive",),
        ("--active",),
        ("--disk-only",),
        ("--external",),
        ("--internal",),
    ):
        theirs = daemon.virsh("snapshot-list", name, "--name", *words).split()
        assert sorted(listed(*words)) == sorted(theirs), words
    assert listed("--no-parent") == ["z"]
    assert listed("--topological") == ["z", "m", "a", "端末"]
    lines = ours("list", name, "--parent").splitlines()
    assert lines[2].index("20") == lines[5].index("20") + 2  # 端末 is four columns wide, and two characters

    assert ours("parent", "--snapshotname", "a", name) == daemon.virsh("snapshot-parent", name, "a").strip() + "\n"
    assert ours("parent", name, "--current") == "z\n"
    assert ours("dumpxml", name, "m").strip() == daemon.virsh("snapshot-dumpxml", name, "m").strip()
    assert "passwd='secret'" in ours("dumpxml", name, "--security-info", "m")
    assert check("snapshot dumpxml", ours("dumpxml", name, "m", "--output=json"))["snapshot"] == "m"
    assert check("snapshot parent", ours("parent", name, "m", "--output=json"))["name"] == "z"
    assert main(["snapshot", "parent", "-c", daemon_lab.uri, name, "z", "--output=json"]) == 69
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "no-snapshot"


def test_options_of_create_and_revert(
    daemon_lab: Lab, domain: libvirt.virDomain, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (contents(daemon_lab.folder), xml_of(domain), domain.snapshotNum())
    line = ["snapshot", "create", "-c", daemon_lab.uri, "--domain", domain.name()]
    for option in ("--no-metadata", "--halt", "--reuse-external"):
        assert main([*line, option]) == 64
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert printed.err.startswith(f"qemu-vmdk-snap: {option}: ")
    back = ["snapshot", "revert", "-c", daemon_lab.uri, domain.name(), "z"]
    assert main([*back, "--reset-nvram"]) == 64
    assert "`virsh start --reset-nvram`" in capsys.readouterr().err
    assert main([*line, "--print-xml", "--name", "s", "--description", "d"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("<domainsnapshot>\n  <name>s</name>\n  <description>d</description>\n")
    assert (contents(daemon_lab.folder), xml_of(domain), domain.snapshotNum()) == before
    assert check("snapshot create", _json(capsys, [*line, "--print-xml", "--name", "s"]))["xml"].endswith(">\n")
    assert main([*line, "--atomic", "--live", "--validate", "--disk-only", "--name", "s"]) == 0
    assert main([*back, "--force"]) == 0


def _json(capsys: pytest.CaptureFixture[str], line: list[str]) -> str:
    capsys.readouterr()
    assert main([*line, "--output=json"]) == 0
    return capsys.readouterr().out
