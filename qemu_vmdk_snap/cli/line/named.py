"""Positional arguments given as options, as virsh has them: `--domain web --snapshotname s1` is `web s1`."""

from __future__ import annotations

import argparse
from typing import Any, Final, Protocol

from qemu_vmdk_snap.cli.exit_status import UsageError

NAMES: Final = ("domain", "snapshotname")


class _Module(Protocol):
    def configure(self, parser: argparse.ArgumentParser) -> None: ...


class _OptionsOnly(argparse.ArgumentParser):
    """Takes the options of a command, and lists its positional arguments instead of taking them."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.positionals: list[str] = []
        self.own: set[str] = set()

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # noqa: ANN401 - argparse's own
        """Add an option; note a positional argument."""
        if not names[0].startswith("-"):
            self.positionals.append(names[0])
            return argparse.Action([], names[0])
        self.own |= {*names}
        return super().add_argument(*names, **options)

    def error(self, message: str) -> Any:  # noqa: ANN401 - as argparse has it
        """Leave it to the parser of the command, whose words it is about."""
        raise UsageError(message)


def as_positionals(module: _Module, words: list[str]) -> tuple[list[str], argparse.Namespace | None]:
    """Return the positional words in their order, those that options named among them, and what the other options say.

    A command that has an option of that name keeps it. What cannot be parsed is returned as it is, with None.
    """
    parser = _OptionsOnly()
    module.configure(parser)
    mine = [name for name in NAMES if name in parser.positionals and f"--{name}" not in parser.own]
    for name in mine:
        parser.add_argument(f"--{name}", dest=f"named_{name}")
    parser.add_argument("--output", dest="output_format", choices=("human", "json"), default="human")
    parser.add_argument("--debug", action="store_true")
    try:
        found, given = parser.parse_known_args(words)
    except UsageError:
        return words, None
    given = [word for word in given if word != "--"]
    if any(word.startswith("-") for word in given):
        return words, None
    for name in sorted(mine, key=parser.positionals.index):
        value = getattr(found, f"named_{name}")
        if value is not None:
            given.insert(parser.positionals.index(name), value)
    return ["--", *given], found
