"""Is what the guest commands print as JSON as documented?"""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image
from qemu_vmdk_snap.cli.main import main
from tests.support.schemas import check

pytestmark = pytest.mark.needs("qemu-system-x86_64")


def test_the_answers_are_as_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "a.vmdk"
    create_image(image, 1 << 20, durable=False)
    assert main(["guest", "verify", "--output=json", str(image)]) == 0
    assert check("guest verify", capsys.readouterr().out)["identical"] is True
    assert main(["guest", "boot", "--output=json", str(image), "size"]) == 0
    assert check("guest boot", capsys.readouterr().out)["virtual-size"] == 1 << 20
