"""Is everything that needs a file found, whatever it is called and however damaged, and is nothing else?"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import (
    CidMismatch,
    ImageOptions,
    StillNeeded,
    create_image,
    create_overlay,
    open_chain,
    require_writable,
)
from qemu_vmdk_snap.chain.needs.claims import read_claims
from qemu_vmdk_snap.chain.needs.dependents import Census, children_of, require_fit, require_one_name, require_unneeded
from qemu_vmdk_snap.chain.needs.follow import follow
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.ops.edit.remove import remove

MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image alone in its folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    create_image(folder / "base.vmdk", MIB, durable=False)
    return folder / "base.vmdk"


def found(base: Path, *folders: Path) -> list[tuple[str, str]]:
    return [(one.path.name, one.how) for one in Census.of([base.parent, *folders]).dependents([base])]


def patched(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert old in raw
    assert len(old) == len(new)
    path.write_bytes(raw.replace(old, new))


@pytest.mark.parametrize("name", ["top.vmdk", "web.new", "web.tmp", "web.snap1", ".hidden", "no suffix", "盘.vmdk"])
def test_an_overlay_of_any_name(base: Path, name: str) -> None:
    create_overlay(base.with_name(name), base, durable=False)
    assert found(base) == [(name, "parent")]


def test_cids_do_not_matter(base: Path) -> None:
    create_overlay(base.with_name("top.vmdk"), base, durable=False)
    with open_chain(base, writable=True) as chain:
        chain.write_at(0, b"x")
    census = Census.of([base.parent])
    children = children_of(base, [base], census)
    with open_chain(base) as chain, pytest.raises(CidMismatch, match="--relink-cids"):
        require_fit(base, chain.links[0].cid, children)


def test_a_hint_counts_where_parent_cid_says_no_parent(base: Path) -> None:
    create_overlay(base.with_name("top.vmdk"), base, durable=False)
    with open_chain(base.with_name("top.vmdk")) as chain:
        cid = chain.links[0].parent_cid
    patched(base.with_name("top.vmdk"), b"parentCID=%08x" % cid, b"parentCID=ffffffff")
    assert found(base) == [("top.vmdk", "parent")]
    with pytest.raises(StillNeeded, match=r"top\.vmdk names it as its parent"):
        children_of(base, [base], Census.of([base.parent]))


def elsewhere(base: Path) -> Path:
    folder = base.parent.parent / "elsewhere"
    folder.mkdir()
    return folder


def test_another_folder_by_every_kind_of_way(base: Path) -> None:
    other = elsewhere(base)
    (base.parent.parent / "linked").symlink_to(base.parent)
    (other / "name").symlink_to(base)
    for number, hint in enumerate([str(base), "../images/base.vmdk", "../linked/base.vmdk", "name", f"file:{base}"]):
        create_overlay(other / f"{number}.vmdk", base, hint=hint, durable=False)
    assert found(base) == []
    assert found(base, other) == [(f"{number}.vmdk", "parent") for number in range(5)]
    assert found(base.parent.parent / "linked" / "base.vmdk", other) == found(base, other)
    assert found(other / "name", base.parent) == found(base, other)


def test_an_overlay_that_is_a_link_counts_from_both_folders(base: Path) -> None:
    other = elsewhere(base)
    create_overlay(other / "top.vmdk", base, hint="base.vmdk", durable=False)  # leads nowhere from its own folder
    (base.parent / "link.vmdk").symlink_to(other / "top.vmdk")
    assert found(base) == [("link.vmdk", "parent")]
    assert found(base, other) == [("link.vmdk", "parent"), ("top.vmdk", "unknown")]


def damaged(offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


@pytest.mark.parametrize(
    ("damage", "how"),
    [
        (damaged(73, b"\r\n\r\n"), "parent"),  # the newline probe
        (damaged(4, struct.pack("<I", 9)), "parent"),  # the version
        (damaged(56, struct.pack("<Q", 1 << 40)), "parent"),  # gdOffset
        (damaged(28, struct.pack("<Q", 7)), "parent"),  # descriptorOffset: found where it is all the same
        (damaged(28, struct.pack("<Q", 1 << 63)), "parent"),
        (damaged(512, b"\xff" * 600), "unknown"),
        (lambda path: os.truncate(path, 300), "unknown"),
        (lambda path: os.truncate(path, 700), "parent"),
    ],
)
def test_a_damaged_overlay_counts(base: Path, damage: Callable[[Path], None], how: str) -> None:
    create_overlay(base.with_name("top.vmdk"), base, durable=False)
    damage(base.with_name("top.vmdk"))
    assert found(base) == [("top.vmdk", how)]


def qcow2(path: Path, name: bytes, *, version: int = 3) -> None:
    head = bytearray(4096)
    struct.pack_into(">4sIQI", head, 0, b"QFI\xfb", version, 512, len(name))
    struct.pack_into(">I", head, 100, 104)
    head[512 : 512 + len(name)] = name
    path.write_bytes(head)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"base.vmdk", "parent"),
        (b"file:base.vmdk", "parent"),
        (b'json:{"driver":"vmdk","file":{"driver":"file","filename":"base.vmdk"}}', "parent"),
        (b'json:{"driver":"vmdk","file.filename":"base.vmdk"}', "parent"),
        (b"json:{", "unknown"),
        (b"gone.vmdk", "unknown"),
        (b"nbd://host/base.vmdk", None),
    ],
)
def test_a_qcow2_overlay(base: Path, name: bytes, expected: str | None) -> None:
    qcow2(base.with_name("top"), name)
    assert found(base) == ([("top", expected)] if expected else [])


def test_qcow2_without_backing_and_its_data_file(base: Path) -> None:
    qcow2(base.with_name("alone.qcow2"), b"")
    path = base.with_name("data.qcow2")
    qcow2(path, b"")
    raw = bytearray(path.read_bytes())
    struct.pack_into(">Q", raw, 8, 0)
    struct.pack_into(">Q", raw, 72, 4)
    struct.pack_into(">II", raw, 104, 0x44415441, 9)
    raw[112:121] = b"base.vmdk"
    path.write_bytes(raw)
    patched(base.with_name("alone.qcow2"), struct.pack(">Q", 512), bytes(8))
    assert found(base) == [("data.qcow2", "data")]


def test_qed(base: Path) -> None:
    head = bytearray(4096)
    struct.pack_into("<4s", head, 0, b"QED\0")
    struct.pack_into("<Q", head, 16, 1)
    struct.pack_into("<II", head, 56, 100, 9)
    head[100:109] = b"base.vmdk"
    base.with_name("old.qed").write_bytes(head)
    assert found(base) == [("old.qed", "parent")]


def test_another_descriptor_names_the_extents(tmp_path: Path) -> None:
    disk = tmp_path / "disk.vmdk"
    create_image(disk, MIB, kind="twoGbMaxExtentSparse", durable=False)
    (tmp_path / "copy.vmdk").write_bytes(disk.read_bytes())
    files = [disk, tmp_path / "disk-s001.vmdk"]
    assert [(one.path.name, one.how) for one in Census.of([tmp_path]).dependents(files)] == [("copy.vmdk", "extent")]
    with pytest.raises(StillNeeded, match=r"copy\.vmdk names it as an extent of its own"):
        remove(disk)
    assert all(file.exists() for file in files)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(base: Path) -> None:
    base.with_name("private").write_bytes(b"x")
    base.with_name("private").chmod(0)
    assert found(base) == [("private", "unknown")]


@pytest.mark.parametrize("error", [5, 13, 24, 116])
def test_what_cannot_be_read_once(base: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    base.with_name("other").write_bytes(b"x")
    pread = os.pread

    def broken(fd: int, length: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "other":
            raise OSError(error, os.strerror(error))
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", broken)
    assert found(base) == [("other", "unknown")]
    with pytest.raises(StillNeeded, match=r"other cannot be read \(.*\): it may depend on it"):
        require_unneeded(base, [base], Census.of([base.parent]))
    require_unneeded(base, [base], Census.of([base.parent]), orphans=[base.with_name("other")])


def test_a_folder_that_cannot_be_looked_through(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: object) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(StillNeeded, match="cannot be listed"):
        Census.of([base.parent])


def test_a_link_into_what_is_not_mounted(base: Path) -> None:
    base.with_name("gone").symlink_to("nothing-here")  # its folder was looked through: nothing is there
    assert found(base) == []
    base.with_name("away.vmdk").symlink_to("/not/mounted/x.vmdk")
    assert found(base) == [("away.vmdk", "unknown")]


def test_an_overlay_whose_parent_is_missing_may_need_anything(base: Path) -> None:
    create_image(base.with_name("middle.vmdk"), MIB, durable=False)
    create_overlay(base.with_name("top.vmdk"), base.with_name("middle.vmdk"), durable=False)
    assert found(base) == []
    base.with_name("middle.vmdk").unlink()
    assert found(base) == [("top.vmdk", "unknown")]


def test_a_parent_that_is_not_named(base: Path) -> None:
    """VirtualBox finds parents by a UUID, and writes no hint."""
    create_overlay(base.with_name("top.vmdk"), base, durable=False)
    patched(base.with_name("top.vmdk"), b"parentFileNameHint", b"parentFileNameNone")
    assert found(base) == [("top.vmdk", "unknown")]
    create_image(base.with_name("other.vmdk"), MIB, durable=False)
    with open_chain(base.with_name("other.vmdk")) as chain, open_chain(base) as mine:
        patched(base.with_name("top.vmdk"), b"%08x" % mine.links[0].cid, b"%08x" % chain.links[0].cid)
    assert found(base) == []  # it is the child of the other, whose CID it has


def test_what_needs_nothing_of_it(base: Path) -> None:
    create_image(base.with_name("alone.vmdk"), MIB, durable=False)
    create_image(base.with_name("split.vmdk"), MIB, kind="twoGbMaxExtentSparse", durable=False)
    create_image(base.with_name("flat.vmdk"), MIB, kind="monolithicFlat", durable=False)
    create_image(base.with_name("cowd.vmdk"), MIB, kind="vmfsSparse", durable=False)
    base.with_name("raw").write_bytes(os.urandom(9000))
    base.with_name("empty").touch()
    base.with_name("folder").mkdir()
    os.mkfifo(base.with_name("fifo"))
    assert found(base) == []


def test_other_names_of_the_file(base: Path) -> None:
    require_one_name(base, [base], Census.of([base.parent]))
    other = elsewhere(base)
    (other / "link").hardlink_to(base)
    with pytest.raises(StillNeeded, match="has 1 more names"):
        require_one_name(base, [base], Census.of([base.parent]))
    with pytest.raises(StillNeeded, match=r"elsewhere/link is another name \(a hard link\)"):
        require_one_name(base, [base], Census.of([base.parent, other]))
    require_one_name(base, [base], Census.of([base.parent]), orphans=[other / "link"])


def test_encodings_of_a_hint(base: Path) -> None:
    named = base.with_name("磁盘.vmdk")
    base.rename(named)
    for number, codec in enumerate(("gbk", "utf-8", "big5")):
        text = f'# Disk DescriptorFile\nencoding="{codec}"\nCID=1\nparentCID=2\nparentFileNameHint="磁盘.vmdk"\n'
        try:
            named.with_name(f"{number}.vmdk").write_bytes(text.encode(codec))
        except UnicodeEncodeError:
            continue
    assert [name for name, _ in found(named)] == ["0.vmdk", "1.vmdk"]


def test_an_overlay_of_an_odd_name_is_moved_only_when_it_is_named(base: Path) -> None:
    create_overlay(base.with_name("web.snap1"), base, durable=False)
    with pytest.raises(StillNeeded, match=r"is not called \.vmdk: name it \(--child\)"):
        remove(base)
    assert remove(base, children=[base.with_name("web.snap1")]).moved == (base.with_name("web.snap1"),)
    with open_chain(base.with_name("web.snap1")) as chain:
        assert chain.depth == 1


def test_an_extent_whose_room_for_a_descriptor_is_empty(base: Path) -> None:
    # As QEMU makes the extents of a split disk: descriptorOffset is 1, and there are zeros.
    raw = bytearray((base.with_name("base.vmdk")).read_bytes())
    place, size = (512 * value for value in struct.unpack_from("<QQ", raw, 28))
    raw[place : place + size] = bytes(size)
    part = base.with_name("split-s001.vmdk")
    part.write_bytes(raw)
    assert found(base) == [("split-s001.vmdk", "unknown")]
    assert (problem := follow(part).problem) is not None
    assert "no descriptor" in problem[1]
    text = f'# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\nRW {MIB // 512} SPARSE "split-s001.vmdk"\n'
    base.with_name("split.vmdk").write_text(text)
    assert found(base) == []
    assert follow(base.with_name("split.vmdk")).problem is None
    raw[place : place + 4] = b"junk"
    part.write_bytes(raw)
    assert found(base) == [("split-s001.vmdk", "unknown")]
    assert follow(base.with_name("split.vmdk")).problem is not None


def test_claims_never_raise_but_for_io(tmp_path: Path) -> None:
    import random

    create_image(tmp_path / "a.vmdk", MIB, options=ImageOptions(grain_size=4096), durable=False)
    create_overlay(tmp_path / "b.vmdk", tmp_path / "a.vmdk", durable=False)
    qcow2(tmp_path / "q", b"a.vmdk")
    chance = random.Random(1)
    for name in ("a.vmdk", "b.vmdk", "q"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(150):
            raw = bytearray(whole[: chance.randint(0, 12000)])
            for _ in range(chance.randint(1, 8)):
                if raw:
                    raw[chance.randrange(min(len(raw), 1200))] = chance.randrange(256)
            (tmp_path / "x").write_bytes(raw)
            with (tmp_path / "x").open("rb") as file:
                read_claims(file.fileno())


def test_what_is_needed_is_not_handed_out_for_writing(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_writable(base)
    create_overlay(base.with_name("top.vmdk"), base, durable=False)
    with pytest.raises(StillNeeded):
        require_writable(base)
    require_writable(base, orphans=[base.with_name("top.vmdk")])
    require_writable(base.with_name("top.vmdk"))
    assert main(["guest", "boot", "--write", str(base), "size"]) == 68
    assert "top.vmdk names it as its parent" in capsys.readouterr().err
