"""Do grain directories as large as they may be cost no more memory than the file stores of them?"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from qemu_vmdk_snap import FormatError, ImageOptions, create_image, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.check import check_image
from qemu_vmdk_snap.ops.check.findings import LISTED, Findings
from qemu_vmdk_snap.vmdk.sparse.header import MAX_GD_ENTRIES, SparseExtentHeader

GRAIN: Final = 4096
AT: Final = 4096
"""Sector of the redundant directory."""
PEAK: Final = """
import pathlib, sys
from qemu_vmdk_snap.cli.main import main
assert main(sys.argv[1:]) in (0, 2)
status = pathlib.Path("/proc/self/status").read_text().split()
print(int(status[status.index("VmHWM:") + 1]) // 1024, file=sys.stderr)  # not ru_maxrss: that has the parent's in it
"""


def directories(path: Path, entries: int, *, primary: int = 0, redundant: int = 0) -> Path:
    """Make an image whose directories have so many entries, all alike; of zeros they are holes of the file."""
    create_image(path, GRAIN * 512, options=ImageOptions(grain_size=GRAIN), durable=False)
    header = SparseExtentHeader.parse(path.read_bytes()[:512], path=path)
    sectors = entries * 512 * 8
    gd = AT + entries * 4 // 512
    new = replace(header, capacity=sectors, rgd_offset=AT, gd_offset=gd)
    text = path.read_bytes()[512 : 512 + header.descriptor_size * 512].rstrip(b"\0")
    text = text.replace(f"RW {header.capacity} SPARSE".encode(), f"RW {sectors} SPARSE".encode())
    with path.open("wb") as file:
        file.write(new.serialise() + text)
        for place, value in ((AT, redundant), (gd, primary)):
            if value:
                file.seek(place * 512)
                file.write(np.full(entries, value, "<u4").tobytes())
        file.truncate(max(1 << 20, gd * 512 + entries * 4))
    return path


@pytest.mark.parametrize("command", ["info", "check"])
def test_directories_that_are_holes_take_no_memory(tmp_path: Path, command: str) -> None:
    path = directories(tmp_path / "holes.vmdk", MAX_GD_ENTRIES if command == "info" else MAX_GD_ENTRIES // 8)
    assert path.stat().st_blocks < 200
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "image", command, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.split()[-1])
    assert peak < 120, f"{peak} MiB"


def test_of_many_tables_in_one_place_a_few_are_worked_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 200_000 // 128 * 128
    path = directories(tmp_path / "heap.vmdk", count, primary=AT - 8, redundant=AT - 16)
    worked_out: list[str] = []
    corrupt = Findings.corrupt

    def counted(
        findings: Findings, path: Path, offset: int, field: str, value: object, rule: str, count: int = 1
    ) -> None:
        worked_out.append(field)
        corrupt(findings, path, offset, field, value, rule, count)

    monkeypatch.setattr(Findings, "corrupt", counted)
    report = check_image(path, resolver=confined())
    assert report.corruptions >= 2 * (count - 1)
    assert len(worked_out) < 10 * LISTED


def test_many_entries_that_lead_nowhere_are_one_note(tmp_path: Path) -> None:
    count = 200_000 // 128 * 128
    path = directories(tmp_path / "lost.vmdk", count, primary=0xFFFF_FF00, redundant=12)  # zeros after the descriptor
    with open_chain(path) as chain:
        (note,) = chain.links[0].notes
        assert "grain directory entry 0 = 4294967040: lies outside the file" in note
        assert note.endswith(f"; the redundant table is used (and {count - 1} more like it)")
        assert chain.links[0].extents[0].extent.lookup(0).kind >= 0
    with pytest.raises(FormatError, match="grain directory entry 0"):
        open_chain(path, writable=True)
