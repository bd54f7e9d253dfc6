"""The entry point: find the command, import its module alone, run it, turn an error into one line and a status."""

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
_NUMBERS = tuple(f"-{digit}" for digit in range(10))


class CommandModule(Protocol):
    """What the module of a command has: it describes its arguments, then runs."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to `parser`."""

    def run(self, args: argparse.Namespace, ui: Ui) -> int | None:
        """Do it and show it; the returned number is the exit status, None is 0."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise exit_status.UsageError(f"{self.prog}: {printable(message)} (try {self.prog} --help)")

    def parse_sorted(self, words: Sequence[str]) -> argparse.Namespace:
        """Return what the words say, options wherever they are among them; a size such as -1G is no option."""
        return self.parse_args(sorted_words(words, self._option_string_actions, self.error, plain=_NUMBERS))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
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


def _usage_error(error: Exception, words: Sequence[str], status: int = exit_status.USAGE) -> int:
    """Show what is wrong with the command line, as JSON too where it asks for that, as far as it can be read."""
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
    # Importing NumPy starts a thread of its linear algebra for each core; nothing here multiplies matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    module = cast(CommandModule, importlib.import_module(command.module))
    # How wide a terminal is matters to those alone who ask for help; finding out takes 4 ms of imports.
    parser = make_parser(module, command, prog, width=None if _HELP & set(rest) else _ANY_WIDTH)
    try:
        args = parser.parse_sorted(rest)
    except exit_status.UsageError as error:
        raise SystemExit(_usage_error(error, words)) from None
    except Unsupported as error:  # a name that means something else than a file
        status = parser.get_default("error_status") or exit_status.status_of(error)
        raise SystemExit(_usage_error(error, words, status)) from None
    if args.debug or os.environ.get("QEMU_VMDK_SNAP_LOG"):
        return _logged(args, prog, rest, module)
    return _shown(args, prog, rest, module)


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
    """Return what runs the command where libvirt is, if that is another host."""
    uri = (getattr(args, "connect", None) or os.environ.get("LIBVIRT_DEFAULT_URI")) if "connect" in args else None
    if "+ssh:" not in (uri or ""):
        return None
    from qemu_vmdk_snap.cli.remote import Elsewhere, is_remote

    return Elsewhere(prog.split()[1:], rest, str(uri)) if is_remote(uri) else None


def _cancel_on_signals() -> None:
    """Let a request to end do what Ctrl-C does: clean up, and leave nothing half done."""

    def cancel(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not where somebody (nohup) wants it ignored
            signal.signal(number, cancel)


def make_parser(module: CommandModule, command: Command, prog: str, *, width: int | None = None) -> _Parser:
    """Return the argument parser of one command, with the options that all of them have.

    Its help is `width` columns wide; None asks the terminal.
    """
    formatter = functools.partial(argparse.HelpFormatter, width=width)
    parser = _Parser(prog=prog, description=command.help, allow_abbrev=False, formatter_class=formatter)
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
        with listening(ui.warn), _telling_progress(ui):
            status = module.run(args, ui) or 0
        ui.end()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing to tell, and nothing more to flush at exit.
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


@contextlib.contextmanager
def _telling_progress(ui: Ui) -> Iterator[None]:
    """Let SIGUSR1 show how far the command is, as qemu-img does, where nobody else wants that signal."""
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
    """Return what to add where the command has ended in the middle of what it cannot simply leave undone."""
    image = getattr(args, "filename", None)
    if not isinstance(image, Path):
        return ""
    from qemu_vmdk_snap.storage.record import pending_in

    with contextlib.suppress(OSError, VmdkSnapError):
        for pending in pending_in(image.parent):
            if pending.operation is not None and pending.involves(image):
                what = f"the {pending.operation.name} has begun"
                return f" ({what}: `recover {image.parent}`, or the next command there, finishes it or takes it back)"
    return ""


def _way_out(error: Exception, args: argparse.Namespace) -> str:
    """Return what to add to the error: what can be done, or what the file is that was given by mistake."""
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
    return " (-U, --force-share, reads it all the same)" if isinstance(error, LockBusy) and reads else ""


def _instead_of(path: Path) -> str:
    """Return what to add about a file that is no image by itself."""
    from qemu_vmdk_snap.chain.look.mistaken import instead_of

    known = instead_of(path)
    return "" if known is None else f"; {known}"


def _find(words: Sequence[str]) -> tuple[Command | None, str, list[str]]:
    if words and words[0] in TOP_LEVEL:
        return TOP_LEVEL[words[0]], f"{PROGRAM} {words[0]}", list(words[1:])
    if len(words) > 1 and words[1] in COMMANDS.get(words[0], {}):
        return COMMANDS[words[0]][words[1]], f"{PROGRAM} {words[0]} {words[1]}", list(words[2:])
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
