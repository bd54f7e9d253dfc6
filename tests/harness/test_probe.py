"""Is the probe what its source says, and does every damaged line show?"""

from __future__ import annotations

import importlib.util
import itertools
import pickle
import re
import time
import zlib
from pathlib import Path

import numpy as np
import pexpect
import pytest

from qemu_vmdk_snap import Run, RunKind, create_image
from qemu_vmdk_snap.errors import FormatError, GuestError, InvalidRequest, PluginError
from qemu_vmdk_snap.harness import disk_image, floppy_image, pattern
from qemu_vmdk_snap.harness.deadlines import VARIABLE, scaled
from qemu_vmdk_snap.harness.known.raw import RawReference, is_raw
from qemu_vmdk_snap.harness.machine import boot
from qemu_vmdk_snap.harness.probe import Answer, command_line, parse_answer
from qemu_vmdk_snap.harness.session import ProbeError, ProbeSession
from qemu_vmdk_snap.harness.verify import BLOCK, MAX_SAMPLED_HOLES, PIECE, SAMPLE, Piece, plan, verify_image

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
    assert pattern(seed, lba * 512, 3 * 512) == b"".join(one_sector(seed, lba + i) for i in range(3))


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 3), (511, 1)])
def test_the_pattern_is_of_whole_sectors_in_bytes(offset: int, length: int) -> None:
    with pytest.raises(InvalidRequest, match="are not whole sectors of 512"):
        pattern(1, offset, length)


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


@pytest.mark.parametrize("end", [ConnectionResetError(104, "reset"), pexpect.EOF("end"), BrokenPipeError(32, "pipe")])
def test_a_machine_that_is_gone_is_told_however_its_line_ends(end: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> int:
        raise end

    line = Scripted([])
    monkeypatch.setattr(line, "send" if isinstance(end, BrokenPipeError) else "expect", gone)
    with pytest.raises(GuestError, match=r"QEMU ended with -9: it said nothing$"):
        ProbeSession(line, "t", lambda: "QEMU ended with -9: it said nothing").size()


def test_a_guest_that_is_stopped_before_its_first_word_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is asked for its greeting ever again, and each such wait is shorter than a guest may be stopped."""
    now = 0.0

    def silent(*_: object, timeout: float) -> int:
        nonlocal now
        now += timeout
        raise pexpect.TIMEOUT("timeout")

    line = Scripted([])
    monkeypatch.setattr(line, "expect", silent)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with pytest.raises(GuestError, match=r"waiting for the probe's first line: the domain is paused$"):
        ProbeSession(line, "t", stopped=lambda: "the domain is paused").wait_for_boot()
    now = 0.0
    states = itertools.cycle(["the domain is paused", None])
    with pytest.raises(GuestError, match=r"waiting for the probe's first line: no answer in time$"):
        ProbeSession(line, "t", stopped=lambda: next(states)).wait_for_boot()


def test_an_error_of_the_guest_is_told() -> None:
    line = Scripted([answer("01 err bios 04")])
    with pytest.raises(ProbeError) as caught:
        ProbeSession(line, "disk.vmdk").dump(512)
    assert str(caught.value) == "guest disk.vmdk: 'dump 1': bios 04"
    assert (caught.value.command, caught.value.answer) == ("dump 1", "bios 04")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_offsets_must_be_whole_sectors() -> None:
    line = Scripted([])
    with pytest.raises(ValueError, match="513 is not a whole number of sectors"):
        ProbeSession(line, "t").crc(513, 512)
    assert not line.sent


# ---- machines, before there is one -----------------------------------------------------------------------------------


def test_an_unknown_controller_is_refused() -> None:
    with (
        pytest.raises(InvalidRequest, match=r"^controller: 'floppy' is not one of ide, ahci, "),
        boot("d.vmdk", controller="floppy"),
    ):
        pass


def test_without_qemu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(PluginError, match=r"is not installed \(Debian: qemu-system-x86"),
        boot("d.vmdk", accelerator="tcg"),
    ):
        pass


# ---- what a verification looks at ------------------------------------------------------------------------------------


def run_of(kind: RunKind, offset: int, length: int) -> Run:
    return Run(offset, length, kind, 0, Path("d.vmdk") if kind is RunKind.DATA else None, None, False)


def test_every_stored_byte_is_planned() -> None:
    planned = plan(iter([run_of(RunKind.DATA, 512, 3 * PIECE + 1024)]), 0)
    assert planned.pieces == [
        Piece(512, PIECE, "data"),
        Piece(512 + PIECE, PIECE, "data"),
        Piece(512 + 2 * PIECE, PIECE, "data"),
        Piece(512 + 3 * PIECE, 1024, "data"),
    ]


@pytest.mark.parametrize("samples", [0, 1, 8])
@pytest.mark.parametrize("kind", [RunKind.HOLE, RunKind.ZERO])
def test_a_large_hole_is_sampled_at_its_ends_and_between(samples: int, kind: RunKind) -> None:
    offset, length = 512 * 7, (1 << 40) + 512
    pieces = plan(iter([run_of(kind, offset, length)]), samples).pieces
    assert len(pieces) == samples + 2
    assert pieces[0].offset == offset
    assert pieces[-1].offset + pieces[-1].length == offset + length
    assert all(p.length == SAMPLE and p.offset % 512 == 0 and p.kind == kind.name.lower() for p in pieces)
    assert plan(iter([run_of(kind, offset, length)]), samples).pieces == pieces


def test_a_small_hole_is_read_whole() -> None:
    pieces = plan(iter([run_of(RunKind.HOLE, 0, 10 * SAMPLE)]), 8).pieces
    assert sum(piece.length for piece in pieces) == 10 * SAMPLE


def test_holes_that_are_left_out_are_counted() -> None:
    runs = [run_of(RunKind.HOLE, i * 1024, 512) for i in range(MAX_SAMPLED_HOLES + 3)]
    planned = plan(iter(runs), 8)
    assert (len(planned.pieces), planned.holes_left_out) == (MAX_SAMPLED_HOLES, 3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 2, "capacity": 512, "block": 65536, "pieces": []}',
        '{"version": 1, "capacity": 512, "block": 512, "pieces": []}',
        '{"version": 1, "capacity": 512, "block": 65536, "pieces": [[0, 512, "data", "0"]]}',
        '{"version": 1, "capacity": 512, "block": 65536, "pieces": [[1, 512, "data", "0", "00000000"]]}',
        '{"version": 1, "capacity": 512, "block": 65536, "pieces": [[0, 512, "data", "0", "0000000000000000"]]}',
        '{"version": 1, "capacity": 512, "block": 65536, "pieces": [[0, 512, "data", "0", "0000000x"]]}',
    ],
)
def test_a_file_that_is_no_record_is_refused_before_anything_else(tmp_path: Path, text: str) -> None:
    record = tmp_path / "record.json"
    record.write_text(text)
    with pytest.raises(FormatError, match=r"record\.json: .*must be what `guest verify --record` writes"):
        verify_image(tmp_path / "missing.vmdk", against=record)


@pytest.mark.parametrize("kind", ["monolithicSparse", "streamOptimized", "vmfsSparse", "monolithicFlat"])
def test_a_vmdk_image_is_not_taken_as_raw(tmp_path: Path, kind: str) -> None:
    create_image(tmp_path / "a.vmdk", 1 << 20, kind=kind, durable=False)
    for image in tmp_path.iterdir():
        if image.stem.endswith("-flat"):
            assert is_raw(image)
            continue
        with pytest.raises(InvalidRequest, match=rf"{image}: is a VMDK image, not a raw one: .* -O raw"):
            verify_image(tmp_path / "missing.vmdk", against=image)


def test_a_raw_image_that_is_cut_inside_a_sector_is_refused_before_a_guest_boots(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vmdk", 1 << 20, durable=False)
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(1000000))
    with pytest.raises(FormatError) as caught:
        verify_image(tmp_path / "a.vmdk", against=raw)
    assert str(caught.value) == f"{raw}: byte 0xf4240: length = 1000000: a raw image has the 1048576 bytes of the disk"
    reference = RawReference(raw)
    reference.check_length(1000448)  # the disk that `convert` makes of it: the last sector is filled up
    reference.close()


def test_a_record_has_a_sum_for_each_grain_of_the_usual_size() -> None:
    assert BLOCK == 64 * 1024
    assert PIECE % BLOCK == 0
