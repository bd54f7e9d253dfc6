"""A command's parser as argparse has it: for help, for errors, and for lines that `plain` leaves to it."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from qemu_vmdk_snap.cli import exit_status
from qemu_vmdk_snap.cli.commands import COMMANDS, GROUPS, PROGRAM, Command, CommandModule, add_arguments
from qemu_vmdk_snap.cli.line.words import HELP, NUMBERS, is_named, sorted_words, with_values
from qemu_vmdk_snap.errors import printable
from qemu_vmdk_snap.light import Final, NoReturn

_ANY_WIDTH: Final = 80


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise exit_status.UsageError(f"{self.prog}: {printable(message)} (try {self.prog} --help)")

    def parse_sorted(self, words: Sequence[str], found: argparse.Namespace | None = None) -> argparse.Namespace:
        """Return what the words say, options wherever they are among them; a size such as -1G is no option."""
        return self.parse_args(sorted_words(words, self._option_string_actions, self.error, plain=NUMBERS), found)


def make_parser(module: CommandModule, command: Command, prog: str, *, width: int | None = None) -> Parser:
    """Return the argument parser of one command, with the options that all of them have.

    Its help is `width` columns wide; None asks the terminal.
    """
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=width)
    parser = Parser(prog=prog, description=command.help, allow_abbrev=False, formatter_class=formatter)
    group = prog.removeprefix(f"{PROGRAM} ")
    also = ""
    if group in COMMANDS:  # `serve` is a command and a group
        names = ", ".join(f"{group} {name}" for name in COMMANDS[group])
        also = f"Also: {names} ({GROUPS[group]})"
    if width is None:
        from qemu_vmdk_snap.cli.examples import as_text

        parser.epilog = "\n\n".join(text for text in (also, as_text(prog)) if text)
    add_arguments(module, parser)
    return parser


def parser_for(module: CommandModule, command: Command, prog: str, rest: Sequence[str]) -> Parser:
    """Return the parser for one line; the width of the terminal matters only for help, and is asked only for that."""
    return make_parser(module, command, prog, width=None if HELP & set(rest) else _ANY_WIDTH)


def parse(parser: Parser, module: CommandModule, rest: Sequence[str]) -> argparse.Namespace:
    """Return what the words of a command say.

    Raises:
        UsageError: they cannot be parsed.
        Unsupported: a name means something else than a file.
    """
    words, found = _as_positionals(module, with_values(module, rest))
    return parser.parse_sorted(words, found)


def _as_positionals(module: CommandModule, rest: list[str]) -> tuple[list[str], argparse.Namespace | None]:
    """Return the words, with those that virsh lets name by an option (`--domain web`) in place, and what is parsed."""
    if not is_named(rest):
        return rest, None
    from qemu_vmdk_snap.cli.line.named import as_positionals

    return as_positionals(module, rest)
