"""A kernel under QEMU alone: the least that a script of QEMU and pexpect can boot, up to a line on the serial port."""

from __future__ import annotations

import stat
import struct
import time
from pathlib import Path
from typing import Final

import pexpect

from qemu_vmdk_snap.harness.linux.cpio import write_cpio

_AT: Final = 0x400000
_HEADERS: Final = 64 + 56
_SAYS: Final = b"ready\n"
_PAUSE: Final = bytes.fromhex("b822000000 0f05 ebf7")  # mov eax, 34 (pause); syscall; again
_WRITE: Final = bytes.fromhex("b801000000 bf01000000 488d35") + struct.pack("<i", 7 + len(_PAUSE))  # lea rsi, the line
_CODE: Final = _WRITE + bytes.fromhex("ba060000000f05") + _PAUSE + _SAYS  # mov edx, 6; syscall: write(1, line, 6)


def smallest_initramfs() -> bytes:
    """Return an archive with nothing but a first program, in 160 bytes, that writes `ready` and waits."""
    size = _HEADERS + len(_CODE)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _AT + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _AT, _AT, size, size, 4096)
    return write_cpio([("init", stat.S_IFREG | 0o755, header + segment + _CODE)])


def boot_bare(kernel: Path, initrd: Path, append: str, limit: float) -> float:
    """Return the seconds from the start of QEMU to the line; pexpect.TIMEOUT after `limit` of them."""
    started = time.monotonic()
    words = ["-nodefaults", "-display", "none", "-machine", "pc", "-accel", "tcg", "-m", "256", "-serial", "stdio"]
    words += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", append]
    guest = pexpect.spawn("qemu-system-x86_64", words, echo=False, timeout=limit)
    try:
        guest.expect(_SAYS.strip())
        return time.monotonic() - started
    finally:
        guest.close(force=True)
