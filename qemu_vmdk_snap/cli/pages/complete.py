"""What a shell is offered at TAB: argcomplete asks the program itself, once it sees `_ARGCOMPLETE` in the environment.

Only the command on the line is imported, and libvirt only where a domain, a snapshot or a disk is asked for. Nothing is
printed and nothing fails: where the answer is not known there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from qemu_vmdk_snap.cli.commands import COMMANDS, GROUPS, PROGRAM, TOP_LEVEL, Command, CommandModule, add_arguments
from qemu_vmdk_snap.errors import VmdkSnapError
from qemu_vmdk_snap.light import Any, Final, cast

Completer = Callable[..., Iterable[str]]

_URIS: Final = ("qemu:///system", "qemu:///session")


def answer() -> None:
    """Write what the shell is offered, and end the process."""
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()[1:]
    # Options are offered when a word begins with a dash: before that they would hide the names.
    argcomplete.autocomplete(parser_of(words), always_complete_options=False)


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    """Return a parser of the whole program, in which the command of the line alone has its arguments."""
    parser = argparse.ArgumentParser(PROGRAM, allow_abbrev=False)
    parser.add_argument("--version", "-V", action="store_true")
    groups = parser.add_subparsers()
    for group, table in COMMANDS.items():
        names = groups.add_parser(group, help=GROUPS[group], allow_abbrev=False)
        if words[:1] == [group]:
            second, alone = "".join(words[1:2]), TOP_LEVEL.get(group)
            if alone is not None and not any(name.startswith(second) for name in table):
                _add(names, alone, wanted=True)  # `serve IMAGE`, not `serve start`
                continue
            inner = names.add_subparsers()
            for name, command in table.items():
                _add(inner.add_parser(name, help=command.help, allow_abbrev=False), command, words[1:2] == [name])
    for name, command in TOP_LEVEL.items():
        if name not in COMMANDS:
            _add(groups.add_parser(name, help=command.help, allow_abbrev=False), command, words[:1] == [name])
    return parser


def _add(parser: argparse.ArgumentParser, command: Command, wanted: bool) -> None:
    if wanted:
        listed = _Completing(parser)
        add_arguments(cast(CommandModule, importlib.import_module(command.module)), cast(Any, listed))


class _Completing:
    """Takes the place of a parser while arguments are added, and gives each what completes it."""

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 - a parser, or a group of one
        self._inner = inner

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # noqa: ANN401 - argparse's own
        if not names[0].startswith("-") and options.get("nargs") == "?":
            del options["nargs"]  # else it is taken as left out as soon as an option follows
        action: argparse.Action = self._inner.add_argument(*names, **options)
        completer = _completer(action)
        if completer is not None:
            cast(Any, action).completer = completer
        return action

    def add_mutually_exclusive_group(self, *, required: bool = False) -> _Completing:
        return _Completing(self._inner.add_mutually_exclusive_group(required=required))

    def set_defaults(self, **defaults: object) -> None:
        self._inner.set_defaults(**defaults)


def _completer(action: argparse.Action) -> Completer | None:
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter

    if action.choices:
        return None
    if action.dest == "domain":
        return _domains
    if action.dest in ("snapshotname", "start"):
        return _snapshots
    if action.dest == "diskspec":
        return _disks
    if action.dest == "connect":
        return lambda **_: _URIS
    if action.metavar == "DIR":
        return cast(Completer, DirectoriesCompleter())
    is_path = action.type is Path or action.dest in ("filename", "output_filename", "path", "base", "top", "backing")
    return cast(Completer, FilesCompleter()) if is_path else _nothing


def _nothing(**_: object) -> Iterable[str]:
    return ()


def _domains(*, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    from qemu_vmdk_snap.domain.names import domain_names

    with contextlib.suppress(VmdkSnapError, OSError):
        return domain_names(getattr(parsed_args, "connect", None))
    return []


def _snapshots(*, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    from qemu_vmdk_snap.domain.names import snapshot_names

    with contextlib.suppress(VmdkSnapError, OSError):
        return snapshot_names(getattr(parsed_args, "connect", None), str(getattr(parsed_args, "domain", "")))
    return []


def _disks(*, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    from qemu_vmdk_snap.domain.names import disk_names

    with contextlib.suppress(VmdkSnapError, OSError):
        return disk_names(getattr(parsed_args, "connect", None), str(getattr(parsed_args, "domain", "")))
    return []
