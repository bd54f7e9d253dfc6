"""Do we still write the bytes that we wrote, and read what was written then?"""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap import check_image, confined, open_chain
from qemu_vmdk_snap.ops.make.layout import KINDS
from tests.golden.make import DATA, GRAIN, OVERLAYS, SIZE, SUMS, base_content, make, overlay_content, sums
from tests.support.qemu import content, qemu_content

BASES = [*KINDS, "zeroed"]


def test_every_kind_is_still_written_byte_for_byte(tmp_path: Path) -> None:
    """Where a change is meant, `python -m tests.golden.make` makes the files and the table anew."""
    make(tmp_path)
    assert sums(tmp_path).splitlines() == SUMS.read_text().splitlines()


def test_the_files_are_those_of_the_table() -> None:
    assert sums(DATA).splitlines() == SUMS.read_text().splitlines()


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("name", [*BASES, *(f"overlay-{kind}" for kind in OVERLAYS), "empty"])
def test_what_was_written_is_still_read(name: str, tmp_path: Path) -> None:
    path = DATA / f"{name}.vmdk"
    expected = {"empty": bytes(SIZE)}.get(name, overlay_content() if name.startswith("overlay-") else base_content())
    assert content(path) == expected
    assert qemu_content(path, tmp_path) == expected
    report = check_image(path, resolver=confined())
    assert (report.corruptions, report.leaks) == (0, 0), report.findings


def test_the_golden_files_show_what_they_are_meant_to() -> None:
    """Split in two files, an odd end, grains left out and copied up."""
    with open_chain(DATA / "twoGbMaxExtentSparse.vmdk") as chain:
        assert len(chain.links[0].extents) == 3
        assert chain.capacity % GRAIN == 512
    with open_chain(DATA / "overlay-monolithicSparse.vmdk") as chain:
        assert {run.depth for run in chain.map()} == {0, 1}
