"""Is the kernel inside a bzImage unpacked as it was, whatever compressed it, and only if QEMU could start it?"""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable

import pytest

from qemu_vmdk_snap.harness.linux.kernel import unpacked_kernel, without_signature


def elf(note: int = 18, name: bytes = b"Xen\0") -> bytes:
    """Return an ELF file with two notes, the second of this type and name, and data that compresses."""
    notes = (
        struct.pack("<III", 4, 8, 6) + b"Xen\0linux\0\0\0" + struct.pack("<III", len(name), 4, note) + name + bytes(4)
    )
    header = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    )
    return header + struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(notes), len(notes), 4) + notes + b"abcdef" * 9000


def lz4(data: bytes) -> bytes:
    """Return the data in two blocks: literals and a copy that overlaps itself, then literals alone."""
    tail = data.index(b"abcdef") + 6
    literals, copied = data[:tail], len(data) - tail - 40
    block = b"\xff" + long(len(literals) - 15) + literals + struct.pack("<H", 6) + long(copied - 19)
    block += b"\x50" + data[tail + copied : tail + copied + 5]
    rest = data[tail + copied + 5 :]
    last = b"\xf0" + long(len(rest) - 15) + rest
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(one)) + one for one in (block, last))


def long(count: int) -> bytes:
    return b"\xff" * (count // 255) + bytes([count % 255])


def bzimage(payload: bytes) -> bytes:
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, 16, len(payload) + 4)
    return bytes(setup) + bytes(16) + payload + b"size" + b"and what follows"


@pytest.mark.parametrize("compress", [lz4, gzip.compress, lzma.compress])
def test_what_was_compressed_comes_out(compress: Callable[[bytes], bytes]) -> None:
    assert unpacked_kernel(bzimage(compress(elf()))) == elf()


@pytest.mark.parametrize(
    "image",
    [
        b"",
        bytes(4096),
        bzimage(b"an unknown compression"),
        bzimage(gzip.compress(b"no ELF file")),
        bzimage(gzip.compress(elf(note=17))),
        bzimage(gzip.compress(elf(name=b"GNU\0"))),
        bzimage(gzip.compress(elf())[:50]),
        bzimage(lz4(elf())[:200]),
    ],
)
def test_what_qemu_cannot_start_is_left_packed(image: bytes) -> None:
    assert unpacked_kernel(image) is None


def test_a_module_loses_its_signature_and_nothing_else() -> None:
    signed = b"module" + b"signature" + bytes(8) + struct.pack(">I", 9) + b"~Module signature appended~\n"
    assert without_signature(signed) == b"module"
    assert without_signature(b"module") == b"module"
