"""Does the parser of plain lines say what argparse says, and leave to it what is not plain?"""

from __future__ import annotations

import argparse
import importlib
import shlex
from typing import cast

import pytest

from qemu_vmdk_snap.cli.commands import COMMANDS, TOP_LEVEL, CommandModule, add_arguments
from qemu_vmdk_snap.cli.examples import EXAMPLES
from qemu_vmdk_snap.cli.exit_status import UsageError
from qemu_vmdk_snap.cli.line.parser import make_parser, parse
from qemu_vmdk_snap.cli.line.plain import HIDDEN, Plain, Unusual
from qemu_vmdk_snap.cli.line.words import NUMBERS, is_named, with_values

MORE = [
    "image info -U --output json x.vmdk",
    "image info --output=json -Uq --allow-dir a --allow-dir=b x.vmdk",
    "image info -- -x.vmdk",
    "image create x.vmdk -f vmdk 1G",
    "image create -b base -F vmdk x.vmdk 16M",
    "image create -o a=b -oc=d,e -q x.vmdk 1G",
    "image convert -n -p -c a.vmdk b.vmdk c.vmdk",
    "image convert -O raw -S 4k -m 8 -t unsafe a.vmdk b.raw",
    "image rebase -b '' x.vmdk",
    "image resize x.vmdk -1G",
    "image check -r all -T none x.vmdk",
    "snapshot list --tree web",
    "snapshot create web s1 --quiesce",
    "snapshot create --disk-only --diskspec vda,snapshot=no --diskspec vdb web",
    "monitor age -w 3 -c 5 web db",
]
WRONG = [
    "image info",
    "image info a b",
    "image info --nonsense x.vmdk",
    "image info --output yaml x.vmdk",
    "image info --backing-chain=yes x.vmdk",
    "image check -r some x.vmdk",
    "image check -r",
    "image convert -m 900 a.vmdk b.vmdk",
    "image rebase x.vmdk",
    "image convert -r 0 a.vmdk b.vmdk",
    "snapshot list --tree --name web",
    "image info --help",
]


def of(line: str) -> tuple[CommandModule, list[str], argparse.Namespace]:
    """Return the command's module, its words, and what argparse makes of them."""
    words = shlex.split(line.partition(" >")[0])
    known = len(words) > 1 and words[1] in COMMANDS.get(words[0], {})
    command, rest = (COMMANDS[words[0]][words[1]], words[2:]) if known else (TOP_LEVEL[words[0]], words[1:])
    module = cast(CommandModule, importlib.import_module(command.module))
    return module, rest, parse(make_parser(module, command, "prog", width=80), module, rest)


def plainly(module: CommandModule, rest: list[str]) -> dict[str, object]:
    parser = Plain()
    add_arguments(module, cast(argparse.ArgumentParser, parser))
    return vars(parser.parse(with_values(module, rest), NUMBERS))


@pytest.mark.parametrize("line", [*[line for lines in EXAMPLES.values() for line, _ in lines], *MORE])
def test_a_plain_line_says_the_same(line: str) -> None:
    module, rest, expected = of(line)
    if is_named(rest):
        pytest.fail("such lines are argparse's alone: take the example out of this list")
    assert plainly(module, rest) == vars(expected)


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_left_to_argparse(line: str) -> None:
    with pytest.raises((UsageError, SystemExit)):
        of(line)
    words = shlex.split(line)
    module = cast(CommandModule, importlib.import_module(COMMANDS[words[0]][words[1]].module))
    with pytest.raises(Unusual):
        plainly(module, words[2:])


def test_what_is_hidden_has_the_name_that_argparse_gives_it() -> None:
    assert HIDDEN == argparse.SUPPRESS
