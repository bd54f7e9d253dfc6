"""The table for people, the JSON for programs, and a picture for each row."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from bench.rows import Result

NOTE = """## Where a target is missed

- Whole processes include their start, which is less than it was when the table was made ([ADR
  0007](adr/0007-a-light-start.md)). From a wheel in a virtual environment of its own, medians of 40 runs by turns
  with qemu-img on a machine with nothing else to do, a chain of two images of 64 MiB: `info` 28 ms (5.3 times as
  long), `check` 28 (4.8), `map` 30 (4.2), `measure -O raw` 31 (5.3), `create -b` 33 (4.4); `python -c pass` takes 10,
  and with `import argparse` 18. Before: 45, 115, 45, 52 and 48 ms. (What the environment's `site` imports comes on
  top.) `snapshot list` takes 66 ms where Python with libvirt's binding and a connection takes 47; a start's hook with
  `verify = "chain"` 47 (62 before). Conversions and merges take NumPy too, 60 to 80 ms. As a library call an overlay
  takes 0.4 to 0.7 ms, a check 30 to 40 ms for the tables of 4 million grains.
- `convert` waits until the copy is on the disk, which qemu-img's does not (its default is `-t unsafe`): to raw on ext4
  that is about half of the time. The rows with `-t unsafe` compare like with like.
- Where extents are shared, a copy takes as long as its process takes to start, and little more. To raw, qemu-img's time
  depends on how quickly the kernel finds memory for the page cache: in seven runs on the machine above it took 2.3 to
  5.5 s and ours 0.17 to 0.25 s, so the ratio was 0.035 to 0.096. To raw on ext4 it was 0.25 to 0.58 in six runs: 1.3
  to 1.9 s beside 2.5 to 6.9 s, since we store the copy behind ourselves and use the same pages again.
"""
LIVE = """## Deleting a snapshot under a running guest

`python -m bench.live_delete`: the snapshot in the middle of a chain of four links with 384 MiB each, below a guest that
writes without a rest, beside libvirt's block-commit of a qcow2 chain with the same data. Medians of three, by turns,
on the machine above, which other work kept busy (load 15 to 20):

| file system | the guest waited, ours | libvirt, qcow2 | ratio | whole call, ours | libvirt, qcow2 | ratio |
|---|---:|---:|---:|---:|---:|---:|
| XFS with reflinks | 109 ms | 3421 ms | 0.03 | 1.8 s | 5.2 s | 0.34 |
| ext4 | 299 ms | 282 ms | 1.06 | 21.5 s | 4.5 s | 4.7 |

On ext4 the new image is a copy: it writes the data of both links, compares them, and waits until it is on the disk.
libvirt writes that of the upper link into the lower one, and does not wait. `blockdev-reopen` itself takes 2 to 30 ms.
"""

_WIDTH, _LEFT, _BAR = 640, 150, 400


def machine_facts() -> dict[str, str]:
    """Return what the times depend on."""
    model = next((line.split(":")[1] for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown")
    memory = next((line.split(":")[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "unknown")
    qemu = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {
        "processor": model.strip(),
        "processors": str(os.cpu_count()),
        "memory": memory.strip(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu-img": qemu,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def as_json(results: list[Result], scale: float) -> str:
    """Return everything that was measured."""
    rows: list[dict[str, Any]] = [asdict(one) | {"ratio": one.ratio} for one in results]
    return json.dumps({"machine": machine_facts(), "scale": scale, "rows": rows}, indent=1) + "\n"


def table(record: dict[str, Any]) -> str:
    """Return the Markdown table of a record that `as_json` wrote."""
    lines = [
        "| work | ours | qemu-img | ratio | target | peak memory | target | compared by |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for one in record["rows"]:
        ratio = "" if one["ratio"] is None else f"{one['ratio']:.3f}" + _mark(one["ratio"], one["target"])
        target = "" if one["target"] is None else f"{one['target']:g}"
        peak = f"{one['ours_peak'] >> 20} MiB" + _mark(one["ours_peak"], one["peak_target"]) if one["ours_peak"] else ""
        wanted = "" if one["peak_target"] is None else f"{one['peak_target'] >> 20} MiB"
        theirs = "" if one["theirs"] is None else _seconds(one["theirs"])
        cells = [one["title"], _seconds(one["ours"]), theirs, ratio, target, peak, wanted, one["agreed"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mark(value: float, target: float | None) -> str:
    return " **missed**" if target is not None and value > target else ""


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def picture(one: dict[str, Any]) -> str:
    """Return an SVG with the two times of a row as bars, and the target as a line."""
    bars = [("ours", one["ours"], "#2a6f97")]
    if one["theirs"] is not None:
        bars.append(("qemu-img", one["theirs"], "#b0b0b0"))
    longest = max(value for _, value, _ in bars)
    height = 44 + 30 * len(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-weight="bold">{escape(one["title"])}</text>',
    ]
    for number, (name, value, colour) in enumerate(bars):
        y = 34 + 30 * number
        width = max(1.0, _BAR * value / longest)
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 15}" text-anchor="end">{name}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="20" fill="{colour}"/>')
        parts.append(f'<text x="{_LEFT + width + 6:.1f}" y="{y + 15}">{_seconds(value)}</text>')
    if one["target"] is not None and one["theirs"] is not None:
        x = _LEFT + _BAR * min(1.0, one["target"] * one["theirs"] / longest)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="30" y2="58" stroke="#c1121f" stroke-dasharray="3 2"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def page(record: dict[str, Any], pictures: str, note: str = "") -> str:
    """Return docs/performance.md."""
    facts = ", ".join(f"{key}: {value}" for key, value in record["machine"].items())
    images = "\n".join(f"![{one['title']}]({pictures}/{one['name']}.svg)" for one in record["rows"])
    return "\n".join(
        [
            "# Performance",
            "",
            "Our commands beside qemu-img's: whole processes, the same images, each pair in one run; the results are",
            "compared before a time counts. The ratio is ours through qemu-img's: below 1 we are faster. In the",
            "pictures the dashed line is the target. Made by `python -m bench`; do not edit.",
            "",
            f"Machine: {facts}. Sizes are {record['scale']:g} of those named.",
            "",
            table(record),
            *([note, ""] if note else []),
            images,
            "",
        ]
    )
