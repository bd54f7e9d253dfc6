"""A tree of images and what each of them must read, for tests of operations that change chains."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

from qemu_vmdk_snap import ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image


class Tree:
    """Images in one folder. `model` has the bytes that a guest must read on each; `parents` who stands on whom."""

    def __init__(self, folder: Path, size: int, *, seed: int = 0) -> None:
        self.folder, self.size = folder, size
        self.model: dict[str, bytes] = {}
        self.parents: dict[str, str | None] = {}
        self.random = random.Random(seed)
        self._made = 0

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.vmdk"

    def base(self, *, grain: int = 65536, zeroed: bool = False) -> str:
        name = self._name()
        options = ImageOptions(grain_size=grain, zeroed_grain=zeroed)
        create_image(self.path(name), self.size, options=options, durable=False)
        self.model[name], self.parents[name] = bytes(self.size), None
        return name

    def overlay(self, parent: str, *, grain: int | None = None, zeroed: bool = False) -> str:
        name = self._name()
        options = None if grain is None else ImageOptions(grain_size=grain, zeroed_grain=zeroed)
        create_overlay(self.path(name), self.path(parent), options=options, durable=False)
        self.model[name], self.parents[name] = self.model[parent], parent
        return name

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write to an image that has no child."""
        assert not self.children(name), "a parent is never written"
        with open_chain(self.path(name), writable=True) as chain:
            chain.write_at(offset, data)
        old = self.model[name]
        self.model[name] = old[:offset] + data + old[offset + len(data) :]

    def scribble(self, name: str, times: int = 6, longest: int = 150_000) -> None:
        """Write some random pieces: whole grains, parts, zeros."""
        for _ in range(times):
            length = self.random.randint(1, min(longest, self.size))
            offset = self.random.randint(0, self.size - length)
            data = bytes(length) if self.random.random() < 0.2 else self.random.randbytes(length)
            self.write(name, offset, data)

    def children(self, name: str) -> list[str]:
        return [child for child, parent in self.parents.items() if parent == name]

    def forget(self, name: str) -> None:
        del self.model[name], self.parents[name]

    def read(self, name: str) -> bytes:
        with open_chain(self.path(name)) as chain:
            return chain.read_at(0, chain.capacity)

    def verify(self, *, leaks: bool = False) -> None:
        """Assert that every image reads what it must, that checks are clean, and that nothing else is in the folder."""
        for name in self.model:
            assert self.read(name) == self.model[name], f"{name} does not read what it read"
            report = check_image(self.path(name), resolver=confined())
            assert report.corruptions == 0, [str(finding) for finding in report.findings]
            assert leaks or report.leaks == 0, [str(finding) for finding in report.findings]
        assert self.files() == {f"{name}.vmdk" for name in self.model}

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def _name(self) -> str:
        self._made += 1
        return f"image-{self._made}"


def line(tree: Tree, links: int, **options: object) -> list[str]:
    """Return the names of a chain of so many links, base first, each scribbled on."""
    make: Callable[..., str] = tree.base
    names = [make(**_only(options, "grain", "zeroed"))]
    tree.scribble(names[0], 12)
    for _ in range(links - 1):
        names.append(tree.overlay(names[-1]))
        tree.scribble(names[-1])
    return names


def _only(options: Mapping[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in options.items() if key in keys}
