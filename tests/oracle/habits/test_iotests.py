"""Do QEMU's own tests of its vmdk driver pass with our `image` group in the place of qemu-img?

`VMDK_IOTESTS_EACH=1` runs all of them (two minutes), else three.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from tests.support import iotests

pytestmark = [
    pytest.mark.needs("qemu-img", "qemu-io", "qemu-system-x86_64"),
    pytest.mark.timeout(500),
]

DAILY: Final = ("104", "110", "126")
EACH: Final = (
    *("001", "002", "003", "004", "005", "008", "009", "010", "011", "012", "017", "018", "019", "020", "021", "027"),
    *("032", "033", "034", "037", "052", "059", "063", "069", "072", "104", "105", "110", "111", "126", "159", "170"),
    *("197", "215", "226", "251", "279"),
)
"""Those of QEMU 7.2 for vmdk that pass with its own qemu-img where no network, no FUSE and no root block device is."""

BY_CHOICE: Final = {
    "034": "our check finds the grains that QEMU leaks when it marks them as zeros",
    "251": "a raw image is never probed: `compare` takes -F raw",
    "059": "split images have extents of 2047 MiB; CIDs are shown as the descriptor has them; small errors are named",
}


@pytest.fixture(scope="module")
def tests() -> Path:
    found = iotests.source()
    if found is None:
        pytest.skip("the source package of this QEMU cannot be fetched here (apt-get source)")
    return found


def test_the_iotests_see_what_they_see_with_qemu_img(tests: Path, scratch: Path) -> None:
    each = os.environ.get("VMDK_IOTESTS_EACH")
    numbers = [number for number in (EACH if each else DAILY) if number not in BY_CHOICE]
    assert iotests.run(tests, numbers, scratch, shim=True) == {}


def test_a_difference_is_seen(tests: Path, scratch: Path) -> None:
    """The comparison is none that always succeeds: what was not run, or says something else, is told."""
    assert iotests.run(tests, ["no-such-test"], scratch, shim=True).keys() == {"no-such-test"}
    assert iotests.told("qemu-img: x\nimage: a") == iotests.told("qemu-vmdk-snap: other words\nimage: a")
    assert iotests.told("image: a") != iotests.told("image: b")
