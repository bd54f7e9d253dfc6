"""QEMU's own tests of its image tools, from the source package of the QEMU that is installed here."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from qemu_vmdk_snap.storage.durable import working_in

ROOT: Final = Path(__file__).parents[2]
CACHE: Final = ROOT / ".cache" / "qemu-source"
SHIM: Final = ROOT / "tests" / "oracle" / "habits" / "qemu-img"
_SOURCES: Final = Path("/etc/apt/sources.list.d/debian.sources")
_WANTED: Final = ("*/tests/qemu-iotests/*", "*/python/qemu/*")


def source() -> Path | None:
    """Return the folder of the tests, fetched with `apt-get source` where that is possible, or None."""
    version = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    folder = CACHE / version
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with working_in(CACHE), contextlib.suppress(OSError, subprocess.SubprocessError):
            _fetch(folder)
    return folder / "tests" / "qemu-iotests" if folder.is_dir() else None


def _fetch(folder: Path) -> None:
    scratch = CACHE / f".fetch-{os.getpid()}"
    (scratch / "lists" / "partial").mkdir(parents=True)
    try:
        sources = scratch / "source.sources"
        sources.write_text(re.sub(r"(?m)^Types:.*$", "Types: deb-src", _SOURCES.read_text()))
        own = {"Etc::SourceList": "/dev/null", "Etc::SourceParts": scratch, "State::Lists": scratch / "lists"}
        words = [word for name, value in own.items() for word in ("-o", f"Dir::{name}={value}")]
        words += ["-o", "APT::Sandbox::User=root", "-q"]
        for what in (["update"], ["source", "--download-only", "qemu"]):
            subprocess.run(["apt-get", *words, *what], cwd=scratch, check=True, capture_output=True, timeout=90)
        (scratch / "tree").mkdir()
        archive = str(next(scratch.glob("qemu_*.orig.tar.xz")))
        words = ["tar", "-xf", archive, "-C", str(scratch / "tree"), "--strip-components=1", "--wildcards", *_WANTED]
        subprocess.run(words, check=True, capture_output=True)
        (scratch / "tree").rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run(tests: Path, numbers: list[str], scratch: Path, *, shim: bool) -> dict[str, list[str]]:
    """Run the tests, with our command in the place of qemu-img where `shim` says so; return what differs, by number.

    What differs only in its wording (`told`) is left out. A test that could not be run is in the answer too.
    """
    real = str(shutil.which("qemu-img"))
    programs = {"QEMU_PROG": "qemu-system-x86_64", "QEMU_IO_PROG": "qemu-io", "QEMU_NBD_PROG": "qemu-nbd"}
    environment = os.environ | {name: str(shutil.which(program)) for name, program in programs.items()}
    environment |= {"QSD_PROG": shutil.which("qemu-storage-daemon") or "/bin/false", "TEST_DIR": str(scratch)}
    environment |= {"REAL_QEMU_IMG": real, "OURS_PYTHON": sys.executable, "OURS_AT": str(ROOT)}
    environment["QEMU_IMG_PROG"] = str(SHIM) if shim else real
    words = ["/usr/bin/python3", "check", "-vmdk", "-tap", *numbers]
    done = subprocess.run(words, cwd=tests, env=environment, capture_output=True, text=True, check=False)
    found: dict[str, list[str]] = {}
    for number in numbers:
        if re.search(rf"^ok {number} *(?!# SKIP)|^ok \d* ?vmdk {number}$", done.stdout, re.MULTILINE):
            continue
        bad, good = scratch / f"{number}.out.bad", tests / f"{number}.out"
        if not bad.exists():
            found[number] = ["was not run", *done.stdout.splitlines()[-3:]]
            continue
        mine, theirs = told(bad.read_text(errors="replace")), told(good.read_text(errors="replace"))
        if mine != theirs:
            found[number] = [f"- {line}" for line in theirs if line not in mine]
            found[number] += [f"+ {line}" for line in mine if line not in theirs] or ["in another order"]
    return found


def told(output: str) -> list[str]:
    """Return what a test has seen, line by line, without wording: that there was an error, not how it is put."""
    lines = []
    for line in output.splitlines():
        # The second line of an error of qemu-img, and what our check has to say where QEMU's says nothing.
        if line.startswith(("Could not open backing image", "Note ")) or re.match(r"qemu-\S+: warning:", line):
            continue
        if re.match(r"qemu-(img|\S+-snap)( image \S+)?: ", line):
            lines.append("error")
            continue
        line = re.sub(r"(?<![^ ('])(file:|\./)+(?=\S)", "", line).replace("/./", "/")
        line = re.sub(r"^(Formatting .* size=\d+).*", r"\1", line)
        line = re.sub(r"^(backing file: [^(]*?) \(actual path: .*", r"\1", line)
        lines.append(line)
    return lines
