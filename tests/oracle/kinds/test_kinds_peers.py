"""Do libvmdk and dissect.hypervisor read what we write, and do all of us read the files of others alike?"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vmdk_snap import FormatError, Unsupported, create_overlay, open_chain
from qemu_vmdk_snap.ops.copy.convert import convert
from qemu_vmdk_snap.ops.make.layout import KINDS
from tests.oracle.kinds.test_kinds import make, pattern
from tests.support.esxi import cowd, descriptor, sesparse
from tests.support.qemu import content, qemu_content, qemu_img

SIZE = 3 << 20  # dissect 3.21 fails at the end of a disk whose size is no multiple of 8 KiB
DIGESTS = {
    "plaso-image.vmdk": "854c3db1c4a07a241e2ed9fbd8892adf2adc662c7862a75deed26f3483f414c9",
    **dict.fromkeys(
        # One disk in three kinds.
        ["vmdk-rs-monolithicSparse.vmdk", "vmdk-rs-streamOptimized.vmdk", "twoGbMaxExtentSparse.vmdk"],
        "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727",
    ),
}

# Each in a process of its own: dissect leaves its files open.
READERS = {
    "dissect.hypervisor": """
from dissect.hypervisor.disk.vmdk import VMDK
disk = VMDK(Path(sys.argv[1]))
data = disk.read(disk.size)
""",
    "pyvmdk": """
import pyvmdk
disk = pyvmdk.handle()
disk.open(sys.argv[1])
disk.open_extent_data_files()
if len(sys.argv) > 2:
    parent = pyvmdk.handle()
    parent.open(sys.argv[2])
    parent.open_extent_data_files()
    disk.set_parent(parent)
size = disk.get_media_size()
data = b"".join(disk.read_buffer_at_offset(min(1 << 20, size - at), at) for at in range(0, size, 1 << 20))
""",
}


def digest_by(reader: str, *paths: Path) -> str:
    """Return the SHA-256 of the disk as a peer reads it; the parent's path may follow the image's."""
    code = f"import hashlib, sys\nfrom pathlib import Path\n{READERS[reader]}\nprint(hashlib.sha256(data).hexdigest())"
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"refused: {done.stderr.strip().splitlines()[-1]}"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.needs("libvmdk-python", "dissect.hypervisor")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_peers_read_what_we_write(tmp_path: Path, kind: str, reader: str) -> None:
    path = make(tmp_path, kind, SIZE)
    assert digest_by(reader, path) == digest(pattern(SIZE))


@pytest.mark.needs("libvmdk-python", "dissect.hypervisor")
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.may_have_parent])
@pytest.mark.parametrize("reader", READERS)
def test_peers_read_our_overlays(tmp_path: Path, kind: str, reader: str) -> None:
    base, top = make(tmp_path, "monolithicSparse", SIZE), tmp_path / "top.vmdk"
    create_overlay(top, base, kind=kind, durable=False)
    with open_chain(top, writable=True) as chain:
        chain.write_at(100_000, b"over" * 30_000)
    model = bytearray(pattern(SIZE))
    model[100_000:220_000] = b"over" * 30_000
    assert digest_by(reader, top, base) == digest(bytes(model))


@pytest.mark.needs("libvmdk-python", "dissect.hypervisor")
@pytest.mark.parametrize("reader", READERS)
def test_peers_read_esxi_kinds_as_we_do(tmp_path: Path, reader: str) -> None:
    cowd(tmp_path / "b-delta.vmdk", 8192, {0: b"a" * 512, 5000: b"b" * 512})
    delta = descriptor(tmp_path / "b.vmdk", "vmfsSparse", ['RW 8192 VMFSSPARSE "b-delta.vmdk"'])
    assert digest_by(reader, delta) == digest(content(delta))
    sesparse(tmp_path / "a-sesparse.vmdk", 8192, {0: b"a" * 4096, 1: b"b" * 4096, 700: b"c" * 4096})
    se = descriptor(tmp_path / "a.vmdk", "seSparse", ['RW 8192 SESPARSE "a-sesparse.vmdk"'])
    answer = digest_by(reader, se)
    assert "unsupported extent type" in answer if reader == "pyvmdk" else answer == digest(content(se))


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("name", DIGESTS)
def test_samples_read_as_they_are_known(name: str, tmp_path: Path) -> None:
    path = sample(name)
    data = content(path)
    assert digest(data) == DIGESTS[name]
    assert data == qemu_content(path, tmp_path)
    with open_chain(path) as chain:
        assert sum(run.length for run in chain.map()) == len(data)
        assert chain.links[0].notes == []


@pytest.mark.needs("qemu-img")
def test_a_large_sample_compares_equal(tmp_path: Path) -> None:
    path = sample("iotest-version3.vmdk")
    with open_chain(path) as chain:
        assert chain.capacity == 16 << 30
        convert(chain, tmp_path / "copy.vmdk", durable=False)
    assert "identical" in qemu_img("compare", path, tmp_path / "copy.vmdk")


def test_bad_samples_are_refused() -> None:
    with pytest.raises(FormatError, match="newline_probe"):
        open_chain(sample("afl9.vmdk"))
    with pytest.raises(Unsupported, match="has no descriptor"):
        open_chain(sample("twoGbMaxExtentSparse-s001.vmdk"))


def sample(name: str) -> Path:
    if not os.environ.get("VMDK_SAMPLES"):
        pytest.skip("VMDK_SAMPLES does not name the folder with files written by others")
    return Path(os.environ["VMDK_SAMPLES"]) / name
