"""The probe guest's own bytes and its lines; the protocol is in guests/probe/README.md."""

from __future__ import annotations

import zlib
from importlib import resources
from typing import Final, NamedTuple

from qemu_vmdk_snap.errors import GuestError
from qemu_vmdk_snap.units import SECTOR_SIZE

FLOPPY_BYTES: Final = 2880 * SECTOR_SIZE
PROTOCOL: Final = "1"
BAD_SUM: Final = "??"


class Answer(NamedTuple):
    """One line from the probe, its sum already checked."""

    sequence: str
    ok: bool
    text: str


class ProbeError(GuestError):
    """The probe runs, and reports that it cannot do the command; `answer` is its answer: `bios 0c`."""

    def __init__(self, guest: str, command: str, answer: str) -> None:
        super().__init__(guest, f"{command!r}: {answer}")
        self.args = (guest, command, answer)
        self.command, self.answer = command, answer


def disk_image() -> bytes:
    """Return the sectors that a disk must begin with for the probe to boot from it: 5 KiB."""
    return resources.files("qemu_vmdk_snap.harness").joinpath("probe.bin").read_bytes()


def floppy_image() -> bytes:
    """Return a 1.44 MB floppy that boots the probe."""
    return disk_image().ljust(FLOPPY_BYTES, b"\0")


def command_line(sequence: str, words: str) -> bytes:
    """Return the line that sends `words` under the two-character `sequence`."""
    body = f"{sequence} {words}".encode("ascii")
    return body + b" *%08x\n" % zlib.crc32(body)


def parse_answer(line: bytes) -> Answer | None:
    """Return what a line (without its end) says, or None when it is not whole: its sum does not fit."""
    body, star, digits = line.rpartition(b" *")
    if not star or len(digits) != 8 or digits != b"%08x" % zlib.crc32(body):
        return None
    words = body.decode("ascii", "replace").split(" ", 2)
    if len(words) < 2 or words[1] not in ("ok", "err"):
        return None
    return Answer(words[0], words[1] == "ok", words[2] if len(words) > 2 else "")
