"""Does a copy from every kind into every kind, and raw, read the same, and do holes stay holes?"""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, RunKind, convert, open_chain
from qemu_vmdk_snap.ops.make.layout import KINDS
from tests.support.kinds import GRAIN, HOLE, SIZE, Sample, samples
from tests.support.qemu import content, qemu_img

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return samples(tmp_path_factory.mktemp("kinds"))


def shown(sample: Sample) -> bytes:
    """Return what we read: zeros where the extent says that nobody may read it."""
    return sample.variants.get("zeros", sample.expected)


def hole_is_stored(path: Path) -> bool:
    """Return whether all of the disk's hole is stored data."""
    with open_chain(path) as chain:
        return all(run.kind is RunKind.DATA for run in chain.map(HOLE, 2 * GRAIN))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_into(kind: str, disks: list[Sample], tmp_path: Path) -> None:
    for number, sample in enumerate(disks):
        path = tmp_path / f"{number}.vmdk"
        with open_chain(sample.path) as chain:
            report = convert(chain, path, options=ImageOptions(subformat=kind), durable=False)
        assert content(path) == shown(sample), sample.row
        raw = path.with_name("raw")
        raw.write_bytes(shown(sample))
        assert "identical" in qemu_img("compare", "-f", "vmdk", "-F", "raw", path, raw), sample.row
        if not hole_is_stored(sample.path):
            # vmfs has its space reserved: whether that reads as a hole is the file system's affair.
            assert kind == "vmfs" or not hole_is_stored(path), sample.row
            assert report.data <= SIZE - 2 * GRAIN, sample.row


def test_every_kind_into_raw(disks: list[Sample], tmp_path: Path) -> None:
    for number, sample in enumerate(disks):
        path = tmp_path / f"{number}.raw"
        with open_chain(sample.path) as chain:
            convert(chain, path, output_format="raw", durable=False)
        assert path.read_bytes() == shown(sample), sample.row
        if not hole_is_stored(sample.path):
            assert path.stat().st_blocks * 512 <= SIZE - 2 * GRAIN + 65536, sample.row
