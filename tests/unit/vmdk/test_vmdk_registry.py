"""Does a new kind of extent take one module and one line of the registry, and nothing else?"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from qemu_vmdk_snap import FormatError, check_image, confined, convert, create_overlay, open_chain
from qemu_vmdk_snap.vmdk.registry import MODULES

TEXT = '# Disk DescriptorFile\nversion=1\nCID=0000abcd\nparentCID=ffffffff\ncreateType="custom"\nRW 40 NEWKIND "x"\n'
DATA = bytes(range(256)) * 80


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "x").write_bytes(b"NEW!".ljust(512, b"\0") + DATA)
    path = tmp_path / "a.vmdk"
    path.write_text(TEXT)
    return path


def test_every_line_names_a_module_that_opens_extents() -> None:
    for module in MODULES.values():
        assert callable(importlib.import_module(module).open_extent)


def test_a_kind_without_a_line_is_refused(image: Path) -> None:
    with pytest.raises(FormatError, match=r"must have a type of SPARSE, FLAT, ZERO, .*SESPARSE"):
        open_chain(image)


def test_a_kind_with_a_line_takes_part_in_everything(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "NEWKIND", "tests.support.newkind")
    top, copy = image.with_name("top.vmdk"), image.with_name("copy.vmdk")
    with open_chain(image, writable=True) as chain:
        chain.write_at(700, b"written")
    model = DATA[:700] + b"written" + DATA[707:]
    create_overlay(top, image, durable=False)
    with open_chain(top, writable=True) as chain:
        assert chain.read_at(0, chain.capacity) == model
        chain.write_at(0, b"above")
        convert(chain, copy, durable=False)
    for path in (top, copy):
        with open_chain(path) as chain:
            assert chain.read_at(0, chain.capacity) == b"above" + model[5:]
        assert check_image(path, resolver=confined(), whole_chain=True).corruptions == 0
