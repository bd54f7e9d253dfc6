from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from qemu_vmdk_snap import CorruptChain, Severity, check_image, create_image, open_chain, open_link, recover
from qemu_vmdk_snap.chain.look.notes import listening
from qemu_vmdk_snap.storage.identity import Identity, identity_of
from qemu_vmdk_snap.storage.journal import grainlog
from qemu_vmdk_snap.storage.journal.grainlog import GrainLog, Noted, taken, waiting, waiting_in
from qemu_vmdk_snap.units import MIB
from qemu_vmdk_snap.vmdk.grain.extent import GrainExtent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(grainlog, "folders", lambda: [folder])
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.vmdk"
    create_image(path, MIB)
    return path


def left_behind(image: Path, cid: int, *notes: Noted) -> None:
    """Leave the log of a process that has died."""
    identity = identity_of(image)
    assert identity is not None
    log = GrainLog.create(image, identity, cid)
    for note in notes:
        log.note(*note)
    log.close()


def stored(image: Path, grain: int, data: bytes) -> tuple[int, int]:
    """Store a grain that no table names, as a killed server does; return the CID and the sector."""
    link = open_link(image, writable=True)
    try:
        extent = link.extents[0].extent
        assert isinstance(extent, GrainExtent)
        position = extent.append(grain, data)
        return link.cid, position // 512
    finally:
        link.close()


@pytest.mark.usefixtures("home")
def test_what_was_noted_is_read_in_order_until_the_next_flush(image: Path) -> None:
    log = GrainLog.create(image, Identity(1, 2), 0xABCD)
    expected = [Noted(number % 3, number << 20, number * 7) for number in range(10_000)]
    for note in expected:
        log.note(*note)
    assert list(log.notes()) == expected
    log.stored()
    assert len(log) == 0
    assert list(log.notes()) == []
    log.note(0, 5, 6)
    assert list(log.notes()) == [Noted(0, 5, 6)]
    log.remove()


@pytest.mark.usefixtures("home")
def test_the_log_of_a_living_process_does_not_wait(image: Path) -> None:
    identity = identity_of(image)
    assert identity is not None
    log = GrainLog.create(image, identity, 1)
    log.note(0, 0, 128)
    assert waiting(image) is None
    assert waiting_in(image.parent) == []
    log.close()
    assert waiting_in(image.parent) == [image]


def test_an_earlier_boot_an_empty_log_and_rubbish_are_none(
    home: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(image, 1)
    assert waiting(image) is None
    assert list(home.iterdir()) == []
    left_behind(image, 1, Noted(0, 0, 128))
    (log,) = home.iterdir()
    log.chmod(0o666)
    assert waiting(image) is None
    log.chmod(0o600)
    whole = log.read_bytes()
    for damage in (b"", whole[:100], b"x" + whole[1:]):
        log.write_bytes(damage)
        assert waiting(image) is None
    log.write_bytes(whole)
    monkeypatch.setattr(grainlog, "boot_id", lambda: bytes(16))
    assert waiting(image) is None
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("home")
def test_a_grain_that_waits_is_refused_to_writers_and_named_by_recover(image: Path) -> None:
    data = os.urandom(65536)
    cid, sector = stored(image, 3, data)
    left_behind(image, cid, Noted(0, 3, sector))
    with pytest.raises(CorruptChain, match=f"its server was killed, .*recover {image}"):
        open_chain(image, writable=True)
    assert [(one.operation, one.image) for one in recover(image.parent)] == [("serve", image)]
    with open_chain(image) as chain:
        assert chain.read_at(3 * 65536, 65536) == data
    assert not check_image(image).findings
    assert recover(image.parent) == []


@pytest.mark.usefixtures("home")
def test_readers_are_told_of_it_and_recover_finds_it_by_any_name(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cid, sector = stored(image, 3, os.urandom(65536))
    left_behind(image, cid, Noted(0, 3, sector))
    said: list[str] = []
    with listening(said.append), open_chain(image) as chain:
        assert chain.read_at(3 * 65536, 1) == b"\0"
    assert said == [f"{image}: its server was killed: what it acknowledged last is seen only after `recover {image}`"]
    notes = [str(one) for one in check_image(image).findings if one.severity == Severity.NOTE]
    assert len(notes) == 1
    assert f"recover {image}" in notes[0]
    monkeypatch.chdir(image.parent)
    (image.parent / "other.vmdk").write_bytes(image.read_bytes())
    assert recover("other.vmdk") == []
    assert [(one.operation, one.image) for one in recover("a.vmdk")] == [("serve", image)]


def test_who_looks_is_in_nobodys_way_and_nobody_removes_a_log_that_he_has_not_seen(home: Path, image: Path) -> None:
    left_behind(image, 1, Noted(0, 0, 128))
    first, second = waiting(image), waiting(image)
    assert first is not None
    assert second is not None
    log = taken(image)
    assert log is not None
    assert waiting(image) is None  # somebody is at it
    assert taken(image) is None
    log.close()
    second.remove()
    left_behind(image, 1, Noted(0, 0, 128))
    first.remove()  # its name is another's by now
    assert [path.name for path in home.iterdir()] == [second.path.name]
    log = taken(image)
    assert log is not None
    log.close()


def test_a_new_log_waits_for_who_removes_the_old_one_and_replaces_no_living_one(
    home: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(image, 1, Noted(0, 0, 128))
    old = taken(image)
    assert old is not None
    remover = threading.Timer(0.2, old.remove)
    remover.start()
    identity = identity_of(image)
    assert identity is not None
    living = GrainLog.create(image, identity, 2)
    remover.join()
    living.note(0, 0, 128)
    monkeypatch.setattr(grainlog, "_LOOKING", 0.1)
    with pytest.raises(FileExistsError):
        GrainLog.create(image, identity, 3)
    assert [path.name for path in home.iterdir()] == [living.path.name]
    living.close()
    left = waiting(image)
    assert left is not None
    assert left.cid == 2


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("cid_off", "note", "reason"),
    [
        (1, Noted(0, 3, 0), "was written"),
        (0, Noted(0, 3, 1 << 20), "was changed"),
        (0, Noted(5, 3, 0), "was changed"),
        (0, Noted(0, 1 << 40, 0), "was changed"),
    ],
)
def test_a_log_that_does_not_fit_is_given_up_and_changes_nothing(
    image: Path, cid_off: int, note: Noted, reason: str
) -> None:
    cid, sector = stored(image, 3, os.urandom(65536))
    left_behind(image, cid + cid_off, note if note.sector else note._replace(sector=sector))
    before = image.read_bytes()
    with pytest.raises(CorruptChain, match=reason):
        recover(image.parent)
    assert image.read_bytes() == before
    assert recover(image.parent) == []


def test_an_image_with_the_inode_number_of_a_deleted_one_has_no_log(
    image: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number alone is given again; it refused, and alarmed about, an image that no server ever had."""
    monkeypatch.setattr(grainlog, "inode_version", lambda path: 1)
    left_behind(image, 0xABCD, Noted(0, 1, 300))
    monkeypatch.setattr(grainlog, "inode_version", lambda path: 2)
    assert waiting_in(image.parent) == []
    assert waiting(image) is None
    assert list(home.iterdir()) == []  # what it was for does not exist any more
    monkeypatch.setattr(
        grainlog, "inode_version", lambda path: 0
    )  # a file system without versions: not seen, not absent
    left_behind(image, 0xABCD, Noted(0, 1, 300))
    left = waiting(image)
    assert left is not None
    left.close()
