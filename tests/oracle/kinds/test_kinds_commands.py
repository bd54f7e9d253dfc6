"""Does every command that reads take every kind, and an overlay on it too?"""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap.cli.main import main
from tests.support.esxi import cowd, descriptor
from tests.support.kinds import Sample, samples

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return samples(tmp_path_factory.mktemp("kinds"))


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    status = main(["image", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.mark.parametrize("command", ["check", "info", "map", "measure"])
def test_a_command_takes_every_kind(command: str, disks: list[Sample], capsys: pytest.CaptureFixture[str]) -> None:
    answers = {sample.row: run(capsys, command, sample.path) for sample in disks}
    assert {row: answer for row, answer in answers.items() if answer[0]} == {}


def test_a_chain_on_every_kind_is_checked(disks: list[Sample], capsys: pytest.CaptureFixture[str]) -> None:
    for sample in disks:
        top = sample.path.with_name("top.vmdk")
        assert run(capsys, "create", "-q", "-b", sample.path.name, "-F", "vmdk", top) == (0, ""), sample.row
        status, said = run(capsys, "check", "--backing-chain", top)
        assert status == 0, f"{sample.row}: {said}"


def test_damage_in_cowd_is_found_under_either_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A COWD file may be named SPARSE as well, and may be a whole disk without a descriptor."""
    cowd(tmp_path / "d", 8192, {0: b"a" * 512})
    damaged = bytearray((tmp_path / "d").read_bytes())
    at = 512 * int.from_bytes(damaged[2048:2052], "little")
    for word in ("SPARSE", "VMFSSPARSE"):
        path = descriptor(tmp_path / f"{word}.vmdk", "vmfsSparse", [f'RW 8192 {word} "d"'])
        assert run(capsys, "check", path)[0] == 0
    damaged[at : at + 4] = (0x7FFFFFFF).to_bytes(4, "little")
    (tmp_path / "d").write_bytes(damaged)
    for name in ("SPARSE.vmdk", "VMFSSPARSE.vmdk", "d"):
        status, said = run(capsys, "check", tmp_path / name)
        assert status == 2, said
        assert "1 errors were found" in said
