"""Are options found wherever they are among the words, and those that are wrong named?"""

from __future__ import annotations

import argparse
from typing import NoReturn

import pytest

from qemu_vmdk_snap.cli.line.words import sorted_words


class WrongError(Exception):
    pass


def wrong(message: str) -> NoReturn:
    raise WrongError(message)


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("-U", "--force-share", action="store_true")
    parser.add_argument("-b", "--backing")
    parser.add_argument("-o", action="append")
    parser.add_argument("--quiesce", nargs="?", choices=("auto", "no"), const="auto", default="no")
    parser.add_argument("one", nargs="?")
    parser.add_argument("two", nargs="?")
    return parser


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a", "-q", "b"], {"quiet": True, "one": "a", "two": "b"}),
        (["a", "b", "-qU"], {"quiet": True, "force_share": True, "one": "a", "two": "b"}),
        (["-qbx", "a"], {"quiet": True, "backing": "x", "one": "a"}),
        (["a", "-b", "-x"], {"backing": "-x", "one": "a"}),
        (["a", "-b", ""], {"backing": "", "one": "a"}),
        (["a", "--backing", "--quiet"], {"backing": "--quiet", "one": "a"}),
        (["a", "--backing=", "-q"], {"backing": "", "quiet": True, "one": "a"}),
        (["-o", "x=1", "a", "-oy=2"], {"o": ["x=1", "y=2"], "one": "a"}),
        (["--", "-q", "-b"], {"one": "-q", "two": "-b"}),
        (["a", "-1G"], {"one": "a", "two": "-1G"}),
        (["-"], {"one": "-"}),
        (["a", "--quiesce"], {"one": "a", "quiesce": "auto"}),
        (["--quiesce", "a"], {"one": "a", "quiesce": "auto"}),
        (["--quiesce", "no", "a"], {"one": "a", "quiesce": "no"}),
        (["--quiesce=no", "a", "-q"], {"one": "a", "quiesce": "no", "quiet": True}),
        ([], {}),
    ],
)
def test_the_order_does_not_matter(parser: argparse.ArgumentParser, words: list[str], found: dict[str, object]) -> None:
    nothing = vars(parser.parse_args([]))
    sorted_ = sorted_words(words, parser._option_string_actions, wrong, plain=["-1"])
    assert vars(parser.parse_args(sorted_)) == nothing | found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "--colour", "red"], "no option '--colour'"),
        (["a", "--colour=red"], "no option '--colour'"),
        (["-x"], "no option '-x'"),
        (["-qx"], "no option '-x' (in '-qx')"),
        (["-b"], "option '-b' needs a value"),
        (["a", "--backing"], "option '--backing' needs a value"),
        (["--quiet=yes"], "option '--quiet' takes no value"),
    ],
)
def test_what_is_wrong_is_named(parser: argparse.ArgumentParser, words: list[str], said: str) -> None:
    with pytest.raises(WrongError) as caught:
        sorted_words(words, parser._option_string_actions, wrong)
    assert str(caught.value) == said
