"""`python -m qemu_vmdk_snap`: the same as the command."""

from __future__ import annotations

import sys

from qemu_vmdk_snap.cli.program import program

if __name__ == "__main__":
    sys.exit(program())
