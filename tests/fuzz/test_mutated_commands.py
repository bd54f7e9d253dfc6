"""Do whole commands on damaged images give our own errors and nothing else, in bounded time and memory?

One file of a chain of two is damaged (header, descriptor, directory, tables, markers, footer), and everything that a
user may do to find out what is left is done: info, check, convert, map, check -r, commit, apply, compact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from qemu_vmdk_snap import (
    FormatError,
    ImageOptions,
    apply_delta,
    check_image,
    commit,
    compact,
    confined,
    convert,
    create_image,
    create_overlay,
    image_info,
    make_delta,
    open_chain,
    repair,
)
from qemu_vmdk_snap.ops.check.repair import take_back
from tests.support.esxi import sesparse
from tests.support.fuzzing import bounded, cases, chooser, little_memory, mutated

SIZE: Final = 300_000 // 512 * 512
KINDS: Final = {
    "sparse": ("monolithicSparse", ("top.vmdk",)),
    "split": ("twoGbMaxExtentSparse", ("top-s001.vmdk", "top.vmdk")),
    "cowd": ("vmfsSparse", ("top-delta.vmdk", "top.vmdk")),
}


def chain_of(folder: Path, kind: str) -> None:
    """Make a base and an overlay, and beside them what the overlay holds as a delta of its own."""
    create_image(folder / "base.vmdk", SIZE, options=ImageOptions(grain_size=4096), durable=False)
    fill(folder, "base.vmdk", 40_000)
    options = ImageOptions(subformat=kind) if kind == "vmfsSparse" else ImageOptions(grain_size=4096, subformat=kind)
    create_overlay(folder / "top.vmdk", folder / "base.vmdk", options=options, durable=False)
    fill(folder, "top.vmdk", 60_000)
    with open_chain(folder / "top.vmdk") as chain:
        make_delta(chain, 1, folder / "stream.vmdk", durable=False)


def fill(folder: Path, name: str, step: int) -> None:
    with open_chain(folder / name, writable=True) as chain:
        for at in range(0, SIZE - 5000, step):
            chain.write_at(at, name.encode() * 500)


def use(folder: Path, name: str = "top.vmdk") -> list[Callable[[], object]]:
    """Return the commands, those that change something last."""
    path, find = folder / name, confined()

    def converted() -> None:
        with open_chain(path) as chain:
            convert(chain, folder / "copy.vmdk", durable=False)

    def mapped() -> None:
        with open_chain(path) as chain:
            for number, run in enumerate(chain.map(0, chain.capacity)):
                chain.read_at(run.offset, min(run.length, 4096))
                if number == 50:
                    break

    def written() -> None:
        with open_chain(path, writable=True) as chain:
            chain.write_at(chain.capacity // 2, b"w" * min(700, chain.capacity // 2))

    return [
        lambda: image_info(path),
        lambda: check_image(path, resolver=find),
        mapped,
        converted,
        lambda: compact(path),
        lambda: repair(path, resolver=find),
        lambda: take_back(path.with_name(f"{name}.undo")),
        written,
        lambda: commit(path),
        lambda: apply_delta(path, folder / "base.vmdk", force=True),
    ]


def run_all(folder: Path, originals: dict[str, bytes], damaged: str, data: bytes) -> None:
    """Do each command on the damaged image: what one of them left is put right before the next."""
    for number in range(len(use(folder))):
        for path in folder.iterdir():
            if path.name not in originals:
                path.unlink()
        for name, raw in originals.items():
            # A repair is followed by its taking back, and by a write, of what it left.
            if number not in (6, 7):
                (folder / name).write_bytes(data if name == damaged else raw)
        with bounded():
            use(folder)[number]()


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, (_, files) in KINDS.items() for file in files])
def test_commands_on_a_damaged_overlay(tmp_path: Path, kind: str, file: str) -> None:
    chain_of(tmp_path, KINDS[kind][0])
    originals = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    chance = chooser(f"{kind} {file}")
    with little_memory():
        for _ in cases(8):
            run_all(tmp_path, originals, file, mutated(originals[file], chance))


def test_commands_on_a_damaged_stream(tmp_path: Path) -> None:
    chain_of(tmp_path, "monolithicSparse")
    originals = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    chance = chooser("stream")
    with little_memory():
        for _ in cases(25):
            (tmp_path / "stream.vmdk").write_bytes(mutated(originals["stream.vmdk"], chance, head=70_000))
            for number in (0, 1, 2, 3, 9):
                (tmp_path / "base.vmdk").write_bytes(originals["base.vmdk"])
                with contextlib.suppress(FileNotFoundError):
                    (tmp_path / "copy.vmdk").unlink()
                with bounded():
                    use(tmp_path, "stream.vmdk")[number]()


def test_the_search_for_a_footer_gets_past_a_sector_that_only_begins_with_zeros(tmp_path: Path) -> None:
    chain_of(tmp_path, "monolithicSparse")
    raw = bytearray((tmp_path / "stream.vmdk").read_bytes())
    at = int.from_bytes(raw[64:72], "little") * 512
    raw[at : at + 16] = bytes(16)
    (tmp_path / "stream.vmdk").write_bytes(raw[:-2048])
    with pytest.raises(FormatError, match="needs a footer"):
        image_info(tmp_path / "stream.vmdk")


def test_commands_on_a_damaged_sesparse(tmp_path: Path) -> None:
    target = tmp_path / "top-sesparse.vmdk"
    sesparse(target, 9000, {0: b"a" * 10, 7: "zero", 1000: b"q" * 4096})
    text = 'version=1\nCID=12345678\nparentCID=ffffffff\ncreateType="seSparse"\nRW 9000 SESPARSE "top-sesparse.vmdk"\n'
    (tmp_path / "top.vmdk").write_text(f"# Disk DescriptorFile\n{text}")
    raw, chance = target.read_bytes(), chooser("sesparse")
    with little_memory():
        for _ in cases(25):
            target.write_bytes(mutated(raw, chance, head=10_000))
            (tmp_path / "copy.vmdk").unlink(missing_ok=True)
            for command in use(tmp_path)[:6]:
                with bounded():
                    command()
