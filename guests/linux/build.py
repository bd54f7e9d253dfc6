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
import io
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

HERE: Final = Path(__file__).resolve().parent
CACHE: Final = HERE.parents[1] / ".cache" / "linux-guest"
MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")
"""What the guest needs of the kernel, built in or as modules."""
FOLDERS: Final = ("bin", "dev", "etc", "modules", "mnt", "proc", "run", "sys", "tmp")

Take = Callable[[str], bool]
Files = dict[str, bytes]


class BuildError(Exception):
    """The guest cannot be made here; the message says why, in one line."""


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
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        packages, read = _download_debian(scratch), _read_deb
    elif shutil.which("dnf") and shutil.which("rpm2cpio"):
        packages, read = _download_fedora(scratch), _read_rpm
    else:
        raise BuildError("neither apt-get nor dnf: the guest's packages cannot be had")
    files: Files = {}
    for package in packages:
        files |= read(package, _wanted)
    return _one(files, r"boot/vmlinuz-.*|lib/modules/[^/]*/vmlinuz"), make_initramfs(files)


def _wanted(name: str) -> bool:
    return bool(
        re.search(r"(^|/)(vmlinuz[^/]*|modules\.builtin|busybox|busybox\.static|qemu-ga)$|\.ko(\.xz|\.zst)?$", name)
    )


# --- packages ---------------------------------------------------------------------------------------------------------


def _download_debian(folder: Path) -> list[Path]:
    """Download with the package lists that are here; where these are missing or too old, with fresh ones of our own."""
    kernel = "linux-image-cloud-amd64" if _os_id() == "debian" else "linux-image-virtual"
    try:
        return _apt_download(folder, kernel, [])
    except BuildError:
        own = ["-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        _run(["apt-get", "-q", *own, "update"], folder)
        return _apt_download(folder, kernel, own)


def _apt_download(folder: Path, kernel: str, options: list[str]) -> list[Path]:
    """`kernel` is the name that the distribution gives its latest one: it has nothing inside and depends on it."""
    told = _run(["apt-cache", *options, "depends", "--important", kernel], folder)
    image = re.search(r"Depends: (linux-image-\d\S*)", told)
    if image is None:
        raise BuildError(f"no kernel package behind {kernel}")
    modules = image[1].replace("linux-image-", "linux-modules-")
    names = [image[1], "busybox-static", "qemu-guest-agent"]
    if _run(["apt-cache", *options, "pkgnames", modules], folder).split().count(modules):
        names.append(modules)  # Ubuntu ships them apart
    # root inside a folder of root's: apt's own user cannot write there, which is no fault
    _run(["apt-get", "-q", *options, "-o", "APT::Sandbox::User=root", "download", *names], folder)
    return sorted(folder.glob("*.deb"))


def _download_fedora(folder: Path) -> list[Path]:
    names = ["kernel-core", "kernel-modules-core", "busybox", "qemu-guest-agent"]
    _run(["dnf", "-q", "download", "--destdir", str(folder), "--arch", "x86_64", *names], folder)
    return sorted(folder.glob("*.rpm"))


def _os_id() -> str:
    told = re.search(r'^ID="?(\w+)', Path("/etc/os-release").read_text(), re.MULTILINE)
    return told[1] if told else ""


def _run(words: list[str], folder: Path) -> str:
    """Return what a command prints."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise BuildError(f"{' '.join(words)}: {last}")
    return done.stdout


def _read_deb(package: Path, wanted: Take) -> Files:
    """Return the files of a Debian package that are wanted, by their names without a leading slash."""
    found: Files = {}
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            name = member.name.removeprefix("./")
            content = archive.extractfile(member) if member.isfile() and wanted(name) else None
            if content is not None:
                found[name] = content.read()
    if process.returncode:
        raise BuildError(f"{package.name}: dpkg-deb ended with exit status {process.returncode}")
    return found


def _read_rpm(package: Path, wanted: Take) -> Files:
    """Return the same of an RPM package, whose payload is a cpio archive."""
    with package.open("rb") as file:
        payload = subprocess.run(["rpm2cpio"], stdin=file, capture_output=True, check=True).stdout
    return {name: data for name, mode, data in read_cpio(payload) if stat.S_ISREG(mode) and wanted(name)}


# --- the initramfs ----------------------------------------------------------------------------------------------------


def make_initramfs(files: Files) -> bytes:
    """Return the archive that the kernel unpacks: init, busybox, the agent with its libraries, the modules."""
    agent = _one(files, r".*/qemu-ga")
    busybox = _one(files, r".*/busybox(\.static)?")
    modules = load_order(files)
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in FOLDERS]
    entries.append(("init", stat.S_IFREG | 0o755, (HERE / "init").read_bytes()))
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, busybox))
    entries.append(("bin/qemu-ga", stat.S_IFREG | 0o755, agent))
    entries += [(f"modules/{n:02}-{name}.ko", stat.S_IFREG | 0o644, data) for n, (name, data) in enumerate(modules)]
    libraries = _libraries(agent)
    parents = {str(parent) for library in libraries for parent in PurePosixPath(str(library)[1:]).parents}
    entries += [(name, stat.S_IFDIR | 0o755, b"") for name in sorted(parents - {"."})]
    entries += [(str(path)[1:], stat.S_IFREG | 0o755, path.read_bytes()) for path in libraries]
    return write_cpio(entries)


def _one(files: Files, pattern: str) -> bytes:
    for name, content in files.items():
        if re.fullmatch(pattern, name):
            return content
    raise BuildError(f"no {pattern} in the packages")


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
    """Return the wanted modules with what they depend on, each after what it needs; those built in are left out."""
    at_hand = {_module_name(name): name for name in files if ".ko" in PurePosixPath(name).name}
    builtin = {_module_name(line) for line in _one(files, r".*/modules\.builtin").decode().split()}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name in builtin:
            return
        if name not in at_hand:
            raise BuildError(f"the kernel has no {name}")
        data = _unpacked(at_hand[name], files[at_hand[name]])
        told = re.search(rb"(?:^|\0)depends=([^\0]*)\0", data)
        for needed in told[1].decode().split(",") if told and told[1] else ():
            add(needed.replace("-", "_"))
        ordered[name] = data

    for name in MODULES:
        add(name)
    return list(ordered.items())


def _module_name(path: str) -> str:
    return PurePosixPath(path).name.split(".ko")[0].replace("-", "_")


def _unpacked(name: str, data: bytes) -> bytes:
    if name.endswith(".xz"):
        return lzma.decompress(data)
    if name.endswith(".zst"):
        return subprocess.run(["zstd", "-dc"], input=data, capture_output=True, check=True).stdout
    return data


# --- cpio, "newc": 110 bytes of ASCII, the name, the data, each padded to 4 bytes ------------------------------------
# Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.

_HEADER: Final = 110


def write_cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """Return the archive of (name, mode, content); the same entries give the same bytes."""
    out = io.BytesIO()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        links = 2 if stat.S_ISDIR(mode) else 1
        encoded = name.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        out.write(bytes(-out.tell() % 4) + data)
        out.write(bytes(-out.tell() % 4))
    return out.getvalue()


def read_cpio(archive: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Give (name, mode, content) of each entry.

    Raises:
        BuildError: it is no such archive, or ends too early.
    """
    at = 0
    while True:
        header = archive[at : at + _HEADER]
        if len(header) < _HEADER or header[:6] not in (b"070701", b"070702"):
            raise BuildError(f"cpio archive: no header at byte {at:#x}")
        fields = [int(header[n : n + 8], 16) for n in range(6, _HEADER, 8)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + _HEADER : at + _HEADER + name_size - 1].decode()
        if name == "TRAILER!!!":
            return
        start = at + _HEADER + name_size
        start += -start % 4
        if start + size > len(archive):
            raise BuildError(f"cpio archive: {name} ends after the archive")
        yield name.removeprefix("./").removeprefix("/"), mode, archive[start : start + size]
        at = start + size + -(start + size) % 4


if __name__ == "__main__":
    try:
        made = build(anew="--anew" in sys.argv[1:])
    except BuildError as error:
        sys.exit(f"guests/linux/build.py: {error}")
    for path in (made.kernel, made.initrd):
        print(f"{path}: {path.stat().st_size} bytes")
