"""The distribution's packages: downloaded by its own package manager, which checks them, and read, not installed.

No kernel, no tool and no boot loader entry comes to this machine, and nobody needs to be root.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from qemu_vmdk_snap.errors import PluginError
from qemu_vmdk_snap.harness.linux.cpio import read_cpio

Take = Callable[[str], bool]
Files = dict[str, bytes]


class BuildError(PluginError):
    """The guest cannot be made here; the message says why, in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__("linux guest", reason)
        self.args = (reason,)


def download(folder: Path, names: Sequence[str], kernel: str) -> list[Path]:
    """Download a kernel and packages into `folder`, and return them; `kernel` is `cloud` or `generic`.

    Names are Debian's; those of libraries, which have others from one release to the next, are found by what depends.

    Raises:
        BuildError: they cannot be had.
    """
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        return _download_debian(folder, names, kernel)
    if shutil.which("dnf") and shutil.which("rpm2cpio"):
        return _download_fedora(folder, [name.removesuffix("-static") for name in names])
    raise BuildError("neither apt-get nor dnf: the guest's packages cannot be had")


def read_package(package: Path, wanted: Take) -> Files:
    """Return the files of a package that are wanted, by their names without a leading slash; links are followed.

    Raises:
        BuildError: it cannot be read.
    """
    return (_read_deb if package.suffix == ".deb" else _read_rpm)(package, wanted)


_LIBRARIES = re.compile(
    r"lib(c6|ext2fs2|com-err2|ss2|blkid1|uuid1|inih1|urcu\d+|edit2|tinfo6|bsd0|md0|pcre2-8-0|selinux1|udev1|devmapper[\d.]+)"
    r"(t64)?"
)


def _download_debian(folder: Path, names: Sequence[str], kernel: str) -> list[Path]:
    """Download with the package lists that are here; where these are missing or too old, with fresh ones of our own."""
    flavours = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}
    meta = flavours[kernel] if _os_id() == "debian" else "linux-image-virtual"
    try:
        return _apt_download(folder, names, meta, [])
    except BuildError:
        own = ["-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        _run(["apt-get", "-q", *own, "update"], folder)
        return _apt_download(folder, names, meta, own)


def _apt_download(folder: Path, names: Sequence[str], kernel: str, options: list[str]) -> list[Path]:
    """`kernel` is the name that the distribution gives its latest one: it has nothing inside and depends on it."""
    told = _run(["apt-cache", *options, "depends", "--important", kernel], folder)
    image = re.search(r"Depends: (linux-image-\d\S*)", told)
    if image is None:
        raise BuildError(f"no kernel package behind {kernel}")
    modules = image[1].replace("linux-image-", "linux-modules-")
    wanted = [image[1], *names, *_libraries_of(folder, names, options)]
    if _run(["apt-cache", *options, "pkgnames", modules], folder).split().count(modules):
        wanted.append(modules)  # Ubuntu ships them apart
    # root inside a folder of root's: apt's own user cannot write there, which is no fault
    _run(["apt-get", "-q", *options, "-o", "APT::Sandbox::User=root", "download", *wanted], folder)
    return sorted(folder.glob("*.deb"))


def _libraries_of(folder: Path, names: Sequence[str], options: list[str]) -> list[str]:
    only = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    told = _run(["apt-cache", *options, "depends", "--recurse", *only, *names], folder)
    return sorted({line for line in told.splitlines() if _LIBRARIES.fullmatch(line)})


def _download_fedora(folder: Path, names: Sequence[str]) -> list[Path]:
    everything = ["kernel-core", "kernel-modules-core", *names]
    _run(["dnf", "-q", "download", "--resolve", "--destdir", str(folder), "--arch", "x86_64", *everything], folder)
    return sorted(folder.glob("*.rpm"))


def _os_id() -> str:
    told = re.search(r'^ID="?(\w+)', Path("/etc/os-release").read_text(), re.MULTILINE)
    return told[1] if told else ""


def _run(words: list[str], folder: Path) -> str:
    """Return what a command prints."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise BuildError(f"{' '.join(words)}: {last}")
    return done.stdout


def _read_deb(package: Path, wanted: Take) -> Files:
    found: Files = {}
    links: dict[str, str] = {}
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            name = member.name.removeprefix("./")
            if not wanted(name):
                continue
            if member.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname)).lstrip("/")
            elif member.isfile() and (content := archive.extractfile(member)) is not None:
                found[name] = content.read()
    if process.returncode:
        raise BuildError(f"{package.name}: dpkg-deb ended with exit status {process.returncode}")
    return found | {name: found[target] for name, target in links.items() if target in found}


def _read_rpm(package: Path, wanted: Take) -> Files:
    """An RPM package's payload is a cpio archive."""
    with package.open("rb") as file:
        payload = subprocess.run(["rpm2cpio"], stdin=file, capture_output=True, check=True).stdout
    try:
        entries = [entry for entry in read_cpio(payload) if wanted(entry[0])]
    except ValueError as error:
        raise BuildError(f"{package.name}: {error}") from None
    found = {name: data for name, mode, data in entries if stat.S_ISREG(mode)}
    links = {name: data.decode() for name, mode, data in entries if stat.S_ISLNK(mode)}
    targets = {name: posixpath.normpath(posixpath.join(posixpath.dirname(name), link)) for name, link in links.items()}
    return found | {name: found[target] for name, target in targets.items() if target in found}
