"""Are raw images and block devices read as qemu-img reads them, and are the statuses of a comparison its own?"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, open_chain
from qemu_vmdk_snap.cli.main import main
from tests.support.qemu import content, qemu_img

pytestmark = pytest.mark.needs("qemu-img")

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        file.seek(MIB)
        file.write(b"a" * (200 << 10))
        file.seek(5 * MIB)
        file.write(bytes(range(256)) * 4096)
    return path


@pytest.fixture
def device(raw: Path) -> Iterator[Path]:
    made = subprocess.run(["losetup", "-f", "--show", str(raw)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


def image(*words: str | Path) -> int:
    return main(["image", *map(str, words)])


def without(answer: object, *keys: str) -> object:
    if isinstance(answer, list):
        return [without(one, *keys) for one in answer]
    assert isinstance(answer, dict)
    return {key: value for key, value in answer.items() if key not in keys}


def test_info_and_map_of_a_raw_image(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert image("info", "-f", "raw", "--output=json", raw) == 0
    mine, theirs = json.loads(capsys.readouterr().out), json.loads(qemu_img("info", "-f", "raw", "--output=json", raw))
    assert mine == without(theirs, "children")
    assert image("info", "-f", "raw", raw) == 0
    assert capsys.readouterr().out.splitlines() == qemu_img("info", "-f", "raw", raw).split("\nChild")[0].splitlines()
    assert image("map", "-f", "raw", "--output=json", raw) == 0
    mine = json.loads(capsys.readouterr().out)
    assert all(one["filename"] == str(raw) for one in mine)
    assert without(mine, "compressed", "filename") == without(
        json.loads(qemu_img("map", "-f", "raw", "--output=json", raw)), "compressed"
    )
    assert image("map", "-f", "raw", raw) == 0
    assert capsys.readouterr().out == qemu_img("map", "-f", "raw", raw)


@pytest.mark.needs("losetup")
def test_a_raw_block_device(tmp_path: Path, raw: Path, device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new.vmdk"
    for name in ("convert", "info", "map"):
        assert image(name, "-f", "raw", device, *([new] if name == "convert" else [])) == 63
        line = f"qemu-vmdk-snap: {device}: is a block device: opened only where that is allowed (--allow-devices)\n"
        assert capsys.readouterr().err == line
    assert not new.exists()
    for options in ([], ["-S", "4k"], ["-o", "subformat=monolithicFlat"], ["-o", "subformat=streamOptimized"]):
        assert image("convert", "--allow-devices", "-f", "raw", *options, device, new) == 0
        assert content(new) == raw.read_bytes()
        assert image("compare", "--allow-devices", "-f", "raw", device, new) == 0
        assert image("compare", "--allow-devices", "-F", "raw", new, device) == 0
        for file in tmp_path.glob("new*"):
            file.unlink()
    assert image("convert", "--allow-devices", "-f", "raw", "-O", "raw", device, tmp_path / "o.raw") == 0
    assert (tmp_path / "o.raw").read_bytes() == raw.read_bytes()
    capsys.readouterr()
    assert image("info", "--allow-devices", "-f", "raw", device) == 0
    assert f"virtual size: 8 MiB ({8 * MIB} bytes)" in capsys.readouterr().out
    assert image("map", "--allow-devices", "-f", "raw", device) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["0", "0x800000", "0", str(device)]
    assert image("measure", "--allow-devices", "-f", "raw", "-O", "raw", device) == 0


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "write"),
    [(8, 8, None), (8, 9, None), (9, 8, None), (8, 9, 8), (9, 8, 8), (8, 8, 3), (8, 9, 3), (9, 8, 3)],
)
def test_the_status_of_a_comparison(
    tmp_path: Path,
    first: int,
    second: int,
    write: int | None,
    strict: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """0 the same, 1 different; 2 where something is wrong, which a warning alone is not."""
    one, two = tmp_path / "one.vmdk", tmp_path / "two.vmdk"
    create_image(one, first * MIB, durable=False)
    create_image(two, second * MIB, durable=False)
    if write is not None:
        with open_chain(one if first > second else two, writable=True) as chain:
            chain.write_at(write * MIB, b"x" * 512)
    words = ["compare", *(["-s"] if strict else [])]
    theirs = subprocess.run(
        ["qemu-img", *words, "-f", "vmdk", "-F", "vmdk", str(one), str(two)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert image(*words, one, two) == theirs.returncode
    shown = capsys.readouterr()
    assert shown.err == ""
    mine = [line for line in shown.out.splitlines() if not line.startswith("Warning")]
    assert mine == [line for line in theirs.stdout.splitlines() if not line.startswith("Warning")]
    with one.open("ab") as file:
        file.write(b"\0")
    assert image(*words, one, two) == theirs.returncode
    assert re.search("warning: .*one.vmdk: its length", capsys.readouterr().err)
    assert image(*words, one, tmp_path / "missing") == 2
