"""Public names that are imported when they are first used, and seen by `dir`, `help` and type checkers all the same.

A package says what it offers once, in the stub beside its `__init__.py`, one line for each name:

    from qemu_vmdk_snap.chain.chain import Chain as Chain

The package itself has nothing but this, so that importing it costs nothing:

    __getattr__, __dir__ = public_names(__name__, __file__)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable


def public_names(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for the package whose `__init__.py` is `file`, its `__all__` included."""
    homes: dict[str, tuple[str, str]] = {}

    def found() -> dict[str, tuple[str, str]]:
        if not homes:
            homes.update(_homes(file))
        return homes

    def get(name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name == "__all__":
            return sorted(found())
        if name not in found():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, there = found()[name]
        return getattr(importlib.import_module(module), there)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *found()})

    return get, names


def _homes(file: str) -> dict[str, tuple[str, str]]:
    """Return public name -> (module, name there), as the lines `from MODULE import NAME as PUBLIC` of the stub say."""
    from pathlib import Path

    stub = Path(file).with_suffix(".pyi")
    words = (line.split() for line in stub.read_text(encoding="utf-8").splitlines())
    return {line[5]: (line[1], line[3]) for line in words if len(line) == 6 and line[0::2] == ["from", "import", "as"]}
