"""Who writes, who reads: engine, QEMU or a guest, for each kind of image, controller and depth of the chain.

Each chain is written by one of them and read by all three; a guest's part is a real boot. Every day a few combinations
are tried, in which each kind, controller, writer and depth occurs; VMDK_MATRIX=all, or `tox -e matrix`, tries them all.
The table is printed at the end.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.harness import CONTROLLERS, ChainMaker, KnownChain, boot
from qemu_vmdk_snap.harness.chains import CREATABLE, STREAM, WRITERS, Writer

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-io")

DEPTHS = (1, 2, 5)
READERS = ("engine", "qemu", "guest")
ALL = os.environ.get("VMDK_MATRIX") == "all"


class Row(NamedTuple):
    """One chain: who writes it, what it is, and what a guest finds it on."""

    kind: str
    controller: str
    depth: int
    writer: Writer

    def __str__(self) -> str:
        return f"{self.kind}-{self.controller}-{self.depth}-{self.writer}"


def rows() -> list[Row]:
    """Return every row that there can be: a stream is written once, by the engine, and goes on in an overlay."""
    every = itertools.starmap(Row, itertools.product(CREATABLE, CONTROLLERS, DEPTHS, WRITERS))
    return [row for row in every if row.kind != STREAM or row.depth > 1 or row.writer == "engine"]


def selection() -> list[Row]:
    """Return rows in which every kind, controller, depth and writer occurs, and each kind with more than one writer."""
    if ALL:
        return rows()
    chosen: list[Row] = []
    controllers, depths, writers = itertools.cycle(CONTROLLERS), itertools.cycle(DEPTHS[1:]), itertools.cycle(WRITERS)
    for kind in CREATABLE:
        chosen.append(Row(kind, next(controllers), next(depths), next(writers)))
    chosen.append(Row("monolithicSparse", "ahci", 1, "guest"))
    return chosen


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[tuple[Row, str], str]]:
    """Collect what was found, and print it."""
    cells: dict[tuple[Row, str], str] = {}
    yield cells
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if terminal is None or capture is None:
        return
    with capture.global_and_fixture_disabled():
        for line in ("", *as_table(cells)):
            terminal.write_line(line)


def as_table(cells: dict[tuple[Row, str], str]) -> Iterator[str]:
    """Yield a line for each row, with a column for each reader."""
    yield f"{'kind':<22}{'controller':<13}{'depth':<7}{'written by':<12}" + "".join(f"{r:<9}" for r in READERS)
    for row in dict.fromkeys(row for row, _ in cells):
        found = "".join(f"{cells.get((row, reader), '-'):<9}" for reader in READERS)
        yield f"{row.kind:<22}{row.controller:<13}{row.depth:<7}{row.writer:<12}{found}"
    yield f"{sum(value == 'ok' for value in cells.values())} of {len(cells)} as written"


def written(folder: Path, row: Row) -> KnownChain:
    """Return the chain of a row; each link has data of its own, over and beside that of the one below."""
    chain = ChainMaker(folder).base("2M", kind=row.kind)
    for number in range(row.depth):
        if number:
            chain.snapshot()
        by: Writer = "engine" if row.kind == STREAM and not number else row.writer
        # A guest boots for each write: one of them in the topmost link stands for all.
        if by == "guest" and number < row.depth - 1:
            by = "qemu"
        offset = (64 << 10) + number * (192 << 10) - 512 * 5
        write(chain, offset, b"".join(b"%08d%08d" % (number, at) * 32 for at in range(17)), by, row.controller)
    return chain


def write(chain: KnownChain, offset: int, data: bytes, by: Writer, controller: str) -> None:
    if by != "guest":
        chain.write(offset, data, by=by)
        return
    with boot(chain, writable=True, controller=controller) as guest:
        guest.probe.write(offset, data)
        guest.power_off()
    chain.model.write(offset, data)


def read_by_engine(chain: KnownChain, _: Row, __: Path) -> None:
    with open_chain(chain.top) as opened:
        assert opened.read_at(0, opened.capacity) == chain.model.read(0, chain.model.capacity)


def read_by_qemu(chain: KnownChain, _: Row, folder: Path) -> None:
    raw = folder / "top.raw"
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", chain.top, raw], check=True)
    assert raw.read_bytes() == chain.model.read(0, chain.model.capacity)


def read_by_guest(chain: KnownChain, row: Row, _: Path) -> None:
    with boot(chain, controller=row.controller) as guest:
        guest.assert_reads()
        guest.power_off()


READ = {"engine": read_by_engine, "qemu": read_by_qemu, "guest": read_by_guest}


@pytest.mark.parametrize("row", selection(), ids=str)
def test_what_one_writes_the_others_read(tmp_path: Path, table: dict[tuple[Row, str], str], row: Row) -> None:
    chain = written(tmp_path, row)
    wrong = []
    for reader in READERS:
        try:
            READ[reader](chain, row, tmp_path)
        except AssertionError as error:
            wrong.append(f"{reader}: {error}")
        table[row, reader] = "wrong" if wrong and wrong[-1].startswith(reader) else "ok"
    assert not wrong


def test_a_wrong_cell_is_seen(tmp_path: Path) -> None:
    row = Row("monolithicSparse", "ahci", 2, "engine")
    chain = written(tmp_path, row)
    chain.model.write("1M", b"never written")
    for reader in READERS:
        with pytest.raises(AssertionError):
            READ[reader](chain, row, tmp_path)
    assert (
        "ahci         2      engine      ok       wrong    -"
        in list(as_table({(row, "engine"): "ok", (row, "qemu"): "wrong"}))[1]
    )


def test_the_daily_selection_has_something_of_everything() -> None:
    chosen = selection()
    for column, values in enumerate((CREATABLE, CONTROLLERS, DEPTHS, WRITERS)):
        assert {row[column] for row in chosen} == set(values)
    assert set(chosen) <= set(rows())
