"""Every command with its arguments, for what is made of them: completion scripts and manual pages."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import NamedTuple, cast

from qemu_vmdk_snap.cli.commands import COMMANDS, TOP_LEVEL
from qemu_vmdk_snap.cli.main import PROGRAM, CommandModule, make_parser


class Entry(NamedTuple):
    """One command: its words behind the program's name, its line of help, and its arguments."""

    words: tuple[str, ...]
    help: str
    options: tuple[argparse.Action, ...]
    positionals: tuple[argparse.Action, ...]
    parser: argparse.ArgumentParser


def every_command() -> Iterator[Entry]:
    """Yield all commands, the grouped ones first."""
    rows = [((group, name), command) for group, table in COMMANDS.items() for name, command in table.items()]
    rows_alone = [((name,), command) for name, command in TOP_LEVEL.items()]
    for words, command in [*rows, *rows_alone]:
        module = cast(CommandModule, importlib.import_module(command.module))
        parser = make_parser(module, command, " ".join([PROGRAM, *words]))
        shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        options = tuple(action for action in shown if action.option_strings)
        positionals = tuple(action for action in shown if not action.option_strings)
        yield Entry(words, command.help, options, positionals, parser)


def takes_value(option: argparse.Action) -> bool:
    """Return whether the option is followed by a word."""
    return option.nargs != 0
