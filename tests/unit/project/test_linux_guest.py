"""What the builder of the Linux guest makes: archives that the kernel unpacks, modules in an order that loads."""

from __future__ import annotations

import lzma
import stat
from pathlib import Path

import pytest

from guests.linux import build
from qemu_vmdk_snap.harness.linux.cpio import read_cpio, write_cpio

FILE, FOLDER = stat.S_IFREG | 0o755, stat.S_IFDIR | 0o755


def test_an_archive_reads_back() -> None:
    entries = [("bin", FOLDER, b""), ("bin/a", FILE, b"12345"), ("b", FILE, b"")]
    archive = write_cpio(entries)
    assert list(read_cpio(archive)) == entries
    assert archive == write_cpio(entries)
    assert len(archive) % 4 == 0
    assert archive.startswith(b"07070100000001000041ED")


def test_an_archive_of_an_rpm_has_other_names() -> None:
    archive = write_cpio([("./usr/bin/a", FILE, b"1"), ("/usr/bin/b", FILE, b"2")])
    assert [name for name, _, _ in read_cpio(archive)] == ["usr/bin/a", "usr/bin/b"]


@pytest.mark.parametrize("length", [0, 60, 112, 120, 230])
def test_an_archive_that_ends_too_early(length: int) -> None:
    archive = write_cpio([("a", FILE, b"12345")])
    with pytest.raises(ValueError, match="cpio archive: "):
        list(read_cpio(archive[:length]))


def module(needs: str) -> bytes:
    return b"\x7fELF..license=GPL\0depends=" + needs.encode() + b"\0name=x\0"


def test_each_module_comes_after_what_it_needs() -> None:
    files = {
        "lib/modules/1/modules.builtin": b"kernel/fs/ext4/ext4.ko\n",
        "lib/modules/1/kernel/virtio_pci.ko": module("virtio_ring,virtio"),
        "lib/modules/1/kernel/virtio-ring.ko.xz": lzma.compress(module("virtio")),
        "lib/modules/1/kernel/virtio_blk.ko": module("virtio,virtio_ring"),
        "lib/modules/1/kernel/virtio_console.ko": module("virtio"),
        "lib/modules/1/kernel/virtio.ko": module(""),
        "lib/modules/1/kernel/floppy.ko": module(""),
    }
    found = build.load_order(files)
    assert [name for name, _ in found] == ["virtio", "virtio_ring", "virtio_pci", "virtio_blk", "virtio_console"]
    assert found[1][1] == module("virtio")
    del files["lib/modules/1/kernel/virtio.ko"]
    with pytest.raises(build.BuildError, match=r"the kernel has no virtio$"):
        build.load_order(files)


def test_without_a_package_manager_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="neither apt-get nor dnf"):
        build.build(tmp_path / "guest")
    assert list((tmp_path / "guest").iterdir()) == []
