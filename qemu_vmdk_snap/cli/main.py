"""The entry point: find the command, import only its module, run it, turn an error into one line and a status."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from qemu_vmdk_snap.chain.look.notes import listening
from qemu_vmdk_snap.cli import exit_status
from qemu_vmdk_snap.cli.commands import COMMANDS, GROUPS, PROGRAM, TOP_LEVEL, Command, CommandModule, add_arguments
from qemu_vmdk_snap.cli.line.words import HELP, NUMBERS, is_named, with_values
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import FormatError, LockBusy, Unsupported, VmdkSnapError
from qemu_vmdk_snap.light import TYPE_CHECKING, NoReturn, cast

if TYPE_CHECKING:
    import argparse


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
    try:
        args = _plainly(module, rest) or _by_argparse(module, command, prog, words)
    except exit_status.UsageError as error:
        if command.monitoring:
            return _unknown(str(error))
        raise SystemExit(_usage_error(error, words)) from None
    if command.monitoring:
        return _as_plugin(args, prog, rest, module)
    if args.debug or os.environ.get("QEMU_VMDK_SNAP_LOG"):
        return _logged(args, prog, rest, module)
    return _shown(args, prog, rest, module)


def _plainly(module: CommandModule, rest: Sequence[str]) -> argparse.Namespace | None:
    """Return what the words of a command say, where that takes no argparse."""
    if is_named(rest) or HELP & set(rest):
        return None
    from qemu_vmdk_snap.cli.line.plain import Plain, Unusual

    parser = Plain()
    add_arguments(module, cast("argparse.ArgumentParser", parser))
    try:
        return cast("argparse.Namespace", parser.parse(with_values(module, rest), NUMBERS))
    except Unusual:
        return None


def _by_argparse(module: CommandModule, command: Command, prog: str, words: Sequence[str]) -> argparse.Namespace:
    """Return what the words say where something about them is unusual, or end with what argparse says of them."""
    from qemu_vmdk_snap.cli.line.parser import parse, parser_for

    rest = words[len(prog.split()) - 1 :]
    parser = parser_for(module, command, prog, rest)
    try:
        return parse(parser, module, rest)
    except Unsupported as error:  # a name that means something else than a file
        status = parser.get_default("error_status") or exit_status.status_of(error)
        raise SystemExit(_usage_error(error, words, status)) from None


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
    if before in (signal.SIG_DFL, signal.SIG_IGN):
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
        raw = " (-f raw reads the first image as a raw one, -F raw the second)" if "second_format" in args else ""
        return _instead_of(error.path) or raw
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
    stray = next((word for word in words[:2] if word.startswith("-") and word not in HELP), None)
    if stray is not None:
        reason = f"no option {stray!r} here: options follow the command"
        raise exit_status.UsageError(f"{PROGRAM}: {reason} (try {PROGRAM} --help)")
    wanted = not words or words[-1] == "help" or not HELP.isdisjoint(words)
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
