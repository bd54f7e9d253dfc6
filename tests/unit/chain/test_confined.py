"""Is what was opened judged, and not only the name by which it was to be opened?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import CorruptChain, ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.links import read_links
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.storage.blockfile import BlockFile, PosixFile, open_posix

MIB = 1 << 20


class Swapped:
    """A folder where the name of a file leads elsewhere from just before it is opened."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.elsewhere = folder / "home", folder / "elsewhere"
        self.home.mkdir()
        self.elsewhere.mkdir()
        self.base, self.top = self.home / "base.vmdk", self.home / "top.vmdk"
        create_image(self.base, MIB, options=ImageOptions(subformat="monolithicFlat"), durable=False)
        create_overlay(self.top, self.base, durable=False)
        self.victim = ""
        self.opened: list[Path] = []
        really = PosixFile.open.__func__  # type: ignore[attr-defined]

        def swapping(cls: type[PosixFile], path: Path, /, **how: bool) -> PosixFile:
            if path.name == self.victim and not path.is_symlink():
                path.replace(self.elsewhere / path.name)
                path.symlink_to(self.elsewhere / path.name)
            file: PosixFile = really(cls, path, **how)
            self.opened.append(path)
            return file

        monkeypatch.setattr(PosixFile, "open", classmethod(swapping))


@pytest.fixture
def swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Swapped:
    return Swapped(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("victim", "role", "look"),
    [
        ("base.vmdk", "parent", lambda path: open_chain(path)),
        ("base.vmdk", "parent", lambda path: open_chain(path, writable=True)),
        ("base.vmdk", "parent", lambda path: read_links(path)),
        ("base-flat.vmdk", "extent", lambda path: open_chain(path)),
    ],
)
def test_a_name_that_comes_to_lead_elsewhere(
    swapped: Swapped, victim: str, role: str, look: Callable[[Path], object]
) -> None:
    swapped.victim = victim
    with pytest.raises(CorruptChain) as caught:
        look(swapped.top)
    owner = swapped.top if role == "parent" else swapped.base
    assert (caught.value.path, caught.value.reason) == (
        owner,
        f"its {role} {swapped.elsewhere / victim} is outside its folder: allow {swapped.elsewhere} (--allow-dir) to "
        "follow it",
    )
    assert swapped.opened[-1].name == victim, "nothing more was opened by its word"
    with open_chain(swapped.top, trusted_dirs=[swapped.elsewhere, swapped.home]) as chain:
        assert chain.depth == 2


def test_nothing_is_read_of_it(swapped: Swapped) -> None:
    """Not even to see whether it is an image."""
    reads: list[int] = []

    class Watched(PosixFile):
        def read_at(self, offset: int, length: int) -> bytes:
            reads.append(offset)
            return super().read_at(offset, length)

    def opener(path: Path, writable: bool) -> BlockFile:
        if path.name != "base.vmdk":
            return open_posix(path, writable)
        path.unlink()
        path.symlink_to(swapped.elsewhere / "secret.vmdk")
        (swapped.elsewhere / "secret.vmdk").write_bytes(b"secret")
        return Watched.open(path, writable=writable)

    with pytest.raises(CorruptChain, match="outside its folder"):
        open_chain(swapped.top, opener=opener)
    assert not reads


def test_a_copied_chain_names_the_parent_that_lies_beside(tmp_path: Path) -> None:
    """Its absolute hint leads to the original; which of the two is meant only the user knows."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    create_image(old / "base.vmdk", MIB, durable=False)
    create_overlay(old / "top.vmdk", old / "base.vmdk", hint=str(old / "base.vmdk"), durable=False)
    new.mkdir()
    shutil.copy(old / "top.vmdk", new)
    outside = f"its parent {old}/base.vmdk is outside its folder: allow {old} (--allow-dir) to follow it"
    for look in (open_chain, read_links):
        with pytest.raises(CorruptChain) as caught:
            look(new / "top.vmdk")
        assert caught.value.reason == outside
    create_overlay(new / "base.vmdk", old / "base.vmdk", durable=False)
    with pytest.raises(CorruptChain, match=r"to follow it$"):
        open_chain(new / "base.vmdk")  # its own name is no advice
    shutil.copy(old / "base.vmdk", new)
    advice = f"image rebase -u -b base.vmdk {new}/top.vmdk"
    with pytest.raises(CorruptChain) as caught:
        open_chain(new / "top.vmdk")
    assert caught.value.reason == (
        f"{outside}; {new}/base.vmdk has its name: if that is the one, `{advice}` makes it the parent"
    )
    assert main(advice.split()) == 0
    with open_chain(new / "top.vmdk") as chain:
        assert chain.links[1].path == new / "base.vmdk"
    shutil.copy(old / "top.vmdk", new)
    (old / "base.vmdk").unlink()
    with open_chain(new / "top.vmdk") as chain:  # where the hint leads nowhere, its name is looked for beside
        assert chain.links[1].path == new / "base.vmdk"


def test_an_overlay_that_needs_a_word_to_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "home").mkdir()
    create_image(tmp_path / "pool/base.vmdk", MIB, durable=False)
    create_image(tmp_path / "home/base.vmdk", MIB, durable=False)
    top, base = tmp_path / "home/top.vmdk", tmp_path / "pool/base.vmdk"
    assert main(["image", "create", "-q", "-b", str(base), str(top)]) == 0
    assert capsys.readouterr().err == (
        f"qemu-vmdk-snap: warning: {base} is outside the folder of {top}: opening the overlay needs --allow-dir "
        f"{tmp_path}/pool\n"
    )
    assert main(["image", "info", "--backing-chain", str(top)]) != 0
    assert main(["image", "info", "--backing-chain", "--allow-dir", f"{tmp_path}/pool", str(top)]) == 0
    capsys.readouterr()
    assert main(["image", "create", "-q", "-b", "base.vmdk", str(tmp_path / "home/other.vmdk")]) == 0
    assert capsys.readouterr().err == ""


def test_an_image_in_use_can_be_read_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.vmdk"
    create_image(path, MIB, durable=False)
    told = f"qemu-vmdk-snap: {path}: failed to get the 'exclusive write' lock: is another process using the image?"
    with open_chain(path, writable=True):
        assert main(["image", "map", str(path)]) == 75
        assert capsys.readouterr().err == f"{told} (-U, --force-share, reads it anyway)\n"
        assert main(["image", "map", "-U", str(path)]) == 0
        for words in (["check", "-r", "all"], ["resize"]):  # nobody writes to it meanwhile
            assert main(["image", *words, str(path), *(["2M"] if words == ["resize"] else [])]) != 0
            assert "--force-share" not in capsys.readouterr().err


def test_links_that_lead_to_what_is_allowed_are_followed(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "home").mkdir()
    create_image(tmp_path / "pool/base.vmdk", MIB, durable=False)
    (tmp_path / "home/base.vmdk").symlink_to(tmp_path / "pool/base.vmdk")
    create_overlay(tmp_path / "home/top.vmdk", tmp_path / "home/base.vmdk", durable=False)
    (tmp_path / "alias").symlink_to(tmp_path / "home")
    for folder in ("home", "alias"):
        with open_chain(tmp_path / folder / "top.vmdk", trusted_dirs=[tmp_path / "pool"]) as chain:
            assert chain.depth == 2
        with pytest.raises(CorruptChain, match="outside its folder"):
            open_chain(tmp_path / folder / "top.vmdk")
