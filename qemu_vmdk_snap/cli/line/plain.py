"""What a command line says, without argparse where nothing about it is unusual.

Importing argparse and letting it build a parser takes as long as all of a short command's own work. A command adds its
arguments to a parser in the same words either way. `Plain` takes note of them and parses what is in order; for a line
with `--help`, an error, or anything that is not known here it gives up, and argparse parses it and says what it has to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

from qemu_vmdk_snap.cli.line.words import sorted_words
from qemu_vmdk_snap.light import Any, Final, NoReturn

HIDDEN: Final = "==SUPPRESS=="
"""The help of an option that no help shows: argparse's SUPPRESS."""

_FLAGS: Final = frozenset({"store_true", "store_false", "store_const", "append_const", "count"})
_DEFAULTS: Final = {"store_true": False, "store_false": True, "help": HIDDEN, "version": HIDDEN}
_KNOWN: Final = frozenset({"store", "append", "store_true", "store_false", "store_const", "count"})


class Unusual(Exception):
    """The line is one for argparse."""


class Found(SimpleNamespace):
    """What was parsed, as argparse's Namespace has it."""

    def __contains__(self, name: str) -> bool:
        """Return whether the command has an argument of that name."""
        return name in self.__dict__


class Argument:
    """One argument, as `add_argument` takes it."""

    def __init__(self, names: Sequence[str], options: dict[str, Any], group: Group | None) -> None:
        self.group = group
        self.action: str = options.get("action", "store")
        self.nargs: int | str | None = 0 if self.action in _FLAGS else options.get("nargs")
        self.choices: Iterable[Any] | None = options.get("choices")
        self.convert: Callable[[str], object] | None = options.get("type")
        self.const: object = options.get("const")
        self.required: bool = options.get("required", False)
        self.default: object = options.get("default", _DEFAULTS.get(self.action))
        if self.action in ("store_true", "store_false"):
            self.const = self.action == "store_true"
        long = next((name for name in names if name.startswith("--")), names[0])
        self.dest: str = options.get("dest") or long.lstrip("-").replace("-", "_")

    def value(self, word: str) -> object:
        """Return what a word says."""
        found: object = word
        if self.convert is not None:
            try:
                found = self.convert(word)
            except Exception as error:  # whatever it is: argparse meets it again, and knows what to say
                raise Unusual from error
        if self.choices is not None and found not in self.choices:
            raise Unusual
        return found


class Group:
    """Arguments of which only one may be given."""

    def __init__(self, parser: Plain, required: bool) -> None:
        self._parser = parser
        self.required = required
        self.given = 0

    def add_argument(self, *names: str, **options: Any) -> None:  # noqa: ANN401 - as argparse has it
        """Take note of an argument."""
        self._parser.add_argument(*names, group=self, **options)


class Plain:
    """A parser for what is usual; it has of argparse's what commands use."""

    def __init__(self) -> None:
        self._options: dict[str, Argument] = {}
        self._positionals: list[Argument] = []
        self._groups: list[Group] = []
        self._defaults: dict[str, object] = {}

    def add_argument(self, *names: str, group: Group | None = None, **options: Any) -> None:  # noqa: ANN401
        """Take note of an argument."""
        argument = Argument(names, options, group)
        if names[0].startswith("-"):
            self._options |= dict.fromkeys(names, argument)
        else:
            self._positionals.append(argument)

    def add_mutually_exclusive_group(self, *, required: bool = False) -> Group:
        """Take note of a group."""
        self._groups.append(Group(self, required))
        return self._groups[-1]

    def set_defaults(self, **values: object) -> None:
        """Take note of values that no word says."""
        self._defaults |= values

    def parse(self, words: Iterable[str], plain: Sequence[str]) -> Found:
        """Return what the words say.

        Raises:
            Unusual: argparse is to say what is wrong with them, or to parse what is not known here.
        """
        ordered = sorted_words(words, self._options, _unusual, plain=plain)
        found = Found()
        for argument in [*self._options.values(), *self._positionals]:
            if argument.default != HIDDEN and argument.dest not in found:  # of two with one name the first counts
                setattr(found, argument.dest, argument.default)
        for name, value in self._defaults.items():
            setattr(found, name, value)
        at, seen = 0, set()
        while at < len(ordered) and ordered[at] != "--":
            at, argument = self._option(ordered, at, found)
            seen.add(argument)
        self._rest(ordered[at + 1 :], found)
        self._check(seen)
        for argument in [*self._options.values(), *self._positionals]:
            value = getattr(found, argument.dest, None)
            if isinstance(value, str) and value is argument.default and argument.convert is not None:
                setattr(found, argument.dest, argument.value(value))
        return found

    def _option(self, words: list[str], at: int, found: Found) -> tuple[int, Argument]:
        """Take one option, as `sorted_words` writes it; return where the next one is."""
        word = words[at]
        long = word.startswith("--")
        name, equals, text = word.partition("=") if long else (word[:2], word[2:], word[2:])
        argument = self._options[name]
        if argument.action not in _KNOWN:
            raise Unusual
        if argument.nargs == 0:
            before = getattr(found, argument.dest)
            value = (before or 0) + 1 if argument.action == "count" else argument.const
            setattr(found, argument.dest, value)
        elif argument.nargs not in (None, "?"):
            raise Unusual
        elif not equals and argument.nargs == "?":
            setattr(found, argument.dest, argument.const)
        else:
            if not long and not equals:  # an empty value is a word of its own
                at, text = at + 1, words[at + 1]
            if text == "--" or (not long and text.startswith("=")):  # argparse has its own way with these
                raise Unusual
            value = argument.value(text)
            if argument.action == "append":
                value = [*(getattr(found, argument.dest) or ()), value]
            setattr(found, argument.dest, value)
        return at + 1, argument

    def _rest(self, words: list[str], found: Found) -> None:
        """Give the words to the positional arguments: as many to each as those after it leave."""
        if "--" in words:  # a second one
            raise Unusual
        needed = [int(argument.nargs in (None, "+")) for argument in self._positionals]
        if any(argument.nargs not in (None, "?", "*", "+") for argument in self._positionals):
            raise Unusual
        for number, argument in enumerate(self._positionals):
            left = len(words) - sum(needed[number + 1 :])
            many = argument.nargs in ("*", "+")
            count = max(left, 0) if many else min(max(left, 0), 1)
            taken, words = words[:count], words[count:]
            if len(taken) < needed[number]:
                raise Unusual
            if many:
                if taken or argument.default is None:
                    setattr(found, argument.dest, [argument.value(word) for word in taken])
            elif taken:
                setattr(found, argument.dest, argument.value(taken[0]))
        if words:
            raise Unusual

    def _check(self, seen: set[Argument]) -> None:
        for group in self._groups:
            given = sum(argument.group is group for argument in seen)
            if given > 1 or (group.required and not given):
                raise Unusual
        if any(argument.required and argument not in seen for argument in self._options.values()):
            raise Unusual


def _unusual(message: str) -> NoReturn:
    raise Unusual(message)
