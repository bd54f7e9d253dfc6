"""The units in contrib/ say what systemd understands, and call commands that exist with arguments that they take."""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
from pathlib import Path
from typing import cast

import pytest

from qemu_vmdk_snap.cli.commands import COMMANDS, TOP_LEVEL
from qemu_vmdk_snap.cli.main import CommandModule, make_parser

UNITS = Path(__file__).parents[3] / "contrib" / "systemd"


def settings(name: str) -> list[tuple[str, str]]:
    lines = (UNITS / name).read_text().splitlines()
    pairs = [line.partition("=") for line in lines if "=" in line and not line.startswith("#")]
    return [(key, value) for key, _, value in pairs]


def parsed(words: list[str]) -> argparse.Namespace:
    group, name, *rest = words
    command = COMMANDS[group][name]
    module = cast(CommandModule, importlib.import_module(command.module))
    return make_parser(module, command, "prog").parse_args(rest)


def test_the_service_creates_then_prunes() -> None:
    pairs = settings("qemu-vmdk-snap@.service")
    environment = dict(
        word.split("=", 1) for key, value in pairs if key == "Environment" for word in shlex.split(value)
    )
    lines = []
    for key, value in pairs:
        if key == "ExecStart":
            text = value.replace("%I", "'my domain'")
            for variable, content in environment.items():
                text = text.replace(f"${{{variable}}}", shlex.quote(content)).replace(f"${variable}", content)
            program, name, *words = shlex.split(text)
            assert (program, name) == ("/usr/bin/env", "qemu-vmdk-snap")
            lines.append(words)
    create, prune = (parsed(words) for words in lines)
    assert [words[:2] for words in lines] == [["snapshot", "create"], ["snapshot", "prune"]]
    assert (create.domain, create.connect, create.quiesce) == ("my domain", "qemu:///system", "auto")
    assert (prune.domain, prune.connect, prune.keep_hourly, prune.keep_weekly) == ("my domain", "qemu:///system", 24, 4)


def test_the_server_is_started_with_what_its_file_says() -> None:
    (line,) = [value for key, value in settings("qemu-vmdk-snap-serve@.service") if key == "ExecStart"]
    program, name, command, *words = shlex.split(line.replace("$OPTIONS", "--read-only").replace("${IMAGE}", "/a.vmdk"))
    assert (program, name, command) == ("/usr/bin/env", "qemu-vmdk-snap", "serve")
    module = cast(CommandModule, importlib.import_module(TOP_LEVEL[command].module))
    args = make_parser(module, TOP_LEVEL[command], "prog").parse_args(words)
    assert (args.filename, args.read_only, args.socket) == (Path("/a.vmdk"), True, None)


@pytest.mark.needs("systemd-analyze")
def test_systemd_understands_them(tmp_path: Path) -> None:
    paths = []
    for unit in UNITS.iterdir():
        paths.append(tmp_path / unit.name.replace("@", "@d1"))
        paths[-1].write_bytes(unit.read_bytes())
    assert len(paths) == 4
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
