"""From a hint in an untrusted file to a path that may be opened.

An image can name any path as its parent or extent. What is opened is confined to the folder of the file that names it,
and to folders that the caller trusts; what a name leads to by way of symbolic links is what counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qemu_vmdk_snap.errors import CorruptChain

Resolver = Callable[[Path, str, str], Path]
"""(the file that names it, the name, what it is: "parent" or "extent") -> the path to open."""


def confined(trusted_dirs: Sequence[Path | str] = ()) -> Resolver:
    """Return the resolver that opens beside the naming file, and anywhere below `trusted_dirs`."""
    trusted = [Path(folder).resolve() for folder in trusted_dirs]

    def resolve(owner: Path, name: str, role: str) -> Path:
        return _resolve(owner, name, role, trusted)

    return resolve


def unconfined(owner: Path, name: str, role: str) -> Path:
    """Resolve a name wherever it leads: for images whose every writer is trusted."""
    return _resolve(owner, name, role, [Path("/")])


def _resolve(owner: Path, name: str, role: str, trusted: Sequence[Path]) -> Path:
    """Try the name as it stands, as QEMU does, then its last part beside `owner`, as VMware and others do."""
    home = owner.parent
    plain = name.replace("\\", "/")
    if plain.startswith("file:") and not (home / plain).exists():
        plain = plain.removeprefix("file:")
    candidates = [home / name, home / plain, home / plain.rsplit("/", 1)[-1]]
    for candidate in candidates:
        if "\0" in name or not os.path.lexists(candidate):
            continue
        real = candidate.resolve()
        allowed = real.parent == home.resolve() or any(real.is_relative_to(folder) for folder in trusted)
        if not allowed:
            reason = f"its {role} {real} is outside its folder: allow {real.parent} (--allow-dir) to follow it"
            raise CorruptChain(owner, reason)
        return candidate if candidate.parent == home else real
    raise CorruptChain(owner, f"its {role} {name!r} does not exist")
