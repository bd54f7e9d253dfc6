"""Whatever the words of a line are: what is parsed without argparse is what argparse says, and it never says more."""

from __future__ import annotations

import argparse
import functools
import importlib
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_vmdk_snap.cli.commands import COMMANDS, TOP_LEVEL, Command, CommandModule, add_arguments
from qemu_vmdk_snap.cli.exit_status import UsageError
from qemu_vmdk_snap.cli.line.parser import Parser, make_parser, parse
from qemu_vmdk_snap.cli.line.plain import Plain, Unusual
from qemu_vmdk_snap.cli.line.words import HELP, NUMBERS, is_named, with_values

# fmt: off
VALUES = [
    "x.vmdk", "web", "1G", "-1G", "0", "0x1000", "", "a=b", "json", "all", "vmdk", "raw", "none", "-", "--", "a,b",
]
# fmt: on
EVERY = {
    **{f"{group} {name}": command for group, commands in COMMANDS.items() for name, command in commands.items()},
    **TOP_LEVEL,
}


@functools.cache
def parser_of(command: Command) -> tuple[CommandModule, Parser]:
    module = cast(CommandModule, importlib.import_module(command.module))
    return module, make_parser(module, command, "prog", width=80)


def lines(parser: Parser) -> st.SearchStrategy[list[str]]:
    """Return lines of the command's own options, their choices, and other words."""
    names = sorted(set(parser._option_string_actions) - HELP)
    choices = [str(one) for action in parser._actions for one in action.choices or ()]
    word = st.one_of(
        st.sampled_from(names),
        st.sampled_from(VALUES + choices),
        st.builds(lambda name, value: f"{name}={value}", st.sampled_from(names), st.sampled_from(VALUES + choices)),
        st.builds(lambda name, value: name[-2:] + value, st.sampled_from(names), st.sampled_from(VALUES + choices)),
    )
    return st.lists(word, max_size=6)


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=30)
@given(data=st.data())
def test_a_line_means_the_same_to_both(name: str, data: st.DataObject) -> None:
    module, parser = parser_of(EVERY[name])
    words = data.draw(lines(parser))
    if is_named(words) or HELP & set(words):
        return
    plain = Plain()
    add_arguments(module, cast(argparse.ArgumentParser, plain))
    try:
        found = vars(plain.parse(with_values(module, words), NUMBERS))
    except Unusual:
        return
    try:
        expected = vars(parse(parser, module, words))
    except (UsageError, SystemExit) as error:
        raise AssertionError(f"argparse refuses the line: {error}") from error
    assert repr(found) == repr(expected) or found == expected
