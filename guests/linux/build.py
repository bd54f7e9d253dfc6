"""Make the Linux guest of the distribution's packages: `python guests/linux/build.py`.

    package                 what is taken of it
    the kernel              vmlinuz, and the few modules that it has not built in
    busybox, static         one executable
    qemu-guest-agent        one executable; the libraries that ldd names are this machine's own

The packages are downloaded by the distribution's package manager, which checks them, and read without being installed:
no kernel, no agent and no boot loader entry comes to this machine, and nobody needs to be root. What is made lies in
`.cache/linux-guest` and is made anew when this folder's files change, or by hand with `--anew`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from qemu_vmdk_snap.harness.linux import modules
from qemu_vmdk_snap.harness.linux.cpio import write_cpio
from qemu_vmdk_snap.harness.linux.packages import BuildError as BuildError
from qemu_vmdk_snap.harness.linux.packages import Files, download, read_package

HERE: Final = Path(__file__).resolve().parent
CACHE: Final = HERE.parents[1] / ".cache" / "linux-guest"
MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")
"""What the guest needs of the kernel, built in or as modules."""
FOLDERS: Final = ("bin", "dev", "etc", "modules", "mnt", "proc", "run", "sys", "tmp")


@dataclass(frozen=True)
class Guest:
    """What QEMU's `-kernel` and `-initrd` are given."""

    kernel: Path
    initrd: Path


def build(folder: Path = CACHE, *, anew: bool = False) -> Guest:
    """Return the guest in `folder`, which is made first where it is missing or not of these sources.

    Raises:
        BuildError: the packages cannot be had, or are not as expected.
    """
    guest, stamp = Guest(folder / "vmlinuz", folder / "initramfs.cpio"), folder / "stamp"
    wanted = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in ("build.py", "init"))).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if anew or not stamp.exists() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                kernel, initramfs = _make(Path(scratch))
            guest.kernel.write_bytes(kernel)
            guest.initrd.write_bytes(initramfs)
            stamp.write_text(wanted)
    return guest


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two test runs may want the guest at the same time: one makes it, the other waits."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _make(scratch: Path) -> tuple[bytes, bytes]:
    files: Files = {}
    for package in download(scratch, ("busybox-static", "qemu-guest-agent"), "cloud"):
        files |= read_package(package, _wanted)
    return modules.one(files, r"boot/vmlinuz-.*|lib/modules/[^/]*/vmlinuz"), make_initramfs(files)


def _wanted(name: str) -> bool:
    return bool(
        re.search(r"(^|/)(vmlinuz[^/]*|modules\.builtin|busybox|busybox\.static|qemu-ga)$|\.ko(\.xz|\.zst)?$", name)
    )


# --- the initramfs ----------------------------------------------------------------------------------------------------


def make_initramfs(files: Files) -> bytes:
    """Return the archive that the kernel unpacks: init, busybox, the agent with its libraries, the modules."""
    agent = modules.one(files, r".*/qemu-ga")
    busybox = modules.one(files, r".*/busybox(\.static)?")
    loaded = load_order(files)
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in FOLDERS]
    entries.append(("init", stat.S_IFREG | 0o755, (HERE / "init").read_bytes()))
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, busybox))
    entries.append(("bin/qemu-ga", stat.S_IFREG | 0o755, agent))
    entries += [(f"modules/{n:02}-{name}.ko", stat.S_IFREG | 0o644, data) for n, (name, data) in enumerate(loaded)]
    libraries = _libraries(agent)
    parents = {str(parent) for library in libraries for parent in PurePosixPath(str(library)[1:]).parents}
    entries += [(name, stat.S_IFDIR | 0o755, b"") for name in sorted(parents - {"."})]
    entries += [(str(path)[1:], stat.S_IFREG | 0o755, path.read_bytes()) for path in libraries]
    return write_cpio(entries)


def _libraries(executable: bytes) -> list[Path]:
    """Return what the dynamic linker would load for it, the linker included: this machine's, of the same release."""
    with tempfile.NamedTemporaryFile(suffix=".qemu-ga") as file:
        file.write(executable)
        file.flush()
        os.chmod(file.name, 0o755)  # noqa: PTH101 # the file has no Path
        told = subprocess.run(["ldd", file.name], capture_output=True, text=True, check=False).stdout
    if missing := re.findall(r"(\S+) => not found", told):
        raise BuildError(f"the guest agent needs libraries that are not here: {' '.join(missing)}")
    found = [Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(", told, re.MULTILINE)]
    if not found:
        raise BuildError("ldd names no library of the guest agent")
    return found


def load_order(files: Files) -> list[tuple[str, bytes]]:
    """Return the modules that this guest needs, in the order in which they load."""
    return modules.load_order(files, MODULES)


if __name__ == "__main__":
    try:
        made = build(anew="--anew" in sys.argv[1:])
    except BuildError as error:
        sys.exit(f"guests/linux/build.py: {error}")
    for path in (made.kernel, made.initrd):
        print(f"{path}: {path.stat().st_size} bytes")
