"""The kernel's modules and the executables of packages: what needs what, and in which order it is loaded."""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final

from qemu_vmdk_snap.harness.linux.packages import BuildError, Files

_PT_LOAD: Final = 1
_PT_DYNAMIC: Final = 2
_DT_NEEDED, _DT_STRTAB = 1, 5


def one(files: Files, pattern: str) -> bytes:
    """Return the content of the file whose name is of this pattern.

    Raises:
        BuildError: there is none.
    """
    for name, content in files.items():
        if re.fullmatch(pattern, name):
            return content
    raise BuildError(f"no {pattern} in the packages")


def needed_libraries(executable: bytes) -> list[str]:
    """Return the names of the libraries that an ELF file of 64 bits asks for. Source: the gABI, chapter 5."""
    if executable[:5] != b"\x7fELF\x02":
        return []
    offset, size, count = (*struct.unpack_from("<Q", executable, 32), *struct.unpack_from("<HH", executable, 54))
    headers = [struct.unpack_from("<IIQQQQQQ", executable, offset + size * i) for i in range(count)]
    loads = [(vaddr, at, length) for kind, _, at, vaddr, _, length, _, _ in headers if kind == _PT_LOAD]
    entries: list[tuple[int, int]] = []
    for kind, _, at, _, _, length, _, _ in headers:
        if kind == _PT_DYNAMIC:
            entries = list(struct.iter_unpack("<qQ", executable[at : at + length // 16 * 16]))
    table = next((value for tag, value in entries if tag == _DT_STRTAB), None)
    if table is None:
        return []
    strings = next(at + table - vaddr for vaddr, at, length in loads if vaddr <= table < vaddr + length)
    names = [strings + value for tag, value in entries if tag == _DT_NEEDED]
    return [executable[start : executable.index(b"\0", start)].decode() for start in names]


def libraries_for(files: Files, executables: Sequence[bytes]) -> Files:
    """Return every library that the executables and their libraries ask for, by its name alone.

    Raises:
        BuildError: one is in none of the packages.
    """
    at_hand = {PurePosixPath(name).name: content for name, content in files.items() if ".so" in name}
    found: Files = {}
    left = [name for executable in executables for name in needed_libraries(executable)]
    while left:
        name = left.pop()
        if name in found:
            continue
        if name not in at_hand:
            raise BuildError(f"no {name} in the packages")
        found[name] = at_hand[name]
        left += needed_libraries(found[name])
    return found


def load_order(files: Files, modules: Sequence[str]) -> list[tuple[str, bytes]]:
    """Return the wanted modules with what they depend on, each after what it needs; those built in are left out."""
    at_hand = {_module_name(name): name for name in files if ".ko" in PurePosixPath(name).name}
    builtin = {_module_name(line) for line in one(files, r".*/modules\.builtin").decode().split()}
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

    for name in modules:
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
