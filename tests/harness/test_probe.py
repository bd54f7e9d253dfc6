"""Is the probe what its source says, and does every damaged line show?"""

from __future__ import annotations

import importlib.util
import re
import zlib
from pathlib import Path

import numpy as np
import pytest

from qemu_vmdk_snap.errors import GuestError
from qemu_vmdk_snap.harness import disk_image, floppy_image, pattern
from qemu_vmdk_snap.harness.deadlines import VARIABLE, scaled
from qemu_vmdk_snap.harness.probe import Answer, command_line, parse_answer
from qemu_vmdk_snap.harness.session import ProbeSession

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.needs("nasm")
def test_the_shipped_probe_is_what_the_source_makes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("build", ROOT / "guests/probe/build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.assemble(tmp_path / "probe.bin")
    assert (tmp_path / "probe.bin").read_bytes() == disk_image()


def test_the_probe_fits_a_boot_sector_and_a_track() -> None:
    image = disk_image()
    assert image[510:512] == b"\x55\xaa"
    assert image[440:510] == bytes(70)  # where a partition table would be
    assert len(image) % 512 == 0
    assert len(image) <= 18 * 512
    assert floppy_image().startswith(image)
    assert len(floppy_image()) == 1474560


def test_lines_carry_their_sum() -> None:
    line = command_line("1f", "crc 0 10")
    assert line == b"1f crc 0 10 *%08x\n" % zlib.crc32(b"1f crc 0 10")


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b"01 ok 00ff", Answer("01", True, "00ff")),
        (b"01 ok", Answer("01", True, "")),
        (b"01 err bios 04", Answer("01", False, "bios 04")),
    ],
)
def test_answers(body: bytes, answer: Answer) -> None:
    whole = body + b" *%08x" % zlib.crc32(body)
    assert parse_answer(whole) == answer
    for i in range(len(whole)):
        assert parse_answer(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :]) is None, f"byte {i} damaged unnoticed"
        assert parse_answer(whole[:i] + whole[i + 1 :]) is None, f"byte {i} lost unnoticed"


@pytest.mark.parametrize("noise", [b"", b"*", b" *", b"SeaBIOS (version 1.16)", b"01 huh *00000000"])
def test_noise_is_no_answer(noise: bytes) -> None:
    assert parse_answer(noise) is None


def one_sector(seed: int, lba: int) -> bytes:
    """The pattern again, a word at a time as guests/probe/README.md has it."""
    mask = 0xFFFFFFFF
    state = (seed ^ (lba & mask) * 0x9E3779B1 ^ (lba >> 32) * 0x85EBCA77) & mask or 0x6D2B79F5
    words = []
    for _ in range(128):
        state ^= state << 13 & mask
        state ^= state >> 17
        state ^= state << 5 & mask
        words.append(state)
    return np.array(words, "<u4").tobytes()


@pytest.mark.parametrize(("seed", "lba"), [(0, 0), (1, 0), (0xFFFFFFFF, 12345), (7, 1 << 33 | 5)])
def test_the_pattern_is_the_documented_one(seed: int, lba: int) -> None:
    assert pattern(seed, lba, 3) == b"".join(one_sector(seed, lba + i) for i in range(3))


def test_deadlines_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert scaled(1.0) >= 1.0
    monkeypatch.setenv(VARIABLE, "3")
    assert scaled(1.0) >= 3.0


class Scripted:
    """A serial line that answers from a list, to inject what a real line does too rarely to test."""

    def __init__(self, answers: list[bytes]) -> None:
        self.answers = answers
        self.sent: list[bytes] = []
        self.match: re.Match[bytes]

    def send(self, data: bytes) -> int:
        self.sent.append(data)
        return len(data)

    def expect(self, wanted: bytes, *, timeout: float) -> int:
        found = re.match(wanted, self.answers.pop(0) + b"\r\n")
        assert found is not None
        self.match = found
        return 0

    def close(self) -> None:
        pass


def answer(body: str) -> bytes:
    return body.encode() + b" *%08x" % zlib.crc32(body.encode())


def test_a_damaged_answer_is_asked_for_again_and_an_old_one_is_passed_over() -> None:
    line = Scripted([answer("01 ok 00")[:-1] + b"z", answer("01 ok 00000011"), answer("02 ok 00000022")])
    assert ProbeSession(line, "t").crc(0, 512) == 0x22
    assert [sent[:10] for sent in line.sent] == [b"01 crc 0 1", b"02 crc 0 1"]


def test_a_line_that_damages_everything_is_given_up() -> None:
    line = Scripted([b"?"] * 9)
    with pytest.raises(GuestError, match="damaged 3 messages in a row"):
        ProbeSession(line, "t").size()


def test_an_error_of_the_guest_is_told() -> None:
    line = Scripted([answer("01 err bios 04")])
    with pytest.raises(GuestError) as caught:
        ProbeSession(line, "disk.vmdk").dump(512)
    assert str(caught.value) == "guest disk.vmdk: 'dump 1': bios 04"
