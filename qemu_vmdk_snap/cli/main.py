"""The entry point: find the command, import only its module, run it, turn an error into one line and a status."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, Protocol, cast

from qemu_vmdk_snap.chain.look.notes import listening
from qemu_vmdk_snap.cli import exit_status
from qemu_vmdk_snap.cli.commands import COMMANDS, GROUPS, TOP_LEVEL, Command
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.cli.words import sorted_words
from qemu_vmdk_snap.errors import FormatError, LockBusy, Unsupported, VmdkSnapError, printable

PROGRAM = "qemu-vmdk-snap"
_HELP = frozenset({"-h", "--help"})
_ANY_WIDTH = 80
_NAMED = frozenset({"--domain", "--snapshotname"})
"""What virsh calls its positional arguments where they are given as options."""
_NUMBERS = tuple(f"-{digit}" for digit in range(10))


class CommandModule(Protocol):
    """The interface of a command's module."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to `parser`."""

    def run(self, args: argparse.Namespace, ui: Ui) -> int | None:
        """Run the command and show the result; the returned number is the exit status, None is 0."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise exit_status.UsageError(f"{self.prog}: {printable(message)} (try {self.prog} --help)")

    def parse_sorted(self, words: Sequence[str], found: argparse.Namespace | None = None) -> argparse.Namespace:
        """Return what the words say, options wherever they are among them; a size such as -1G is no option."""
        return self.parse_args(sorted_words(words, self._option_string_actions, self.error, plain=_NUMBERS), found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        if "_ARGCOMPLETE" in os.environ:  # a shell asks, at TAB
            return _complete()
        _cancel_on_signals()
        if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
            # One write for a short answer, also under PYTHONUNBUFFERED: `| head -1` ends before a second one.
            sys.stdout.reconfigure(write_through=False)
    try:
        return _main(words)
    except exit_status.UsageError as error:
        return _usage_error(error, words)
    except KeyboardInterrupt:  # while modules were still being imported
        sys.stderr.write(f"{PROGRAM}: cancelled\n")
        return exit_status.CANCELLED


def _complete() -> int:
    # By name: it is made of the table of commands, and of the parser here.
    importlib.import_module("qemu_vmdk_snap.cli.pages.complete").answer()  # ends the process
    return 1


def _usage_error(error: Exception, words: Sequence[str], status: int = exit_status.USAGE) -> int:
    """Show the usage error, as JSON too if the command line asks for JSON."""
    begin = "" if isinstance(error, exit_status.UsageError) else f"{PROGRAM}: "
    sys.stderr.write(f"{begin}{error}\n")
    if "--output=json" in words or ("--output", "json") in itertools.pairwise(words):
        Ui(json_output=True).json(exit_status.as_object(error, str(error), status))
    return status


def _main(words: list[str]) -> int:
    if words in (["--version"], ["-V"]):
        from qemu_vmdk_snap import __version__

        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return 0
    command, prog, rest = _find(words)
    if command is None:
        return _show_help(words)
    # Importing NumPy starts a thread for linear algebra on each core; nothing here needs them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    module = cast(CommandModule, importlib.import_module(command.module))
    # The width of the terminal matters only for help; finding it takes 4 ms of imports.
    parser = make_parser(module, command, prog, width=None if _HELP & set(rest) else _ANY_WIDTH)
    try:
        words_in_order, found = _as_positionals(module, _with_values(module, rest))
        args = parser.parse_sorted(words_in_order, found)
    except exit_status.UsageError as error:
        if command.monitoring:
            return _unknown(str(error))
        raise SystemExit(_usage_error(error, words)) from None
    except Unsupported as error:  # a name that means something else than a file
        status = parser.get_default("error_status") or exit_status.status_of(error)
        raise SystemExit(_usage_error(error, words, status)) from None
    if command.monitoring:
        return _as_plugin(args, prog, rest, module)
    if args.debug or os.environ.get("QEMU_VMDK_SNAP_LOG"):
        return _logged(args, prog, rest, module)
    return _shown(args, prog, rest, module)


def _as_plugin(args: argparse.Namespace, prog: str, rest: Sequence[str], module: CommandModule) -> int:
    """Run a monitoring plugin: whatever ends it otherwise than with 0 to 3 is UNKNOWN."""
    status = _shown(args, prog, rest, module)
    return status if status in range(4) else _unknown(f"ended with status {status}")


def _unknown(message: str) -> int:
    from qemu_vmdk_snap.cli.monitor.nagios import failed

    return failed(message)


def _logged(args: argparse.Namespace, prog: str, rest: Sequence[str], module: CommandModule) -> int:
    """Run the command with the log where `--debug` and QEMU_VMDK_SNAP_LOG want it."""
    from qemu_vmdk_snap.cli import debug

    file = os.environ.get(debug.VARIABLE)
    try:
        started = debug.start(stderr=args.debug, file=file)
    except OSError as error:
        sys.stderr.write(f"{PROGRAM}: {debug.VARIABLE}: {exit_status.one_line(error)}\n")
        return exit_status.SYSTEM
    try:
        debug.command(prog, rest)
        status = _shown(args, prog, rest, module)
        debug.ended(status)
    finally:
        debug.stop(started)
    return status


def _shown(args: argparse.Namespace, prog: str, rest: Sequence[str], module: CommandModule) -> int:
    ui = Ui(
        json_output=getattr(args, "output_format", "human") == "json",
        quiet=getattr(args, "quiet", False),
        progress=getattr(args, "progress", False),
    )
    return _run(_elsewhere(args, prog, rest) or module, args, ui)


def _elsewhere(args: argparse.Namespace, prog: str, rest: Sequence[str]) -> CommandModule | None:
    """Return the module that runs the command on the host of libvirt, if that is another host."""
    uri = (getattr(args, "connect", None) or os.environ.get("LIBVIRT_DEFAULT_URI")) if "connect" in args else None
    if "+ssh:" not in (uri or ""):
        return None
    from qemu_vmdk_snap.cli.remote import Elsewhere, is_remote

    return Elsewhere(prog.split()[1:], rest, str(uri)) if is_remote(uri) else None


def _cancel_on_signals() -> None:
    """Treat a signal to end as Ctrl-C: clean up, and leave nothing half done."""

    def cancel(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not if it is ignored (nohup)
            signal.signal(number, cancel)


def _with_values(module: CommandModule, rest: Sequence[str]) -> list[str]:
    """Return the words with the value of each option that may be without: virsh's `--quiesce NAME` names a domain."""
    optional: dict[str, tuple[str, ...]] = getattr(module, "OPTIONAL_VALUES", {})
    words = []
    for word, following in itertools.zip_longest(rest, rest[1:]):
        alone = word in optional and following not in optional[word]
        words.append(f"{word}={optional[word][0]}" if alone else word)
    return words


def _as_positionals(module: CommandModule, rest: list[str]) -> tuple[list[str], argparse.Namespace | None]:
    """Return the words, with those that virsh lets name by an option (`--domain web`) in place, and what is parsed."""
    if not any(word.partition("=")[0] in _NAMED for word in rest):
        return rest, None
    from qemu_vmdk_snap.cli.named import as_positionals

    return as_positionals(module, rest)


def make_parser(module: CommandModule, command: Command, prog: str, *, width: int | None = None) -> _Parser:
    """Return the argument parser of one command, with the options that all of them have.

    Its help is `width` columns wide; None asks the terminal.
    """
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=width)
    parser = _Parser(prog=prog, description=command.help, allow_abbrev=False, formatter_class=formatter)
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


def add_arguments(module: CommandModule, parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command, and those that all commands have."""
    module.configure(parser)
    parser.add_argument(
        "--output", dest="output_format", choices=("human", "json"), default="human", help="text (default) or JSON"
    )
    parser.add_argument("--debug", action="store_true", help="log what is done to standard error")


def _run(module: CommandModule, args: argparse.Namespace, ui: Ui) -> int:
    try:
        with listening(ui.warn), _allowed(args), _telling_progress(ui):
            status = module.run(args, ui) or 0
        _tell_slower(ui)
        ui.end()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): nothing to report, and nothing more to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (VmdkSnapError, OSError) as error:
        status = getattr(args, "error_status", None) or exit_status.status_of(error)
        ui.error(exit_status.one_line(error) + _way_out(error, args), error, status)
        return status
    except KeyboardInterrupt as error:
        ui.error("cancelled" + _half_done(args), error, exit_status.CANCELLED)
        return exit_status.CANCELLED
    return status


def _tell_slower(ui: Ui) -> None:
    """Say that compressed grains were slower for the lack of a library, if there were any."""
    compression = sys.modules.get("qemu_vmdk_snap.vmdk.stream.compression")
    if compression is not None and compression.was_slower():
        ui.remark(f"compressed grains were {compression.SLOWER}")


def _allowed(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Allow the folders of `--allow-dir` to a command on domains; the others pass them on themselves."""
    folders = getattr(args, "allow_dir", []) if "connect" in args else []
    if not folders:
        return contextlib.nullcontext()
    from qemu_vmdk_snap.chain.resolver import allowing

    return allowing(*folders)


@contextlib.contextmanager
def _telling_progress(ui: Ui) -> Iterator[None]:
    """Show the progress on SIGUSR1, as qemu-img does, unless that signal is used otherwise."""
    before = signal.getsignal(signal.SIGUSR1)
    if before == signal.SIG_DFL:
        with contextlib.suppress(ValueError):  # a thread that is not the main one
            signal.signal(signal.SIGUSR1, lambda *_: ui.tell_progress())
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGUSR1, before)


def _half_done(args: argparse.Namespace) -> str:
    """Return the addition to an error that has left an unfinished operation."""
    image = getattr(args, "filename", None)
    if not isinstance(image, Path):
        return ""
    from qemu_vmdk_snap.storage.journal.record import pending_in

    with contextlib.suppress(OSError, VmdkSnapError):
        for pending in pending_in(image.parent):
            if pending.operation is not None and pending.involves(image):
                what = f"the {pending.operation.name} is not finished"
                return f" ({what}: `recover {image.parent}`, or the next command there, finishes or undoes it)"
    return ""


def _way_out(error: Exception, args: argparse.Namespace) -> str:
    """Return the addition to the error: what can be done, or what the file is instead of a VMDK image."""
    if isinstance(error, FileExistsError) and "no_create" in args:
        return " (nothing is overwritten; -n writes into an image that is there)"
    if isinstance(error, OSError):
        return _half_done(args)
    if isinstance(error, FormatError) and (error.offset, error.field) == (0, "magic"):
        return _instead_of(error.path)
    if isinstance(error, FormatError) and (error.field, error.value) == ("descriptor", b""):
        return _instead_of(error.path)  # as QEMU makes the extents of a split disk
    if isinstance(error, Unsupported) and error.feature.startswith("has no descriptor"):
        return _instead_of(error.path)
    reads = getattr(args, "force_share", True) is False and not getattr(args, "repair", None)
    return " (-U, --force-share, reads it anyway)" if isinstance(error, LockBusy) and reads else ""


def _instead_of(path: Path) -> str:
    """Return the addition about a file that is not an image by itself."""
    from qemu_vmdk_snap.chain.look.mistaken import instead_of

    known = instead_of(path)
    return "" if known is None else f"; {known}"


def _find(words: Sequence[str]) -> tuple[Command | None, str, list[str]]:
    if len(words) > 1 and words[1] in COMMANDS.get(words[0], {}):  # first: `serve` is a command and a group
        return COMMANDS[words[0]][words[1]], f"{PROGRAM} {words[0]} {words[1]}", list(words[2:])
    if words and words[0] in TOP_LEVEL:
        return TOP_LEVEL[words[0]], f"{PROGRAM} {words[0]}", list(words[1:])
    return None, PROGRAM, []


def _show_help(words: Sequence[str]) -> int:
    stray = next((word for word in words[:2] if word.startswith("-") and word not in _HELP), None)
    if stray is not None:
        reason = f"no option {stray!r} here: options follow the command"
        raise exit_status.UsageError(f"{PROGRAM}: {reason} (try {PROGRAM} --help)")
    wanted = not words or words[-1] == "help" or not _HELP.isdisjoint(words)
    plain = [word for word in words if not word.startswith("-")]
    group = plain[0] if plain else None
    if group in COMMANDS:
        if len(plain) > 1 and not wanted:
            raise exit_status.UsageError(f"{PROGRAM} {group}: no command {plain[1]!r} (try {PROGRAM} {group} --help)")
        rows = [(f"{group} {name}", command.help) for name, command in COMMANDS[str(group)].items()]
        return _print_help(f"usage: {PROGRAM} {group} COMMAND ...\n\n{GROUPS[str(group)]}", rows, wanted)
    if group is not None and group != "help":
        raise exit_status.UsageError(f"{PROGRAM}: no command {group!r} (try {PROGRAM} --help)")
    rows = [(f"{name} {command}", entry.help) for name, table in COMMANDS.items() for command, entry in table.items()]
    rows += [(name, entry.help) for name, entry in TOP_LEVEL.items()]
    purpose = "Snapshots of VMDK disks under QEMU and libvirt, proven by booting a guest."
    intro = f"usage: {PROGRAM} GROUP COMMAND ...\n\n{purpose}"
    return _print_help(intro, rows, bool(words) and wanted)


def _print_help(intro: str, rows: Sequence[tuple[str, str]], wanted: bool) -> int:
    width = max(len(name) for name, _ in rows)
    lines = [intro, "", *(f"  {name:<{width}}  {text}" for name, text in rows)]
    (sys.stdout if wanted else sys.stderr).write("\n".join(lines) + "\n")
    return 0 if wanted else exit_status.USAGE
