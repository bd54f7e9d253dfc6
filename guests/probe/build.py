"""Assemble the probe guest into the package: `python guests/probe/build.py`."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "qemu_vmdk_snap" / "harness" / "probe.bin"


def assemble(target: Path) -> None:
    """Write the assembled probe to `target`; the same source gives the same bytes."""
    subprocess.run(["nasm", "-f", "bin", "-o", target, HERE / "probe.asm"], check=True)


if __name__ == "__main__":
    assemble(TARGET)
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")
