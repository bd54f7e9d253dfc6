"""The words and the order of virsh: options before, between and after the names, and names given as options."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from qemu_vmdk_snap.cli import commands
from qemu_vmdk_snap.cli.commands import COMMANDS
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.units import KIB, MIB


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """Return what the commands would have been run with: none of them is."""
    seen: list[argparse.Namespace] = []
    for name in COMMANDS["snapshot"].values():

        def run(args: argparse.Namespace, ui: Ui) -> None:
            seen.append(args)

        monkeypatch.setattr(importlib.import_module(name.module), "run", run)
    return seen


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("delete web s1 --children", ("web", "s1", "children")),
        ("delete --children web s1", ("web", "s1", "children")),
        ("delete web --children s1", ("web", "s1", "children")),
        ("delete -c qemu:///system web --metadata s1", ("web", "s1", "one")),
        ("delete --domain web --snapshotname s1", ("web", "s1", "one")),
        ("delete --domain=web s1", ("web", "s1", "one")),
        ("delete --snapshotname s1 --children web", ("web", "s1", "children")),
        ("delete web --snapshotname s1 --orphan web", ("web", "s1", "one")),
        ("delete --domain web --current", ("web", None, "one")),
        ("clone web s1 new", ("web", "s1", "new")),
        ("clone web new", ("web", None, "new")),
        ("clone --full web s1 --dir d new", ("web", "s1", "new")),
        ("clone --snapshotname s1 new --domain web", ("web", "s1", "new")),
        ("create --quiesce web s1", ("web", "s1", "require")),
        ("create --quiesce=auto web s1", ("web", "s1", "auto")),
        ("create web --quiesce no s1", ("web", "s1", "no")),
        ("create web s1 --quiesce", ("web", "s1", "require")),
        ("create --domain web --quiesce --name s1", ("web", None, "require")),
        ("list --domain web --tree", ("web", None, None)),
        ("info --domain web --snapshotname -- s1", None),
    ],
)
def test_the_names_are_found(
    parsed: list[argparse.Namespace], line: str, expected: tuple[str | None, ...] | None
) -> None:
    if expected is None:
        with pytest.raises(SystemExit) as stop:
            main(["snapshot", *line.split()])
        assert stop.value.code == 64
        return
    assert main(["snapshot", *line.split()]) == 0
    (args,) = parsed
    third = next((getattr(args, name) for name in ("scope", "newname", "quiesce") if name in args), None)
    assert (args.domain, getattr(args, "snapshotname", None), third) == expected


def test_what_options_say_is_kept(parsed: list[argparse.Namespace]) -> None:
    assert main(["snapshot", "delete", "--domain", "web", "s1", "--orphan", "a", "--output", "json", "-n"]) == 0
    (args,) = parsed
    assert (args.orphan, args.output_format, args.dry_run, args.connect) == ([Path("a")], "json", True, None)


def test_a_wrong_option_is_told_as_ever(parsed: list[argparse.Namespace], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["snapshot", "delete", "--domain", "web", "--no-such"])
    assert (stop.value.code, parsed) == (64, [])
    assert "no option '--domain'" in capsys.readouterr().err
    assert commands.PROGRAM == "qemu-vmdk-snap"


@pytest.mark.parametrize(("word", "rate"), [("50", 50 * MIB), ("512K", 512 * KIB), ("1.5M", 3 * MIB // 2)])
def test_a_bandwidth_is_mib_a_second_unless_it_says_otherwise(
    parsed: list[argparse.Namespace], word: str, rate: int
) -> None:
    assert main(["snapshot", "delete", "web", "s1", "--bandwidth", word]) == 0
    assert parsed[0].bandwidth == rate


@pytest.mark.parametrize("word", ["0", "0K", "-1", "fast"])
def test_a_bandwidth_is_some_number_of_bytes(capsys: pytest.CaptureFixture[str], word: str) -> None:
    with pytest.raises(SystemExit, match="64"):
        main(["snapshot", "delete", "web", "s1", f"--bandwidth={word}"])
    assert "--bandwidth" in capsys.readouterr().err
