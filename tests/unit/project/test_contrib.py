"""The units in contrib/ say what systemd understands, and call commands that exist with arguments that they take."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import cast

import pytest

from qemu_vmdk_snap.cli.commands import COMMANDS, TOP_LEVEL, CommandModule
from qemu_vmdk_snap.cli.line.parser import make_parser
from qemu_vmdk_snap.cli.monitor.exposition import HELP

UNITS = Path(__file__).parents[3] / "contrib" / "systemd"
MONITORING = UNITS.parent / "monitoring"


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


def test_the_metrics_service_calls_the_command() -> None:
    pairs = dict(settings("qemu-vmdk-snap-metrics.service"))
    program, name, command, *words = shlex.split(
        pairs["ExecStart"].replace("${CONNECT}", "uri").replace("${TEXTFILE}", "f")
    )
    assert (program, name, command) == ("/usr/bin/env", "qemu-vmdk-snap", "metrics")
    module = cast(CommandModule, importlib.import_module(TOP_LEVEL[command].module))
    args = make_parser(module, TOP_LEVEL[command], "prog").parse_args(words)
    assert (args.connect, args.textfile) == ("uri", Path("f"))


def test_rules_and_dashboard_ask_for_metrics_that_there_are() -> None:
    known = {f"qemu_vmdk_snap_{metric}" for metric in HELP}
    alerts = set(re.findall(r"qemu_vmdk_snap_\w+", (MONITORING / "alerts.yml").read_text()))
    board = json.loads((MONITORING / "dashboard.json").read_text())
    shown = set(re.findall(r"qemu_vmdk_snap_\w+", json.dumps([board["panels"], board["templating"]])))
    assert alerts <= known
    assert shown <= known
    assert known - alerts - shown == {"qemu_vmdk_snap_last_run_duration_seconds"}
    page = (UNITS.parents[1] / "docs" / "monitoring.md").read_text()
    assert [metric for metric in HELP if f"`{metric}`" not in page] == []


@pytest.mark.needs("promtool")
def test_the_rules_fire_when_they_should() -> None:
    command = ["promtool", "test", "rules", "alerts_test.yml"]
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    named = re.findall(r"alert: (\w+)", (MONITORING / "alerts.yml").read_text())
    tests = (MONITORING / "alerts_test.yml").read_text()
    assert [name for name in named if tests.count(name) < 2] == []  # one test where it fires, one where it does not


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
    assert len(paths) == 6
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
