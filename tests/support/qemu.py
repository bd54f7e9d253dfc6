"""QEMU's tools, and what they and the engine must agree on."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.cli.main import main


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def qemu_info(path: Path) -> dict[str, Any]:
    """Return what it tells of an image, without its nodes, which qemu-img tells of from 8.0."""
    told: dict[str, Any] = json.loads(qemu_img("info", "--output=json", path))
    told.pop("children", None)
    return told


def qemu_map(path: Path) -> str:
    """Return its map as JSON, as qemu-img writes it from 8.2: older ones do not tell what is compressed."""
    told = qemu_img("map", "--output=json", "-f", "vmdk", path)
    return told if "compressed" in told else re.sub(r'("data": (true|false))', r'\1, "compressed": false', told)


def qemu_io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "vmdk", *words, str(path)], check=True, capture_output=True, text=True)
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


def content(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, chain.capacity)


def qemu_content(path: Path, scratch: Path | None = None) -> bytes:
    raw = (scratch or path.parent) / (path.name + ".raw")
    qemu_img("convert", "-f", "vmdk", "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


def assert_agree(path: Path, capsys: pytest.CaptureFixture[str], *, checks: bool = True) -> None:
    """Compare content, check, map and info with qemu-img's; `checks=False` where QEMU cannot check the kind."""
    assert content(path) == qemu_content(path)
    if checks:
        assert "No errors" in qemu_img("check", "-f", "vmdk", path)
        assert ours("check", path, capsys).startswith("No errors")
    mine, theirs = (
        json.loads(ours("map", path, capsys, "--output=json")),
        json.loads(qemu_map(path)),
    )
    assert _allocation(mine) == _allocation(theirs)
    mine, theirs = json.loads(ours("info", path, capsys, "--output=json")), qemu_info(path)
    for facts in (mine, theirs):
        for extent in facts["format-specific"]["data"]["extents"]:
            if extent["format"] in ("", "SPARSE"):  # QEMU has no word for the extent that holds its descriptor
                del extent["format"]
    assert mine == theirs


def ours(command: str, path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["image", command, *words, str(path)]) == 0
    return capsys.readouterr().out


def _allocation(entries: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the map without what QEMU says in a way of its own: a hole in a flat file as data with an offset.

    Nor with the names of files: QEMU gives them for some formats alone, and older ones say nothing of compression.
    """
    own = ("compressed", "filename")
    return [
        {key: entry[key] for key in entry if key not in own and not (entry["zero"] and key in ("data", "offset"))}
        for entry in entries
    ]
