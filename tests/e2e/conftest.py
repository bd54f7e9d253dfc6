"""What several files of guests share."""

from __future__ import annotations

import pytest

from qemu_vmdk_snap.harness import build_guest
from qemu_vmdk_snap.harness.linux.packages import BuildError


@pytest.fixture(scope="module")
def linux_is_made(pytestconfig: pytest.Config) -> None:
    """Make the Linux guest before any test's time runs."""
    try:
        build_guest()
    except BuildError as error:
        if pytestconfig.getoption("--require") == "none":
            pytest.skip(str(error))
        pytest.fail(f"required: {error}", pytrace=False)
