"""Is what was opened judged, and not only the name by which it was to be opened?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import CorruptChain, ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.links import read_links
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
