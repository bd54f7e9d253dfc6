"""The record of what a snapshot is about to change."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from qemu_vmdk_snap import DomainError
from qemu_vmdk_snap.domain.journal.record import Intent, IntentStore, Overlay

if TYPE_CHECKING:
    import libvirt

INTENT = Intent(
    uuid="u-1",
    domain="d",
    snapshot="größer",
    overlays=(
        Overlay("vda", "/img/a-000001.vmdk", "/img/a.vmdk"),
        Overlay("vdb", "/img/b-000001.vmdk", "/img/b.vmdk", (1, 2)),
    ),
    old_xml="<domain passwd='secret'/>",
    new_xml="<domain/>",
    snapshot_xml="<domainsnapshot/>",
)


@dataclass
class Connection:
    """All that a store asks of a connection."""

    uri: str

    def getURI(self) -> str:
        return self.uri


def store_of(uri: str, **environ: str) -> IntentStore:
    return IntentStore.of(cast("libvirt.virConnect", Connection(uri)), environ)


def test_what_was_written_is_read_back_by_another_store(tmp_path: Path) -> None:
    IntentStore(tmp_path / "a" / "b", "system").write(INTENT)
    store = IntentStore(tmp_path / "a" / "b", "system")
    assert store.read("u-1") == INTENT
    assert store.uuids() == ["u-1"]
    assert store.read("u-2") is None
    store.write(INTENT.made("/img/a-000001.vmdk", (7, 8)))
    assert [overlay.identity for overlay in cast(Intent, store.read("u-1")).overlays] == [(7, 8), (1, 2)]
    store.remove("u-1")
    assert store.uuids() == []
    store.remove("u-1")


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    store = IntentStore(tmp_path / "state", "system")
    old = os.umask(0)
    try:
        store.write(INTENT)
    finally:
        os.umask(old)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert store.path("u-1").stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_the_record_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = IntentStore(tmp_path, "system")
    store.write(INTENT)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.write(INTENT.made("/img/a-000001.vmdk", (7, 8)))
    assert store.read("u-1") == INTENT
    assert [path.name for path in tmp_path.iterdir()] == ["system-u-1.json"]


def test_kinds_of_libvirt_do_not_see_each_others_records(tmp_path: Path) -> None:
    uris = ("qemu:///system", "qemu:///session", f"qemu:///embed?root={tmp_path}", "test:///default")
    stores = [store_of(uri, QEMU_VMDK_SNAP_STATE=str(tmp_path)) for uri in uris]
    assert len({store.path("u-1") for store in stores}) == len(stores)
    assert {store.folder for store in stores} == {tmp_path}
    stores[0].write(INTENT)
    assert [store.uuids() for store in stores] == [["u-1"], [], [], []]


def test_the_folder_follows_the_libvirt_and_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_of("qemu:///embed?root=/r").folder == Path("/r/qemu-vmdk-snap")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert store_of("qemu:///system", XDG_STATE_HOME="/x").folder == Path("/var/lib/qemu-vmdk-snap")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert store_of("qemu:///session", XDG_STATE_HOME="/x", HOME="/h").folder == Path("/x/qemu-vmdk-snap")
    assert store_of("qemu:///session", HOME="/h").folder == Path("/h/.local/state/qemu-vmdk-snap")


def test_a_lock_excludes_others_of_the_same_domain_until_it_goes(tmp_path: Path) -> None:
    store = IntentStore(tmp_path, "system")
    with store.locked("u-1", "d"):
        assert store.busy("u-1")
        assert not store.busy("u-2")
        with (
            pytest.raises(DomainError, match="domain d: another command is changing its snapshots"),
            store.locked("u-1", "d"),
        ):
            pass
    assert not store.busy("u-1")


def test_looking_makes_nothing(tmp_path: Path) -> None:
    store = IntentStore(tmp_path / "state", "system")
    assert not store.busy("u-1")
    assert not store.has("u-1")
    assert store.read("u-1") is None
    assert store.uuids() == []
    assert not (tmp_path / "state").exists()


def test_looking_whether_a_command_is_at_work_holds_up_none(tmp_path: Path) -> None:
    store = IntentStore(tmp_path, "system")
    with store.locked("u-1", "d"):
        pass
    fd = os.open(store.path("u-1").with_suffix(".lock"), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, [fd]).start()
    with store.locked("u-1", "d"):
        pass


def test_what_is_locked_journaled_and_forgotten_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "qemu_vmdk_snap.domain.journal")
    store = IntentStore(tmp_path, "system")
    with store.locked("u-1", "d"):
        store.write(INTENT)
        store.remove("u-1")
    assert [record.getMessage() for record in caplog.records] == [
        f"domain d: locked by {tmp_path}/system-u-1.lock",
        "domain d: create of snapshot 'größer' journaled",
        "domain u-1: its record is removed",
    ]
