"""The block graph as QEMU describes it, and the options of nodes as the XML has them: no QEMU is needed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from qemu_vmdk_snap.domain.qemu.graph import BlockGraph, node_name
from qemu_vmdk_snap.domain.qemu.options import DriverOptions, read_options


def graph(*edges: tuple[str, str, str], files: dict[str, str] | None = None) -> BlockGraph:
    """Return a graph of (parent, edge, child); names with a colon are devices (`dev:`) or jobs (`job:`)."""
    kinds = {"dev": "block-backend", "job": "block-job"}
    numbers: dict[str, int] = {}
    counter = itertools.count(1)
    for parent, _, child in edges:
        for name in (parent, child):
            numbers.setdefault(name, next(counter))
    nodes = [
        {"id": number, "type": kinds.get(name.split(":")[0], "block-driver"), "name": name.split(":")[-1]}
        for name, number in numbers.items()
    ]
    told = [{"parent": numbers[parent], "name": edge, "child": numbers[child]} for parent, edge, child in edges]
    return BlockGraph.of({"nodes": nodes, "edges": told}, [_told(name, file) for name, file in (files or {}).items()])


def _told(name: str, file: str) -> dict[str, Any]:
    driver = "file" if name.endswith("storage") else "vmdk"
    cache = {"direct": False, "no-flush": False, "writeback": True}
    return {"node-name": name, "drv": driver, "file": file, "ro": True, "cache": cache, "detect_zeroes": "off"}


CHAIN = (("top", "file", "top-storage"), ("top", "backing", "base"), ("base", "file", "base-storage"))


@pytest.mark.parametrize("filters", [(), ("cor",), ("throttle", "cor", "compress")], ids=len)
def test_the_format_node_is_below_all_filters(filters: tuple[str, ...]) -> None:
    path = [*filters, "top"]
    found = graph(("dev:sda", "root", path[0]), *((a, "file", b) for a, b in itertools.pairwise(path)), *CHAIN)
    assert found.format_node(path[0]) == "top"
    assert found.chain("top") == ("top", "base")
    assert found.used == {*path, "base", "top-storage", "base-storage"}


def test_a_disk_without_a_format() -> None:
    assert graph(("dev:sda", "root", "raw-storage")).format_node("raw-storage") == "raw-storage"


def test_a_job_is_found_wherever_it_holds_on() -> None:
    mirror = (("job:copy", "main node", "mirror"), ("mirror", "backing", "top"), ("job:copy", "target", "elsewhere"))
    found = graph(("dev:sda", "root", "top"), ("dev:sdb", "root", "other"), *mirror, *CHAIN)
    assert (found.job_on("top"), found.job_on("base"), found.job_on("other")) == ("copy", "copy", None)
    below = graph(("dev:sda", "root", "top"), ("job:stream", "main node", "base"), *CHAIN)
    assert below.job_on("top") == "stream"


def test_what_nothing_uses() -> None:
    found = graph(("dev:sda", "root", "base"), *CHAIN)
    assert found.used == {"base", "base-storage"}


def test_a_node_is_found_by_its_file_node(tmp_path: Path) -> None:
    image, other = tmp_path / "a.vmdk", tmp_path / "b.vmdk"
    image.touch()
    other.touch()
    (tmp_path / "link").symlink_to(image)
    files = {"top": f'json:{{"file": "{other}"}}', "top-storage": str(image), "base": str(image), "base-storage": "/x"}
    found = graph(*CHAIN, files=files)
    assert (found.node_of(image), found.node_of(tmp_path / "link"), found.node_of(other)) == ("top", "top", None)
    assert found.node_of(tmp_path / "gone.vmdk") is None
    assert found.file_of("top") == str(image)


def test_a_file_of_ours_is_found_under_any_name(tmp_path: Path) -> None:
    image, renamed = tmp_path / "a.vmdk", tmp_path / "b.vmdk"
    image.touch()
    ours = node_name(image)
    found = graph((ours, "file", f"{ours}-file"))
    image.rename(renamed)
    image.touch()
    assert (found.node_of(renamed), found.node_of(image)) == (ours, None)
    assert found.file_nodes_of(renamed) == {f"{ours}-file"}


OPTIONS = {
    "": DriverOptions(),
    "cache='none' io='native'": DriverOptions(direct=True, aio="native"),
    "cache='directsync'": DriverOptions(direct=True),
    "cache='unsafe' io='io_uring'": DriverOptions(no_flush=True, aio="io_uring"),
    "cache='writethrough' discard='unmap'": DriverOptions(discard=True),
    "discard='ignore' detect_zeroes='unmap'": DriverOptions(detect_zeroes="on"),
    "discard='unmap' detect_zeroes='unmap'": DriverOptions(discard=True, detect_zeroes="unmap"),
}


@pytest.mark.parametrize("attributes", OPTIONS)
def test_the_options_of_a_driver(attributes: str) -> None:
    disks = f"<disk><driver {attributes}/><target dev='vda'/></disk><disk><target dev='vdb'/></disk>"
    found = read_options(f"<domain><devices>{disks}</devices></domain>")
    assert found == {"vda": OPTIONS[attributes], "vdb": DriverOptions()}
