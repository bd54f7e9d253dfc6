"""A quick look along a chain, and an overlay made empty again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import (
    CidMismatch,
    CorruptChain,
    InvalidRequest,
    LockBusy,
    StillNeeded,
    Unsupported,
    create_image,
    create_overlay,
    open_chain,
    read_links,
    renew_overlay,
)

MIB = 1 << 20


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """Return the top of a chain of three, each link with some bytes of its own."""
    create_image(tmp_path / "a.vmdk", 4 * MIB, durable=False)
    for below, name in (("", "a"), ("a", "b"), ("b", "c")):
        path = tmp_path / f"{name}.vmdk"
        if below:
            create_overlay(path, tmp_path / f"{below}.vmdk", durable=False)
        write(path, ord(name) * 4096, name.encode() * 512)
    return tmp_path / "c.vmdk"


def write(path: Path, offset: int, data: bytes) -> None:
    with open_chain(path, writable=True) as chain:
        chain.write_at(offset, data)


def guest_bytes(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, chain.capacity)


def hint_of(path: Path, old: str, new: str) -> None:
    raw = path.read_bytes()
    assert len(old) == len(new)
    assert old.encode() in raw
    path.write_bytes(raw.replace(old.encode(), new.encode()))


def test_links_are_told_from_the_top_down(overlay: Path) -> None:
    links = read_links(overlay)
    assert [link.path.name for link in links] == ["c.vmdk", "b.vmdk", "a.vmdk"]
    assert [link.is_base for link in links] == [False, False, True]
    assert [link.parent_cid for link in links[:2]] == [link.cid for link in links[1:]]
    assert {link.capacity for link in links} == {4 * MIB}
    assert links[0].files == (overlay,)


def unlink_base(folder: Path) -> None:
    (folder / "a.vmdk").unlink()


def write_base(folder: Path) -> None:
    write(folder / "a.vmdk", 0, b"x" * 512)


def close_the_loop(folder: Path) -> None:
    # The CID check comes after: the loop itself must be seen.
    hint_of(folder / "b.vmdk", '"a.vmdk"', '"c.vmdk"')


def cut_base(folder: Path) -> None:
    os.truncate(folder / "a.vmdk", 100)


def leave_an_operation(folder: Path) -> None:
    from qemu_vmdk_snap.storage.journal.record import Operation

    operation = Operation("commit", folder / "b.vmdk", (folder / "b.vmdk", folder / "a.vmdk"), {})
    operation.begin()
    operation.hold.close()


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (unlink_base, CorruptChain, "b.vmdk: its parent 'a.vmdk' does not exist"),
        (write_base, CidMismatch, "a.vmdk is "),
        (close_the_loop, CorruptChain, "is already in the chain: the chain is a loop"),
        (cut_base, Exception, "a.vmdk"),
        (leave_an_operation, CorruptChain, "b.vmdk: an interrupted commit is not finished"),
    ],
)
def test_a_chain_that_does_not_hold_together_is_seen_and_not_renewed(
    overlay: Path, damage: Callable[[Path], None], error: type[Exception], text: str
) -> None:
    damage(overlay.parent)
    before = overlay.read_bytes()
    for look in (read_links, renew_overlay):
        with pytest.raises(error, match=text):
            look(overlay)
    assert overlay.read_bytes() == before
    assert not [path for path in overlay.parent.iterdir() if path.name.endswith(".tmp")]


def test_renewed_it_shows_what_its_parent_holds_and_takes_writes(overlay: Path) -> None:
    clean = guest_bytes(overlay.with_name("b.vmdk"))
    assert guest_bytes(overlay) != clean
    inode = overlay.stat().st_ino
    report = renew_overlay(overlay)
    assert (report.path, report.parent) == (overlay, overlay.with_name("b.vmdk"))
    assert report.dropped_bytes > 64 * 1024
    assert guest_bytes(overlay) == clean
    assert overlay.stat().st_ino == inode  # QEMU may have it open, and wait for its lock
    write(overlay, 0, b"again" * 100)
    assert guest_bytes(overlay)[:500] == b"again" * 100
    assert sorted(path.name for path in overlay.parent.iterdir()) == ["a.vmdk", "b.vmdk", "c.vmdk"]


def test_owner_mode_and_attributes_stay(overlay: Path) -> None:
    overlay.chmod(0o640)
    os.setxattr(overlay, "user.note", b"kept")
    if os.geteuid() == 0:
        os.chown(overlay, 12345, 54321)
    was = overlay.stat()
    renew_overlay(overlay)
    now = overlay.stat()
    assert (now.st_uid, now.st_gid, now.st_mode) == (was.st_uid, was.st_gid, was.st_mode)
    assert os.getxattr(overlay, "user.note") == b"kept"


def test_hint_and_a_larger_size_stay(overlay: Path) -> None:
    big = overlay.with_name("d.vmdk")
    create_overlay(big, overlay, hint=str(overlay), size=8 * MIB)
    renew_overlay(big)
    assert (read_links(big)[0].hint, read_links(big)[0].capacity) == (str(overlay), 8 * MIB)


def test_a_symbolic_link_stays_one(overlay: Path) -> None:
    link = overlay.with_name("link.vmdk")
    link.symlink_to(overlay.name)
    renew_overlay(link)
    assert link.is_symlink()
    assert guest_bytes(overlay) == guest_bytes(overlay.with_name("b.vmdk"))


def test_what_others_need_or_use_is_not_renewed(overlay: Path) -> None:
    base, middle = overlay.with_name("a.vmdk"), overlay.with_name("b.vmdk")
    before = {path: path.read_bytes() for path in (base, middle, overlay)}
    with pytest.raises(InvalidRequest, match=r"a\.vmdk: has no parent: it is not an overlay"):
        renew_overlay(base)
    with pytest.raises(StillNeeded, match=r"b\.vmdk: is still needed: .*c\.vmdk names it as its parent"):
        renew_overlay(middle)
    with open_chain(overlay), pytest.raises(LockBusy):
        renew_overlay(overlay)
    assert {path: path.read_bytes() for path in before} == before


def test_children_in_other_folders(overlay: Path) -> None:
    """They are found where the caller trusts images; one elsewhere is never shown wrong bytes."""
    folder = overlay.parent / "pool"
    folder.mkdir()
    child = folder / "child.vmdk"
    create_overlay(child, overlay, durable=False)
    trusted = [folder, overlay.parent, overlay.parent / "gone"]
    with pytest.raises(StillNeeded, match=r"c\.vmdk: is still needed: .*pool/child\.vmdk names it as its parent"):
        renew_overlay(overlay, trusted_dirs=trusted)
    with open_chain(child, trusted_dirs=trusted) as chain:
        assert chain.depth == 4
    renew_overlay(overlay, trusted_dirs=[overlay.parent])  # nobody has told of the pool
    with pytest.raises(CidMismatch):
        open_chain(child, trusted_dirs=trusted)


def test_a_child_beside_a_parent_elsewhere(overlay: Path) -> None:
    """The folders of the chain itself are looked through, too."""
    folder = overlay.parent / "tops"
    folder.mkdir()
    top = folder / "top.vmdk"
    create_overlay(top, overlay, durable=False)
    child = overlay.with_name("child.vmdk")
    create_overlay(child, top, durable=False)
    with pytest.raises(StillNeeded, match=r"top\.vmdk: is still needed: .*child\.vmdk names it as its parent"):
        renew_overlay(top, trusted_dirs=[overlay.parent.parent])  # above the folder of the child


def test_an_overlay_of_several_files_is_refused(overlay: Path) -> None:
    text = overlay.with_name("t.vmdk")
    facts = read_links(overlay)[0]
    text.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\n"
        f'parentCID={facts.cid:08x}\ncreateType="twoGbMaxExtentSparse"\nparentFileNameHint="c.vmdk"\n'
        f'RW {4 * MIB // 512} SPARSE "t-s001.vmdk"\n'
    )
    (overlay.parent / "t-s001.vmdk").write_bytes(overlay.read_bytes())
    with pytest.raises(Unsupported, match="only an overlay in one file can be renewed"):
        renew_overlay(text)
