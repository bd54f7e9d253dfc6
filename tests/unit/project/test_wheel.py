"""Are sdist and wheel the same bytes whenever and wherever they are built, and does the wheel carry everything?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from qemu_vmdk_snap import __version__
from qemu_vmdk_snap.cli.commands import COMMANDS, TOP_LEVEL

ROOT = Path(__file__).parents[3]
SOURCE = ("qemu_vmdk_snap", "contrib", "debian", "docs", "examples", "guests")
FILES = (".gitignore", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")
DATA = f"qemu_vmdk_snap-{__version__}.data/data"


def built(folder: Path, umask: int) -> tuple[Path, Path]:
    """Build sdist and wheel from a copy of the sources, whose files are of now and have modes by `umask`."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCE:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for path in source.rglob("*"):
        path.chmod(path.stat().st_mode & ~umask)
        os.utime(path)
    environ = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "TZ": f"X{umask}"}
    words = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(folder)]
    subprocess.run(words, cwd=source, env=environ, umask=umask, check=True, capture_output=True, timeout=100)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return built(tmp_path_factory.mktemp("first"), 0o022)


def test_another_build_gives_the_same_bytes(archives: tuple[Path, Path], tmp_path: Path) -> None:
    again = built(tmp_path / "elsewhere" / "deeper", 0o077)
    assert [path.name for path in again] == [path.name for path in archives]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in archives]


def test_the_wheel_carries_all_there_is_to_use(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
        page = wheel.read(f"{DATA}/share/man/man1/qemu-vmdk-snap-image-create.1").decode()
        bash = wheel.read(f"{DATA}/share/bash-completion/completions/qemu-vmdk-snap").decode()
    for path in (ROOT / "qemu_vmdk_snap").rglob("*"):  # the probe and the Linux guest's parts are among them
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in names
    words = [(group, name) for group, table in COMMANDS.items() for name in table] + [(name,) for name in TOP_LEVEL]
    pages = {"-".join(("qemu-vmdk-snap", *one)) for one in words} | {"qemu-vmdk-snap"}
    data = {name.removeprefix(f"{DATA}/") for name in names if name.startswith(DATA)}
    assert {f"share/man/man1/{page}.1" for page in pages} == {name for name in data if "/man/" in name}
    assert ".SH EXAMPLES" in page
    assert "_python_argcomplete" in bash
    assert "share/zsh/site-functions/_qemu-vmdk-snap" in data
    assert "share/fish/vendor_completions.d/qemu-vmdk-snap.fish" in data
    units = {f"lib/systemd/system/{path.name}" for path in (ROOT / "contrib/systemd").iterdir()}
    assert units == {name for name in data if name.startswith("lib/")}
    doc = "share/doc/qemu-vmdk-snap"
    assert {f"{doc}/{path.name}" for path in (ROOT / "docs").glob("*.*")} <= data
    assert {f"{doc}/examples/hooks.d/{path.name}" for path in (ROOT / "examples/hooks.d").iterdir()} <= data
    assert {f"{doc}/examples/probe/probe.asm", f"{doc}/examples/monitoring/alerts.yml"} <= data
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]


def test_the_sdist_is_enough_to_build_every_package(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in SOURCE:
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in names
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"} <= names
