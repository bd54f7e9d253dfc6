"""Make the Linux guest of the distribution's packages, once, into a cache; what is in it is known by its content.

kernel       vmlinuz, and vmlinux, which is unpacked; the modules for controllers and file systems, without signatures
busybox      static, one executable
tools        mke2fs, e2fsck, mkfs.xfs, xfs_repair, mkfs.fat, fsck.fat, with their libraries
init, need   of this folder, and `load`, which writes stamps
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Final, Literal, NamedTuple

from qemu_vmdk_snap.harness.accelerator import cache_folder
from qemu_vmdk_snap.harness.linux.cpio import write_cpio
from qemu_vmdk_snap.harness.linux.kernel import unpacked_kernel, without_signature
from qemu_vmdk_snap.harness.linux.modules import libraries_for, load_order, one
from qemu_vmdk_snap.harness.linux.packages import BuildError, Files, download, read_package

Kernel = Literal["cloud", "generic"]

_PACKAGES: Final = ("busybox-static", "e2fsprogs", "xfsprogs", "dosfstools")
_TOOLS: Final = ("mke2fs", "e2fsck", "mkfs.xfs", "xfs_repair", "mkfs.fat", "fsck.fat")
_SCRIPTS: Final = ("init", "need", "load")
_FOLDERS: Final = ("bin", "dev", "etc", "lib", "lib64", "mnt", "modules", "proc", "run", "sys", "tmp", "tools")
_FILES: Final = ("vmlinuz", "vmlinux", "initramfs.cpio")
_LOADER: Final = "ld-linux-x86-64.so.2"
_SOURCES: Final = ("build.py", "kernel.py", "modules.py", "cpio.py", *_SCRIPTS)

GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "base": ("virtio_pci", "virtio_console"),
    "virtio-blk": ("virtio_blk",),
    "virtio-scsi": ("virtio_scsi", "sd_mod"),
    "pvscsi": ("vmw_pvscsi", "sd_mod"),
    "nvme": ("nvme",),
    "ide": ("ata_piix", "sd_mod"),
    "ahci": ("ahci", "sd_mod"),
    "ext4": ("crc32c_generic", "ext4"),  # which asks for it by name alone, at the mount
    "xfs": ("crc32c_generic", "xfs"),
    "vfat": ("vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8"),
}
"""The modules for each controller and file system."""

GENERIC: Final = frozenset({"ahci"})
"""Controllers that a kernel made for clouds has no driver for."""


class Guest(NamedTuple):
    """What QEMU's `-kernel` and `-initrd` are given."""

    kernel: Path
    """`vmlinux` where the distribution's kernel can be unpacked here and QEMU can start it so, else `vmlinuz`."""
    initrd: Path
    key: str
    """SHA-256 over both and the names of the packages."""


def build_guest(kernel: Kernel = "cloud", *, anew: bool = False, folder: Path | None = None) -> Guest:
    """Return the guest of the cache, which is made first where there is none of these sources, or it is not whole.

    `anew` asks the distribution for newer packages. The cache is `~/.cache/qemu-vmdk-snap/linux`, or `folder`.

    Raises:
        BuildError: the packages cannot be had, or are not as expected.
        PluginError: there is no place for a cache.
    """
    folder = folder or cache_folder() / "linux"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror}") from None
    pointer = folder / f"{kernel}-{_sources()[:16]}"
    with _locked(folder):
        if not anew and (found := _known(folder, pointer)) is not None:
            return found
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            key = _make(Path(scratch), kernel)
            target = folder / key
            if not target.exists():
                target.mkdir()
                for name in (*_FILES, "manifest.json"):
                    with suppress(FileNotFoundError):
                        shutil.move(Path(scratch) / name, target)
        pointer.write_text(key)
        found = _known(folder, pointer)
        assert found is not None, "what was just made"
        return found


def _known(folder: Path, pointer: Path) -> Guest | None:
    """Return what the pointer names, if it is whole: its content has the checksums that it is called by."""
    try:
        key = pointer.read_text().strip()
        home = folder / key
        manifest = json.loads((home / "manifest.json").read_text())
        sums = {name: _sum_of(home / name) for name in _FILES if (home / name).exists()}
    except (OSError, ValueError):
        return None
    if manifest.get("files") == sums and _key(manifest) == key:
        return Guest(home / ("vmlinux" if "vmlinux" in sums else "vmlinuz"), home / "initramfs.cpio", key)
    shutil.rmtree(home, ignore_errors=True)
    return None


def _sum_of(path: Path) -> str:
    """Return the SHA-256 of a file; one that this process has summed, and that is still the same, is not read again."""
    found = path.stat()
    return _sum_of_file(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.lru_cache(32)
def _sum_of_file(path: Path, *_identity: int) -> str:
    return _sha256(path.read_bytes())


def _key(manifest: dict[str, object]) -> str:
    return _sha256(json.dumps(manifest, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sources() -> str:
    here = resources.files(__package__)
    return _sha256(b"".join(here.joinpath(name).read_bytes() for name in _SOURCES))


def _make(scratch: Path, kernel: Kernel) -> str:
    """Make the files and their manifest in `scratch`, and return the key."""
    files: Files = {}
    packages = download(scratch, _PACKAGES, kernel)
    for package in packages:
        files |= read_package(package, _wanted)
    made = {
        "vmlinuz": one(files, r"boot/vmlinuz-.*|lib/modules/[^/]*/vmlinuz"),
        "initramfs.cpio": make_initramfs(files, kernel),
    }
    if (unpacked := unpacked_kernel(made["vmlinuz"])) is not None:
        made["vmlinux"] = unpacked
    for name, content in made.items():
        (scratch / name).write_bytes(content)
    manifest: dict[str, object] = {
        "files": {name: _sha256(content) for name, content in made.items()},
        "packages": [package.name for package in packages],
    }
    (scratch / "manifest.json").write_text(json.dumps(manifest))
    return _key(manifest)


def _wanted(name: str) -> bool:
    return bool(
        re.search(r"(^|/)(vmlinuz[^/]*|modules\.builtin|busybox|busybox\.static)$|\.ko(\.xz|\.zst)?$", name)
        or name.rpartition("/")[2] in _TOOLS
        or re.search(r"(^|/)lib(64)?/([^/]+/)?[^/]+\.so(\.[^/]*)?$", name)
    )


def make_initramfs(files: Files, kernel: Kernel = "cloud") -> bytes:
    """Return the archive that the kernel unpacks.

    Raises:
        BuildError: something is in none of the packages.
    """
    tools = {name: one(files, rf"(.*/)?{re.escape(name)}") for name in _TOOLS}
    libraries = libraries_for(files, list(tools.values()))
    program, folder, plain = stat.S_IFREG | 0o755, stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644
    entries = [(name, folder, b"") for name in _FOLDERS]
    here = resources.files(__package__)
    entries.append(("init", program, here.joinpath("init").read_bytes()))
    entries += [(f"bin/{name}", program, here.joinpath(name).read_bytes()) for name in ("need", "load")]
    busybox = one(files, r"(.*/)?busybox(\.static)?")
    entries.append(("bin/busybox", program, busybox))
    entries += [(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in _applets(busybox)]
    # Not in bin: busybox's shell prefers its own mke2fs to one on the path.
    entries += [(f"tools/{name}", program, content) for name, content in tools.items()]
    entries += [(f"lib/{name}", program, content) for name, content in libraries.items()]
    if _LOADER in libraries:
        entries.append((f"lib64/{_LOADER}", program, libraries[_LOADER]))
    modules: dict[str, bytes] = {}
    for group, names in GROUPS.items():
        if group in GENERIC and kernel != "generic":
            continue
        order = load_order(files, names)
        modules |= dict(order)
        entries.append((f"modules/{group}.list", plain, "".join(f"{name}\n" for name, _ in order).encode()))
    entries += [(f"modules/{name}.ko", plain, without_signature(content)) for name, content in modules.items()]
    return write_cpio(entries)


def _applets(busybox: bytes) -> list[str]:
    """Return the names that it answers to, which it has in alphabetical order; none: it then makes the links itself."""
    start = busybox.find(b"\0[\0[[\0") + 1
    if not start:
        return []
    names = busybox[start : busybox.index(b"\0\0", start)].decode().split("\0")
    return [name for name in names if name not in ("busybox", *_SCRIPTS)]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Several test runs may want the guest at the same time: one makes it, the others wait."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
