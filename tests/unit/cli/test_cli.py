"""Does the command line find its commands, say what went wrong, and keep its promises about statuses and start-up?"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vmdk_snap import __version__, create_image, errors, image_info
from qemu_vmdk_snap.cli import exit_status
from qemu_vmdk_snap.cli.commands import COMMANDS, GROUPS, TOP_LEVEL, Command
from qemu_vmdk_snap.cli.demo import demo
from qemu_vmdk_snap.cli.demo.scenario import Demo, Point, Region, Seen
from qemu_vmdk_snap.cli.examples import EXAMPLES
from qemu_vmdk_snap.cli.line.parser import make_parser
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.cli.pages.catalogue import every_command
from qemu_vmdk_snap.cli.ui import Ui
from tests.support.schemas import check

EVERY = [(f"{group} {name}", c) for group, table in COMMANDS.items() for name, c in table.items()] + list(
    TOP_LEVEL.items()
)


@pytest.mark.parametrize(("name", "command"), EVERY, ids=[name for name, _ in EVERY])
def test_every_command_describes_itself(name: str, command: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: qemu-vmdk-snap {name} ")


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name, _ in EVERY)
    assert set(GROUPS) == set(COMMANDS)
    for group in GROUPS:
        if group in TOP_LEVEL:
            with pytest.raises(SystemExit):
                main([group, "--help"])
        else:
            assert main([group, "--help"]) == 0
        assert GROUPS[group] in " ".join(capsys.readouterr().out.split())


def test_without_words_the_help_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == exit_status.USAGE
    assert capsys.readouterr().err.startswith("usage:")


@pytest.mark.parametrize(
    "words", [["-q", "image", "create"], ["image", "-q", "create"], ["-c", "qemu:///system"], ["-x"]]
)
def test_an_option_in_front_of_the_command_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == exit_status.USAGE
    stray = next(word for word in words if word.startswith("-"))
    assert capsys.readouterr().err.startswith(f"qemu-vmdk-snap: no option '{stray}' here: options follow the command")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qemu-vmdk-snap {__version__}\n"


def test_each_error_class_has_a_status_of_its_own() -> None:
    ours = [cls for cls in vars(errors).values() if isinstance(cls, type) and errors.VmdkSnapError in cls.__bases__]
    statuses = [exit_status.BY_CLASS[cls] for cls in [*ours, OSError]]
    assert len(set(statuses)) == len(statuses)
    assert min(statuses) > 3
    assert exit_status.status_of(FileNotFoundError()) == exit_status.SYSTEM


def test_a_base_with_a_colon_in_its_name_is_no_protocol(tmp_path: Path) -> None:
    create_image(tmp_path / "r:b.vmdk", 1 << 20, durable=False)
    assert main(["image", "create", "-q", "-b", "r:b.vmdk", str(tmp_path / "top.vmdk")]) == 0
    assert image_info(tmp_path / "top.vmdk").hint == "./r:b.vmdk"  # QEMU reads "r:b.vmdk" as protocol "r"


def test_help_and_creating_start_without_the_heavy_modules(tmp_path: Path) -> None:
    create_image(tmp_path / "base.vmdk", 1 << 20, durable=False)
    create = ["image", "create", "-b", "base.vmdk", str(tmp_path / "top.vmdk")]
    for words, most in ((["--help"], 14), (["snapshot", "list", "--help"], 26), (create, 61)):
        code = f"from qemu_vmdk_snap.cli.main import main; main({words!r})"
        code = f"import atexit, sys; atexit.register(lambda: print(sorted(sys.modules))); {code}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.count("'qemu_vmdk_snap") <= most, f"{words}: the start imports more modules than it did"
        for heavy in ("numpy", "libvirt", "pexpect", "logging.config", "asyncio"):
            assert f"'{heavy}'" not in done.stdout, f"{words} imports {heavy}"


def test_only_an_unsafe_conversion_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_image(tmp_path / "base.vmdk", 1 << 20, durable=False)
    synced: list[int] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, synced.append)
    for words, waits in ([], True), (["-t", "none"], True), (["-t", "unsafe"], False):
        synced.clear()
        copy = tmp_path / "-".join(["copy", *words])
        assert main(["image", "convert", *words, str(tmp_path / "base.vmdk"), str(copy)]) == 0
        assert copy.exists()
        assert bool(synced) == waits, words
    with pytest.raises(SystemExit):
        main(["image", "convert", "-t", "quick", str(tmp_path / "base.vmdk"), str(tmp_path / "no")])


def test_output_to_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    create_image(tmp_path / "a.vmdk", 1 << 20, durable=False)
    line = f"'{sys.executable}' -m qemu_vmdk_snap image info '{tmp_path / 'a.vmdk'}' | true"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_an_error_is_one_line_even_when_its_message_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    Ui().error("two\nlines")
    assert capsys.readouterr().err == "qemu-vmdk-snap: two lines\n"


def test_every_command_takes_json() -> None:
    for name, command in EVERY:
        parser = make_parser(importlib.import_module(command.module), command, name)
        assert any("--output" in action.option_strings for action in parser._actions), name


def test_manual_pages_for_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manual", str(tmp_path / "man1")]) == 0
    pages = {path.name: path.read_text() for path in (tmp_path / "man1").iterdir()}
    assert len(pages) == len(EVERY) + 1
    page = pages["qemu-vmdk-snap-image-convert.1"]
    assert page.startswith(".TH QEMU\\-VMDK\\-SNAP\\-IMAGE\\-CONVERT 1")
    assert ".B \\-B, \\-\\-backing FILE" in page
    assert "(choose" not in page
    for text in pages.values():
        for title in ("NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "EXIT STATUS", "ENVIRONMENT", "SEE ALSO"):
            assert f"\n.SH {title}\n" in text
        assert not re.search(r"^\.SH DESCRIPTION\n\n", text, re.MULTILINE)
    assert ".B qemu\\-vmdk\\-snap image convert \\-O raw top.vmdk disk.raw" in page
    assert "\n.SH FILES\n" in pages["qemu-vmdk-snap-snapshot-create.1"]
    statuses = {str(status) for status in exit_status.BY_CLASS.values()}
    assert all(f".B {status}" in pages["qemu-vmdk-snap.1"] for status in statuses)


@pytest.mark.needs("mandoc")
def test_manual_pages_are_good_roff(tmp_path: Path) -> None:
    assert main(["manual", str(tmp_path)]) == 0
    words = ["mandoc", "-T", "lint", "-W", "warning", *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "missing date" not in line]
    assert said == []


@pytest.mark.parametrize(("name", "command"), EVERY, ids=[name for name, _ in EVERY])
def test_help_ends_with_examples_that_can_be_parsed(
    name: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    words = name.split()
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    examples = EXAMPLES[" ".join(words)]
    assert capsys.readouterr().out.partition("\nexamples:\n")[2].count("qemu-vmdk-snap ") >= len(examples)
    parser = make_parser(importlib.import_module(command.module), command, name)
    for line, _ in examples:
        typed = shlex.split(line.partition(" >")[0])
        assert typed[: len(words)] == words
        parser.parse_intermixed_args(typed[len(words) :])


def demo_that_ends(monkeypatch: pytest.MonkeyPatch, seen: int) -> None:
    def run(self: Demo) -> bool:
        region = Region("only", 1 << 20, bytearray(512))
        self.regions = [region]
        self.points = [Point("now", Path("disk.vmdk"), {"only": region.crc})]
        self.seen = [Seen("now", "disk.vmdk", "only", region.offset, 512, region.crc, seen)]
        return all(row.same for row in self.seen)

    monkeypatch.setattr(Demo, "run", run)


@pytest.mark.parametrize(("seen", "status", "word"), [(0xB2AA7578, 0, " ok"), (1, 1, "00000001 EXPECTED b2aa7578")])
def test_the_demo_fails_on_any_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seen: int, status: int, word: str
) -> None:
    demo_that_ends(monkeypatch, seen)
    assert demo.run(argparse.Namespace(keep=None, served=False), Ui()) == status
    assert word in capsys.readouterr().out
    assert demo.run(argparse.Namespace(keep=None, served=False), Ui(json_output=True)) == status
    assert check("demo", capsys.readouterr().out)["same"] is (status == 0)


def test_every_argument_is_in_the_catalogue() -> None:
    for entry in every_command():
        words = entry.words
        command = TOP_LEVEL[words[0]] if len(words) == 1 else COMMANDS[words[0]][words[1]]
        parser = make_parser(importlib.import_module(command.module), command, entry.parser.prog)
        assert entry.parser.format_usage() == parser.format_usage()
        names = {name for option in entry.options for name in option.option_strings}
        shown = parser.format_usage() + parser.format_help()
        assert {"-h", "--output", "--debug"} <= names
        assert {word for word in re.findall(r"(?<![\w-])--[a-z-]+", shown.split("\noptions:")[0])} <= names
