"""Are grains the same with libdeflate and with zlib, whichever wrote them, and is it said when zlib served?"""

from __future__ import annotations

import random
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

from qemu_vmdk_snap import FormatError, open_chain
from qemu_vmdk_snap.domain.doctor import host
from qemu_vmdk_snap.vmdk.stream import compression

GRAIN = 65536
CONTENTS = (b"", b"a", bytes(GRAIN), b"text " * 9000, random.Random(1).randbytes(GRAIN))
DAMAGED = {
    "longer": zlib.compress(b"x" * (GRAIN + 1)),
    "cut short": zlib.compress(b"text" * 900)[:-3],
    "cut in the checksum": zlib.compress(b"x" * GRAIN)[:-1],
    "a wrong checksum": zlib.compress(b"x" * GRAIN)[:-1] + b"!",
    "not zlib": b"not zlib",
    "nothing": b"",
}
RUN = """
import sys
if {hidden}:
    sys.modules["deflate"] = None
from qemu_vmdk_snap.cli.main import main
sys.exit(main({words!r}))
"""
NOTE = (
    "qemu-vmdk-snap: note: compressed grains were deflated and inflated by zlib, 2 to 3 times slower than by "
    "libdeflate: pip install deflate\n"
)


@pytest.fixture(params=["libdeflate", "zlib"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the library of this name inflate and deflate."""
    name = str(request.param)
    monkeypatch.setattr(compression, "_slower", False)
    if name == "zlib":
        monkeypatch.setattr(compression, "libdeflate", None)
    else:
        assert compression.libdeflate is not None, "the extra `fast` is not installed"
    return name


def inflated(data: bytes) -> bytes:
    return compression.inflated(data, GRAIN, Path("/a.vmdk"), 512)


@pytest.mark.parametrize("content", CONTENTS, ids=len)
def test_what_one_writes_the_other_reads(content: bytes, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = bytes(compression.deflated(memoryview(content)))
    assert zlib.decompress(packed) == content
    assert inflated(packed) == content
    assert compression.was_slower() == (library == "zlib")
    monkeypatch.setattr(compression, "libdeflate", None)
    assert inflated(packed) == content
    assert inflated(packed + b"what follows in the record") == content


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_grain_is_refused_alike(data: bytes) -> None:
    with pytest.raises(FormatError) as error:
        inflated(data)
    rule = "must be a zlib stream of at most 65536 bytes"
    assert str(error.value) == f"/a.vmdk: byte 0x200: compressed grain = {data[:8]!r}: {rule}"


def run(*words: str | Path, hidden: bool) -> str:
    code = RUN.format(hidden=hidden, words=[str(word) for word in words])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stderr


def test_it_is_said_once_where_grains_were_compressed(tmp_path: Path) -> None:
    raw, stream, copy, back = (tmp_path / name for name in ("a.raw", "a.vmdk", "b.vmdk", "b.raw"))
    content = b"".join(random.Random(2).randbytes(GRAIN // 2) + bytes(GRAIN // 2) for _ in range(20))
    raw.write_bytes(content)
    to_stream = ("image", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw)
    assert run(*to_stream, stream, hidden=True) == NOTE
    assert run("image", "convert", "-q", "-O", "raw", stream, back, hidden=True) == ""
    assert back.read_bytes() == content
    with open_chain(stream) as chain:  # by libdeflate
        assert chain.read_at(0, len(content)) == content
    assert run("image", "check", "--output=json", stream, hidden=True) == NOTE
    assert run("image", "info", stream, hidden=True) == ""
    assert run(*to_stream, copy, hidden=False) == ""
    back.unlink()
    assert run("image", "convert", "-O", "raw", copy, back, hidden=True) == NOTE
    assert back.read_bytes() == content


@pytest.mark.parametrize(("there", "verdict"), [(True, "good"), (False, "note")])
def test_doctor_names_the_library(there: bool, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deflate", ModuleType("deflate") if there else None)
    check = host.check_compression()
    assert (check.subject, check.verdict) == ("compression", verdict)
    assert check.text.startswith("libdeflate" if there else "zlib, 2 to 3 times slower")
