"""Does `-o` change what it names and nothing else, in every kind, and is what it cannot change refused?"""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap import open_chain
from qemu_vmdk_snap.cli.main import main
from tests.support.qemu import content, qemu_content, qemu_img, qemu_io

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

KEYS = ("adapterType", "geometry.cylinders", "geometry.heads", "geometry.sectors", "virtualHWVersion", "toolsVersion")
OF_BASE = {
    "adapterType": "lsilogic",
    "geometry.cylinders": "7",
    "geometry.heads": "100",
    "geometry.sectors": "50",
    "virtualHWVersion": "10",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image that differs from the defaults in everything that an overlay inherits, geometry included."""
    path = tmp_path / "base.vmdk"
    run("create", "-o", "grain_size=8k,adapter_type=lsilogic,hwversion=10,subformat=twoGbMaxExtentSparse", path, "9M")
    text = path.read_text()
    for key in ("cylinders", "heads", "sectors"):
        line = next(line for line in text.splitlines() if line.startswith(f"ddb.geometry.{key}"))
        text = text.replace(line, f'ddb.geometry.{key} = "{OF_BASE[f"geometry.{key}"]}"')
    path.write_text(text)
    qemu_io(path, "write -P 1 1M 1M")
    return path


def run(*words: str | Path) -> None:
    assert main(["image", *map(str, words)]) == 0


def facts(path: Path) -> tuple[dict[str, str], int, str]:
    """Return the ddb entries that are inherited, the grain size, and the createType."""
    with open_chain(path) as chain:
        link = chain.links[0]
        told = {key: value for key in KEYS if (value := link.descriptor.get(f"ddb.{key}")) is not None}
        return told, link.grain_bytes, link.descriptor.create_type


ASKED = [
    ([], {}, 8192, "monolithicSparse"),
    (["-o", "subformat=twoGbMaxExtentSparse"], {}, 8192, "twoGbMaxExtentSparse"),
    (["-o", "subformat=vmfsSparse"], {}, 512, "vmfsSparse"),
    (["-o", "zeroed_grain=on"], {}, 8192, "monolithicSparse"),
    (["-o", "grain_size=16k"], {}, 16384, "monolithicSparse"),
    (["-o", "hwversion=13"], {"virtualHWVersion": "13"}, 8192, "monolithicSparse"),
    (["-o", "compat6"], {"virtualHWVersion": "6"}, 8192, "monolithicSparse"),
    (["-o", "toolsversion=9"], {"toolsVersion": "9"}, 8192, "monolithicSparse"),
    (
        ["-o", "adapter_type=ide"],
        {"adapterType": "ide", "geometry.cylinders": "18", "geometry.heads": "16", "geometry.sectors": "63"},
        8192,
        "monolithicSparse",
    ),
]


@pytest.mark.parametrize(("words", "changed", "grain", "kind"), ASKED)
def test_an_overlay_inherits_what_is_not_named(
    base: Path, words: list[str], changed: dict[str, str], grain: int, kind: str
) -> None:
    top = base.with_name("top.vmdk")
    run("create", "-b", "base.vmdk", "-F", "vmdk", *words, top)
    assert facts(top) == ({**OF_BASE, **changed}, grain, kind)
    assert content(top) == qemu_content(top) == content(base)


@pytest.mark.parametrize(("words", "changed", "grain", "kind"), ASKED)
def test_a_copy_onto_a_base_inherits_too(
    base: Path, words: list[str], changed: dict[str, str], grain: int, kind: str
) -> None:
    other, top = base.with_name("other.raw"), base.with_name("top.vmdk")
    qemu_img("convert", "-f", "vmdk", "-O", "raw", base, other)
    with other.open("r+b") as file:
        file.write(b"different")
    run("convert", "-f", "raw", "-B", base, *words, other, top)
    assert facts(top) == ({**OF_BASE, **changed}, grain, kind)
    assert content(top) == qemu_content(top) == other.read_bytes()


def test_a_copy_takes_its_base_as_an_option(base: Path) -> None:
    """As with qemu-img, `-o backing_file` is another way to say -B."""
    top = base.with_name("top.vmdk")
    run("convert", "-o", f"backing_file={base},backing_fmt=vmdk", base, top)
    with open_chain(top) as chain:
        assert [link.path.name for link in chain.links] == ["top.vmdk", "base.vmdk"]
        assert {run.depth for run in chain.map() if run.kind.name == "DATA"} == {1}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("subformat=monolithicFlat,grain_size=4k", "-o grain_size: cannot go with monolithicFlat, which has no grains"),
        ("subformat=vmfs,zeroed_grain=on", "-o zeroed_grain: cannot go with vmfs, which has no grains"),
        ("subformat=vmfsSparse,grain_size=4k", "cannot go with vmfsSparse, which has grains of one sector"),
        ("subformat=twoGbMaxExtentFlat,zeroed_grain=on", "cannot go with twoGbMaxExtentFlat, which has no grains"),
    ],
)
def test_an_option_without_effect_is_refused(
    tmp_path: Path, words: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """QEMU refuses `zeroed_grain` for flat images as well."""
    assert main(["image", "create", "-o", words, str(tmp_path / "a.vmdk"), "1M"]) == 64
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_copy_has_the_size_of_its_source(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "convert", "-o", "size=1G", str(base), str(base.with_name("copy.vmdk"))]) == 64
    assert "-o size: can only be given to `image create`" in capsys.readouterr().err
