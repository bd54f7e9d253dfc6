"""Every command with its arguments, for completion scripts and manual pages."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

from qemu_vmdk_snap.cli.commands import COMMANDS, PROGRAM, TOP_LEVEL, CommandModule, add_arguments
from qemu_vmdk_snap.light import Any, NamedTuple, cast


class Entry(NamedTuple):
    """One command: its words behind the program's name, its line of help, and its arguments."""

    words: tuple[str, ...]
    help: str
    description: str
    """What the command does, in a sentence or two."""
    options: tuple[argparse.Action, ...]
    positionals: tuple[argparse.Action, ...]
    parser: argparse.ArgumentParser


class _Listed:
    """Replaces a parser while arguments are added, and lists them: argparse itself cannot list them."""

    def __init__(
        self,
        inner: Any,  # noqa: ANN401 - a parser, or a group of one
        actions: list[argparse.Action] | None = None,
    ) -> None:
        self._inner = inner
        self.actions: list[argparse.Action] = [] if actions is None else actions

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # noqa: ANN401 - argparse's own
        self.actions.append(self._inner.add_argument(*names, **options))
        return self.actions[-1]

    def add_mutually_exclusive_group(self, *, required: bool = False) -> _Listed:
        return _Listed(self._inner.add_mutually_exclusive_group(required=required), self.actions)

    def set_defaults(self, **defaults: object) -> None:
        self._inner.set_defaults(**defaults)


def every_command() -> Iterator[Entry]:
    """Yield all commands, the grouped ones first."""
    rows = [((group, name), command) for group, table in COMMANDS.items() for name, command in table.items()]
    rows_alone = [((name,), command) for name, command in TOP_LEVEL.items()]
    for words, command in [*rows, *rows_alone]:
        module = cast(CommandModule, importlib.import_module(command.module))
        parser = argparse.ArgumentParser(" ".join([PROGRAM, *words]), add_help=False)
        listed = _Listed(parser)
        listed.add_argument("-h", "--help", action="help", help="show this help message and exit")
        add_arguments(module, cast(argparse.ArgumentParser, listed))
        shown = [action for action in listed.actions if action.help != argparse.SUPPRESS]
        options = tuple(action for action in shown if action.option_strings)
        positionals = tuple(action for action in shown if not action.option_strings)
        yield Entry(words, command.help, _description(module.__doc__ or ""), options, positionals, parser)


def _description(doc: str) -> str:
    """Return the first paragraph of a command's module without the command's name, as sentences."""
    text = " ".join(doc.split("\n\n")[0].split()).partition(": ")[2].replace("`", "")
    return text[:1].upper() + text[1:]


def takes_value(option: argparse.Action) -> bool:
    """Return whether the option is followed by a word."""
    return option.nargs != 0
