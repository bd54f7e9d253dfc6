"""Chains whose content is known: each call makes or writes the image, and writes the same into a model beside it."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

from qemu_vmdk_snap import ImageOptions, InvalidRequest, PluginError, convert, create_image, create_overlay, open_chain
from qemu_vmdk_snap.harness.known.content import Content, Size, in_bytes
from qemu_vmdk_snap.harness.seeded import pattern

__tracebackhide__ = True

Writer = Literal["engine", "qemu", "guest"]
WRITERS: Final[tuple[Writer, ...]] = ("engine", "qemu", "guest")
STREAM: Final = "streamOptimized"
CREATABLE: Final = (
    *("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"),
    *("streamOptimized", "vmfs", "vmfsThin", "vmfsSparse"),
)
"""Every kind of image that a chain can begin with."""


class KnownLink(NamedTuple):
    """One image of a chain, and what a guest should read from it."""

    path: Path
    model: Content


class KnownChain:
    """A chain of VMDK images in one folder, with a model of each link; offsets and sizes are bytes, or text: `"1M"`.

    Every method returns the chain, so that calls follow one another.
    """

    def __init__(
        self, folder: Path, size: Size, *, kind: str | None = None, options: ImageOptions | None = None
    ) -> None:
        """Make the base, `base.vmdk`, in `folder`, which is made if need be.

        Raises:
            InvalidRequest, Unsupported, FileExistsError: see `create_image`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        path = folder / "base.vmdk"
        self.links: list[KnownLink] = [KnownLink(path, Content(size))]
        """All links, the base first."""
        # A stream cannot be written twice: what is to be in it is gathered in another image.
        self._gathered = folder / ".base.building.vmdk" if kind == STREAM else None
        create_image(
            self._gathered or path,
            self.model.capacity,
            kind=None if kind == STREAM else kind,
            options=options,
            durable=False,
        )

    @property
    def top(self) -> Path:
        """The image of the topmost link."""
        self._finish_stream()
        return self.links[-1].path

    @property
    def model(self) -> Content:
        """What a guest should read from the topmost link."""
        return self.links[-1].model

    @property
    def depth(self) -> int:
        """The number of links."""
        return len(self.links)

    def __fspath__(self) -> str:
        """Return the path of the topmost link: a chain stands for it wherever a path is wanted."""
        return str(self.top)

    def write(self, offset: Size, data: bytes, *, by: Writer = "engine") -> Self:
        """Write `data` at guest byte `offset` into the topmost link: by the engine, by qemu-io, or by a guest.

        Raises:
            InvalidRequest: that is not inside the disk; or, of a guest and of qemu-io, no whole sectors.
            PluginError, GuestError: QEMU or the guest failed.
        """
        at = in_bytes(offset)
        after = self.model.copy()
        after.write(at, data)
        _WRITE[by](self._gathered or self.top, at, data)
        self.links[-1] = KnownLink(self.links[-1].path, after)
        return self

    def pattern(self, seed: int, offset: Size, length: Size, *, by: Writer = "engine") -> Self:
        """Write the pattern of `seed` over `length` bytes at `offset`: each sector contains its place and its seed."""
        at = in_bytes(offset)
        return self.write(at, pattern(seed, at, in_bytes(length)), by=by)

    def snapshot(self, name: str | None = None, *, kind: str | None = None) -> Self:
        """Freeze the topmost link: continue in a new overlay, `NAME.vmdk` (`1.vmdk`, `2.vmdk`, ... without a name).

        Raises:
            InvalidRequest, FileExistsError: see `create_overlay`.
        """
        path = self.folder / f"{name or self.depth}.vmdk"
        create_overlay(path, self.top, kind=kind, durable=False)
        self.links.append(KnownLink(path, self.model.copy()))
        return self

    def at(self, link: int) -> KnownLink:
        """Return a link by its number, the base is 0, and the topmost -1."""
        self._finish_stream()
        return self.links[link]

    def _finish_stream(self) -> None:
        if self._gathered is None:
            return
        with open_chain(self._gathered) as chain:
            convert(chain, self.links[0].path, options=ImageOptions(subformat=STREAM), durable=False)
        self._gathered.unlink()
        self._gathered = None


class ChainMaker:
    """Makes chains of known content, each in a folder of its own; `kind` and `depth` where a call does not say."""

    def __init__(self, folder: Path, *, kind: str | None = None, depth: int = 1) -> None:
        self._folder, self._kind, self._depth = folder, kind, depth

    def base(self, size: Size = "64M", *, kind: str | None = None, options: ImageOptions | None = None) -> KnownChain:
        """Return a new chain of one link: of any kind that can be created, monolithicSparse without a name."""
        names = (self._folder / f"chain{number}" for number in itertools.count(1))
        folder = next(folder for folder in names if not folder.exists())
        return KnownChain(folder, size, kind=kind or self._kind, options=options)

    def of_depth(self, depth: int | None = None, size: Size = "64M", *, kind: str | None = None) -> KnownChain:
        """Return a chain of `depth` links, each with data of its own that shows through the next ones.

        Raises:
            InvalidRequest: `depth` is below 1, or the disk is smaller than 1 MiB.
        """
        depth = self._depth if depth is None else depth
        if depth < 1:
            raise InvalidRequest("depth", f"{depth} is not a number of links")
        chain = self.base(size, kind=kind)
        step = chain.model.capacity // (depth + 1) // 4096 * 4096
        if step < 8192:
            raise InvalidRequest("size", f"{chain.model.capacity} bytes are too few for {depth} links")
        for number in range(depth):
            if number:
                chain.snapshot()
            length = min(step, 96 << 10)
            chain.pattern(number + 1, number * step, length)
            chain.pattern(number + 1, step * depth, 4096)  # each over the one below
        return chain


def _write_by_engine(image: Path, offset: int, data: bytes) -> None:
    with open_chain(image, writable=True) as chain:
        chain.write_at(offset, data)


def _write_by_qemu(image: Path, offset: int, data: bytes) -> None:
    executable = shutil.which("qemu-io")
    if executable is None:
        raise PluginError("qemu-io", "is not installed (Debian: qemu-utils, Fedora: qemu-img)")
    if offset % 512 or len(data) % 512:
        raise InvalidRequest("qemu-io", f"bytes {offset} to {offset + len(data)} are not whole sectors of 512")
    with tempfile.NamedTemporaryFile(prefix="qemu-vmdk-snap-", suffix=".bin") as file:
        file.write(data)
        file.flush()
        words = [executable, "-f", "vmdk", "-c", f"write -s {file.name} {offset} {len(data)}", str(image)]
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    if done.returncode or "wrote" not in done.stdout:
        raise PluginError("qemu-io", said[-1] if said else f"ended with {done.returncode}")


def _write_by_guest(image: Path, offset: int, data: bytes) -> None:
    from qemu_vmdk_snap.harness.machine import boot  # chains alone need neither QEMU nor pexpect

    with boot(image, writable=True) as guest:
        guest.probe.write(offset, data)
        guest.power_off()


_WRITE: Final[dict[Writer, Callable[[Path, int, bytes], None]]] = {
    "engine": _write_by_engine,
    "qemu": _write_by_qemu,
    "guest": _write_by_guest,
}
