"""After `virsh domrename` everything works: the UUID is the domain's identity, the name inside its snapshots is old."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create import run as create_run
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.hooks.owners import find_policy
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.registry import list_snapshots
from tests.domain.lab import Lab
from tests.domain.libvirtd import Daemon

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "libvirtd", "virsh", "qemu-system-x86_64")


def test_every_command_works_after_a_rename(
    daemon: Daemon, daemon_lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = daemon_lab
    old = lab.define(lab.disk("a")).name()
    for name in ("s1", "s2", "s3"):
        create_snapshot(lab.conn, old, name)
    new = f"{old}-renamed"
    daemon.virsh("domrename", old, new)
    lab.adopt(new)
    assert f"<name>{old}</name>" in daemon.virsh("snapshot-dumpxml", new, "s1")
    for words in (
        ["snapshot", "list", new],
        ["snapshot", "info", new, "s2"],
        ["doctor", new],
        ["snapshot", "describe", new, "s1", "text"],
        ["snapshot", "rename", new, "s2", "s2b"],
        ["snapshot", "current", new, "s3"],
        ["snapshot", "create", new, "s4"],
        ["snapshot", "delete", new, "s1"],
        ["snapshot", "revert", new, "s2b"],
        ["snapshot", "adopt", new],
        ["snapshot", "prune", new, "--keep-last=2"],
        ["doctor", new],
    ):
        assert main([*words, "-c", lab.uri]) == 0, (words, capsys.readouterr())
    domain = lab.conn.lookupByName(new)
    assert domain.name() == new
    domain.create()
    assert main(["snapshot", "create", new, "live", "-c", lab.uri]) == 0
    assert main(["snapshot", "list", old, "-c", lab.uri]) == 69
    assert {one.domain for one in list_snapshots(lab.conn, new)} == {new}


def test_an_unfinished_operation_is_settled_under_the_new_name(
    daemon: Daemon, daemon_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = daemon_lab
    domain = lab.define(lab.disk("a"))
    old = domain.name()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(create_run, "_define", die)
        patched.setattr(create_run, "_undo", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            create_snapshot(lab.conn, old, "s1")
    store = IntentStore.of(lab.conn)
    assert store.has(domain.UUIDString())
    new = f"{old}-renamed"
    daemon.virsh("domrename", old, new)
    lab.adopt(new)
    assert main(["recover", "-c", lab.uri, "--domain", new]) == 0
    assert not store.has(domain.UUIDString())
    assert main(["snapshot", "create", new, "s1", "-c", lab.uri]) == 0


def test_a_policy_is_found_by_name_or_uuid(daemon: Daemon, daemon_lab: Lab, tmp_path: Path) -> None:
    lab = daemon_lab
    domain: libvirt.virDomain = lab.define(lab.disk("a"))
    old, new, uuid = domain.name(), f"{domain.name()}-renamed", domain.UUIDString()
    by_name, by_uuid = tmp_path / f"{old}.toml", tmp_path / f"{uuid}.toml"
    for path in (by_name, by_uuid):
        path.write_text(f'connect = "{lab.uri}"\n')
    daemon.virsh("domrename", old, new)
    lab.adopt(new)
    (tmp_path / f"{new}.toml").write_text(f'connect = "{lab.uri}"\n')
    assert find_policy(tmp_path, new) == by_uuid
    by_uuid.unlink()
    assert find_policy(tmp_path, new) == tmp_path / f"{new}.toml"
