"""The words of a command line in the order that argparse reads best: options first, each with its value, then the rest.

qemu-img and virsh take options before, between and behind the other words. argparse does not, where a word is optional,
and what it says of an option that it does not know is about the option's value. So the words are sorted here, as
getopt_long sorts them, and what is unknown or incomplete is named.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from qemu_vmdk_snap.light import Any, Final, NoReturn, Protocol

HELP: Final = frozenset({"-h", "--help"})
NUMBERS: Final = tuple(f"-{digit}" for digit in range(10))
"""How a word begins that is a number, not an option."""
_NAMED: Final = frozenset({"--domain", "--snapshotname"})
"""What virsh calls its positional arguments where they are given as options."""
_ENDS: Final = "--"


class Option(Protocol):
    """What has to be known of an option: argparse's own record of it."""

    @property
    def nargs(self) -> int | str | None:
        """How many words follow it: 0 for a flag, None for one value, "?" for one that may be left out."""

    @property
    def choices(self) -> Iterable[Any] | None:
        """The values that it takes, where only some can be."""


def sorted_words(
    words: Iterable[str], options: Mapping[str, Option], wrong: Callable[[str], NoReturn], *, plain: Sequence[str] = ()
) -> list[str]:
    """Return `words` with the options first, values attached to theirs, and then the rest, behind `--`.

    `options` are the known ones by name. Words that begin like those of `plain` are no options. `wrong` is called with
    what to say of an option that is unknown, or lacks its value, or has one that it does not take.
    """
    first: list[str] = []
    rest: list[str] = []
    left = deque(words)
    while left:
        word = left.popleft()
        if word == _ENDS:
            rest += left
            left.clear()
        elif len(word) < 2 or word[0] != "-" or any(word.startswith(start) for start in plain):
            rest.append(word)
        elif word.startswith(_ENDS):
            first += _long(word, left, options, wrong)
        else:
            first += _short(word, left, options, wrong)
    return [*first, _ENDS, *rest] if rest else first


def _long(word: str, left: deque[str], options: Mapping[str, Option], wrong: Callable[[str], NoReturn]) -> list[str]:
    name, equals, value = word.partition("=")
    option = options.get(name)
    if option is None:
        wrong(f"no option {name!r}")
    if option.nargs == 0:
        if equals:
            wrong(f"option {name!r} takes no value")
        return [name]
    # A value that may be left out is taken where it can be one: what follows may as well be the next argument.
    if option.nargs == "?" and not equals and not (left and left[0] in (option.choices or ())):
        return [name]
    return [f"{name}={value if equals else _value(name, left, wrong)}"]


def _short(word: str, left: deque[str], options: Mapping[str, Option], wrong: Callable[[str], NoReturn]) -> list[str]:
    found: list[str] = []
    for at in range(1, len(word)):
        name = f"-{word[at]}"
        option = options.get(name)
        if option is None:
            wrong(f"no option {name!r}" + (f" (in {word!r})" if len(word) > 2 else ""))
        if option.nargs != 0:
            value = word[at + 1 :] or _value(name, left, wrong)
            # An empty value cannot be attached, and one that begins with a dash must be.
            return [*found, *([name + value] if value else [name, ""])]
        found.append(name)
    return found


def _value(name: str, left: deque[str], wrong: Callable[[str], NoReturn]) -> str:
    if not left:
        wrong(f"option {name!r} needs a value")
    return left.popleft()


def is_named(words: Iterable[str]) -> bool:
    """Return whether an option among `words` stands for a positional argument."""
    return any(word.partition("=")[0] in _NAMED for word in words)


def with_values(module: object, rest: Sequence[str]) -> list[str]:
    """Return the words with the value of each option that may be without: virsh's `--quiesce NAME` names a domain."""
    optional: dict[str, tuple[str, ...]] = getattr(module, "OPTIONAL_VALUES", {})
    words = []
    for word, following in itertools.zip_longest(rest, rest[1:]):
        alone = word in optional and following not in optional[word]
        words.append(f"{word}={optional[word][0]}" if alone else word)
    return words
