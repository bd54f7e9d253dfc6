"""All or nothing: a failure at any step, and a death at any step."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import qemu_vmdk_snap as engine
from qemu_vmdk_snap import DomainError, create_overlay, open_chain
from qemu_vmdk_snap.domain import xml
from qemu_vmdk_snap.domain.connect import find_domain
from qemu_vmdk_snap.domain.create import run as snapshot
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.journal import overlays as overlay_files
from qemu_vmdk_snap.domain.journal.pending import abandon
from qemu_vmdk_snap.domain.journal.record import IntentStore
from qemu_vmdk_snap.domain.journal.recover import recover
from qemu_vmdk_snap.domain.registry import list_snapshots
from qemu_vmdk_snap.storage import attributes
from tests.domain.lab import Lab, contents, xml_of

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")

STEPS = {
    "record": ("write", 1, False),
    "record kept": ("write", 1, True),
    "first overlay": ("create_overlay", 1, False),
    "second overlay": ("create_overlay", 2, False),
    "owner of the second": ("copy_attributes", 2, False),
    "second record": ("write", 2, False),
    "definition": ("defineXML", 1, False),
    "answer to the definition": ("defineXML", 1, True),
    "registration": ("snapshotCreateXML", 1, False),
    "answer to the registration": ("snapshotCreateXML", 1, True),
}
"""step: what fails, at which call of it, and whether it has done its work when it fails."""


def break_step(monkeypatch: pytest.MonkeyPatch, step: str, failure: Callable[[], BaseException]) -> None:
    """Make the step fail once."""
    import libvirt

    name, at, works = STEPS[step]
    home: Any = {
        "write": IntentStore,
        "create_overlay": engine,
        "copy_attributes": attributes,
        "defineXML": libvirt.virConnect,
        "snapshotCreateXML": libvirt.virDomain,
    }[name]
    real, calls = getattr(home, name), iter(range(1, 1000))

    def broken(*args: object, **options: object) -> object:
        fails = next(calls) == at
        result = real(*args, **options) if works or not fails else None
        if fails:
            raise failure()
        return result

    monkeypatch.setattr(home, name, broken, raising=False)


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def refused() -> Exception:
    import libvirt

    error: Exception = libvirt.libvirtError("libvirt says no")
    return error


@pytest.mark.parametrize("failure", [no_space, refused, KeyboardInterrupt], ids=lambda failure: failure.__name__)
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_takes_everything_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, step: str, failure: Callable[[], BaseException]
) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    create_snapshot(lab.conn, domain.name(), "s1")
    before = (
        xml_of(domain),
        contents(lab.folder),
        IntentStore.of(lab.conn).uuids(),
        domain.snapshotCurrent().getName(),
    )
    with monkeypatch.context() as broken:
        break_step(broken, step, failure)
        with pytest.raises((type(failure()), DomainError)) as error:
            create_snapshot(lab.conn, domain.name(), "s2")
    assert "undoing it failed" not in str(error.value)
    after = (xml_of(domain), contents(lab.folder), IntentStore.of(lab.conn).uuids(), domain.snapshotCurrent().getName())
    assert after == before
    assert domain.snapshotNum() == 1
    # And nothing stands in the way of the next try.
    create_snapshot(lab.conn, domain.name(), "s2")
    assert [info.name for info in list_snapshots(lab.conn, domain.name())] == ["s1", "s2"]


def test_a_record_that_cannot_be_removed_does_not_undo_the_snapshot(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = lab.define(lab.disk())
    with monkeypatch.context() as broken:
        broken.setattr(IntentStore, "remove", lambda *_: (_ for _ in ()).throw(no_space()))
        create_snapshot(lab.conn, domain.name(), "s1")
    report = create_snapshot(lab.conn, domain.name(), "s2")
    assert report.recovered is not None
    assert report.recovered.finished
    assert IntentStore.of(lab.conn).uuids() == []
    assert domain.snapshotNum() == 2


def test_what_cannot_be_taken_back_now_is_settled_by_the_next_command(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    with monkeypatch.context() as broken:
        break_step(broken, "registration", refused)
        broken.setattr(overlay_files, "hold_empty", lambda *_: (_ for _ in ()).throw(no_space()))
        with pytest.raises(DomainError, match=r"undoing it failed too .*: `recover -c .*` finishes or undoes it"):
            create_snapshot(lab.conn, domain.name(), "s1")
    assert [result.finished for result in recover(lab.conn)] == [True]
    assert [info.name for info in list_snapshots(lab.conn, domain.name())] == ["s1"]
    assert domain.snapshotCurrent().getName() == "s1"


# Real faults of the system, without a patched function.


@pytest.fixture
def small_fs(scratch: Path) -> Iterator[Path]:
    """Give a file system with room for little more than one base disk."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs to mount a tmpfs")
    folder = scratch / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fails_and_leaves_all_as_it_was(lab: Lab, code: int, domain: libvirt.virDomain, *folders: Path) -> None:
    before = (xml_of(domain), contents(lab.folder, *folders))
    with pytest.raises(OSError, match=os.strerror(code)) as error:
        create_snapshot(lab.conn, domain.name(), "s1")
    assert error.value.errno == code
    assert (xml_of(domain), contents(lab.folder, *folders)) == before
    assert domain.snapshotNum() == 0
    assert IntentStore.of(lab.conn).uuids() == []


def test_a_full_file_system_under_the_second_disk(lab: Lab, small_fs: Path) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b", small_fs))
    free = os.statvfs(small_fs)
    (small_fs / "filler").write_bytes(b"x" * (free.f_bavail - 1) * free.f_bsize)
    fails_and_leaves_all_as_it_was(lab, errno.ENOSPC, domain, small_fs)


def test_a_read_only_file_system_under_the_second_disk(lab: Lab, small_fs: Path) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b", small_fs))
    subprocess.run(["mount", "-o", "remount,ro", str(small_fs)], check=True)
    fails_and_leaves_all_as_it_was(lab, errno.EROFS, domain, small_fs)


# Death: the process is killed, a new one settles what it finds. On a real daemon, which lives on.

VICTIM = """
import os, signal, sys
from qemu_vmdk_snap.domain.overlay import newfile
from qemu_vmdk_snap.domain.create import run as snapshot
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.journal.record import IntentStore
import libvirt

uri, domain, name, at = sys.argv[1:]
homes = {"write": IntentStore, "create_overlay": newfile.engine, "make_overlay": snapshot, "remove": IntentStore,
         "defineXML": libvirt.virConnect, "snapshotCreateXML": libvirt.virDomain}
real, calls = getattr(homes[name], name), iter(range(1, 1000))

def dies(*args, **options):
    result = real(*args, **options)
    if next(calls) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(homes[name], name, dies)
snapshot.create_snapshot(open_connection(uri), domain, "s2")
"""


@pytest.mark.parametrize(
    ("after", "finished"),
    [
        (("write", 1), False),
        (("create_overlay", 1), False),
        (("make_overlay", 1), False),
        (("make_overlay", 2), False),
        (("write", 2), False),
        (("defineXML", 1), True),
        (("snapshotCreateXML", 1), True),
        (("remove", 1), None),
    ],
)
def test_killed_after_any_step_the_next_command_settles_it(
    daemon_lab: Lab, after: tuple[str, int], finished: bool | None
) -> None:
    lab = daemon_lab
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    create_snapshot(lab.conn, domain.name(), "s1")
    before = (xml_of(domain), contents(lab.folder))
    words = [sys.executable, "-c", VICTIM, lab.uri, domain.name(), after[0], str(after[1])]
    assert subprocess.run(words, check=False, timeout=60).returncode == -9
    results = recover(lab.conn)
    assert [result.finished for result in results] == ([] if finished is None else [finished])
    assert [result.left for result in results] == [()] * len(results)
    complete = finished is not False
    assert domain.snapshotNum() == (2 if complete else 1)
    assert ((xml_of(domain), contents(lab.folder)) == before) is not complete
    overlays = {str(lab.folder / f"{disk}-000002.vmdk") for disk in "ab"}
    assert (overlays <= set(contents(lab.folder))) is complete
    assert recover(lab.conn) == []
    domain.create()


def interrupt(lab: Lab, monkeypatch: pytest.MonkeyPatch, domain: libvirt.virDomain, step: str) -> None:
    """Leave the snapshot s1 as a process leaves it that dies at `step`: nobody undoes anything."""
    with monkeypatch.context() as dying:
        break_step(dying, step, KeyboardInterrupt)
        dying.setattr(snapshot, "_undo", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            create_snapshot(lab.conn, domain.name(), "s1")
    assert IntentStore.of(lab.conn).read(domain.UUIDString()) is not None


def test_what_the_guest_wrote_before_recovery_is_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = lab.define(lab.disk())
    interrupt(lab, monkeypatch, domain, "answer to the definition")
    with open_chain(lab.folder / "a-000001.vmdk", writable=True) as chain:
        chain.write_at(0, b"written since")
    assert [result.finished for result in recover(lab.conn)] == [True]
    (info,) = list_snapshots(lab.conn, domain.name())
    assert info.disks[0].frozen == lab.folder / "a.vmdk"
    with open_chain(lab.folder / "a-000001.vmdk") as chain:
        assert chain.read_at(0, 13) == b"written since"


def test_an_unfinished_snapshot_is_finished_while_the_guest_runs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = lab.define(lab.disk())
    interrupt(lab, monkeypatch, domain, "answer to the definition")
    domain.create()
    assert [result.finished for result in recover(lab.conn)] == [True]
    assert domain.snapshotNum() == 1


def test_an_overlay_with_data_is_never_unlinked(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = lab.define(lab.disk())
    interrupt(lab, monkeypatch, domain, "definition")
    overlay = lab.folder / "a-000001.vmdk"
    with open_chain(overlay, writable=True) as chain:
        chain.write_at(0, b"precious")
    (result,) = recover(lab.conn)
    assert (result.finished, result.left) == (False, (overlay,))
    with open_chain(overlay) as chain:
        assert chain.read_at(0, 8) == b"precious"


@pytest.mark.parametrize("link", [False, True])
def test_a_file_of_somebody_else_under_the_planned_name_is_left(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    base = lab.disk()
    domain = lab.define(base)
    interrupt(lab, monkeypatch, domain, "record kept")
    overlay = lab.folder / "a-000001.vmdk"
    create_overlay(overlay, base)
    name = lab.folder / "link.vmdk" if link else overlay
    if link:
        name.symlink_to(overlay)
    lab.define(name)  # empty, on the same base, but another domain's
    (result,) = recover(lab.conn)
    assert (result.finished, result.left) == (False, (overlay,))
    assert overlay.exists()


def test_a_replaced_overlay_is_left(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lab.disk()
    domain = lab.define(base)
    interrupt(lab, monkeypatch, domain, "definition")
    overlay = lab.folder / "a-000001.vmdk"
    create_overlay(lab.folder / "new.vmdk", base)
    (lab.folder / "new.vmdk").rename(overlay)
    (result,) = recover(lab.conn)
    assert result.left == (overlay,)
    assert overlay.exists()


def test_another_number_of_the_device_after_a_restart(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = lab.define(lab.disk())
    interrupt(lab, monkeypatch, domain, "definition")
    store, overlay = IntentStore.of(lab.conn), lab.folder / "a-000001.vmdk"
    intent = store.read(domain.UUIDString())
    assert intent is not None
    facts = overlay.stat()
    store.write(intent.made(str(overlay), (facts.st_dev + 1, facts.st_ino)))
    (result,) = recover(lab.conn)
    assert (result.finished, result.left) == (False, ())
    assert not overlay.exists()


def test_what_is_left_of_records_that_never_became_complete_goes(lab: Lab) -> None:
    folder = IntentStore.of(lab.conn).folder
    folder.mkdir(exist_ok=True)
    left = folder / ".embed-u.json.0123456789ab.qemu-vmdk-snap.tmp"
    left.write_text("{")
    assert recover(lab.conn) == []
    assert not left.exists()


def test_one_that_cannot_be_settled_does_not_hold_up_the_others(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    store = IntentStore.of(lab.conn)
    domain = lab.define(lab.disk())
    interrupt(lab, monkeypatch, domain, "definition")
    unknown = "00000000-1111-2222-3333-444444444444"
    store.path(unknown).write_text("{}")
    try:
        with pytest.raises(DomainError, match="libvirt does not know it"):
            recover(lab.conn)
        assert store.uuids() == [unknown]
    finally:
        store.remove(unknown)


def test_a_domain_edited_halfway_is_left_to_its_owner(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = lab.define(lab.disk("a"), lab.disk("b"))
    interrupt(lab, monkeypatch, domain, "answer to the definition")
    overlay = lab.folder / "b-000001.vmdk"
    half = xml.relink(xml_of(domain), lambda files: files[1:] if files[0] == overlay else files)
    lab.conn.defineXML(half)
    before = contents(lab.folder)
    with pytest.raises(
        DomainError, match=r"was edited during the create of snapshot 's1': it names .*a-000001.vmdk but not"
    ):
        recover(lab.conn)
    assert contents(lab.folder) == before
    assert [one.operation for one in abandon(lab.conn)] == ["create"]
    assert contents(lab.folder) == before
    assert recover(lab.conn) == []


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 1}', '{"version": 2}', '{"version": 1, "overlays": 7}'])
def test_a_damaged_record_stops_the_command_and_stays(lab: Lab, damage: str) -> None:
    domain = lab.define(lab.disk())
    path = IntentStore.of(lab.conn).path(domain.UUIDString())
    path.parent.mkdir(exist_ok=True)
    path.write_text(damage)
    before = contents(lab.folder)
    with pytest.raises(DomainError, match=r"the record .*json"):
        create_snapshot(lab.conn, domain.name(), "s1")
    assert contents(lab.folder) == before
    assert path.read_text() == damage
    path.unlink()
    assert find_domain(lab.conn, domain.name()).snapshotNum() == 0
