"""`manual`: write the manual pages, one for the program and one for each command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.cli.ui import Ui

if TYPE_CHECKING:
    from qemu_vmdk_snap.cli.pages.catalogue import Entry


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `manual`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder for the pages, e.g. ~/.local/share/man/man1")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Write the pages and name them."""
    from qemu_vmdk_snap.cli.commands import PROGRAM
    from qemu_vmdk_snap.cli.pages.catalogue import every_command

    args.folder.mkdir(parents=True, exist_ok=True)
    entries = list(every_command())
    pages = {PROGRAM: _program_page(entries)}
    pages |= {"-".join([PROGRAM, *entry.words]): _command_page(entry) for entry in entries}
    for name, lines in pages.items():
        (args.folder / f"{name}.1").write_text("\n".join(lines) + "\n")
    if ui.json_output:
        ui.json([str(args.folder / f"{name}.1") for name in pages])
    else:
        ui.text(f"{len(pages)} manual pages in {args.folder}")


def _program_page(entries: Sequence[Entry]) -> Iterator[str]:
    from qemu_vmdk_snap.cli.pages.texts import ABOUT

    purpose = "snapshots of VMDK disks under QEMU and libvirt, proven by booting a guest"
    yield from _head("qemu-vmdk-snap", purpose)
    yield from (".SH SYNOPSIS", ".B qemu-vmdk-snap", ".I GROUP COMMAND", "[options] ...", ".SH DESCRIPTION")
    yield _roff("Reads, writes, snapshots, checks, merges and converts chains of VMDK images, snapshots the disks of")
    yield _roff("libvirt domains with them, and boots small guests to prove what a chain shows. Every command takes")
    yield _roff("--output=json, and has a page of its own, qemu-vmdk-snap-GROUP-COMMAND.")
    for text in filter(None, ABOUT.values()):
        yield from (".PP", _roff(text))
    yield ".SH COMMANDS"
    for entry in entries:
        yield from (".TP", f".B {_roff(' '.join(entry.words))}", _roff(entry.help))
    yield ".SH EXAMPLES"
    for words in ("image create", "snapshot create", "snapshot list", "snapshot delete", "doctor"):
        yield from _examples(words)
    yield from _shared("")
    yield from (".SH SEE ALSO", ".BR qemu\\-img (1),", ".BR virsh (1)")


def _command_page(entry: Entry) -> Iterator[str]:
    from qemu_vmdk_snap.cli.pages.texts import ABOUT

    name = "qemu-vmdk-snap-" + "-".join(entry.words)
    group = entry.words[0] if len(entry.words) == 2 else ""
    yield from _head(name, entry.help)
    usage = " ".join(entry.parser.format_usage().removeprefix("usage: ").split())
    yield from (".SH SYNOPSIS", _roff(usage), ".SH DESCRIPTION", _roff(entry.description))
    if ABOUT[group]:
        yield from (".PP", _roff(ABOUT[group]))
    for title, actions in (("ARGUMENTS", entry.positionals), ("OPTIONS", entry.options)):
        if actions:
            yield f".SH {title}"
        for action in actions:
            value = action.metavar or (action.dest if action.nargs != 0 else "")
            if action.choices and not action.metavar:
                value = "|".join(map(str, action.choices))
            shown = ", ".join(action.option_strings) + (" " if action.option_strings and value else "") + str(value)
            yield from (".TP", f".B {_roff(shown)}", _roff((action.help or "").replace("%%", "%") or shown))
    yield ".SH EXAMPLES"
    yield from _examples(" ".join(entry.words))
    yield from _shared(group)
    yield from (".SH SEE ALSO", ".BR qemu\\-vmdk\\-snap (1)")


def _examples(words: str) -> Iterator[str]:
    from qemu_vmdk_snap.cli.commands import PROGRAM
    from qemu_vmdk_snap.cli.examples import EXAMPLES

    for line, why in EXAMPLES[words]:
        yield from (".TP", f".B {_roff(f'{PROGRAM} {line}')}", _roff(why))


def _shared(group: str) -> Iterator[str]:
    """Yield the sections that the commands of a group have in common."""
    from qemu_vmdk_snap.cli.pages.texts import ENVIRONMENT, FILES, STATUSES

    for title, rows in (("EXIT STATUS", STATUSES), ("FILES", FILES[group]), ("ENVIRONMENT", ENVIRONMENT[group])):
        if rows:
            yield f".SH {title}"
        for name, text in rows:
            yield from (".TP", f".B {_roff(name)}", _roff(text))


def _head(name: str, text: str) -> Iterator[str]:
    from qemu_vmdk_snap import __version__

    yield f'.TH {name.upper().replace("-", chr(92) + "-")} 1 "" "qemu-vmdk-snap {__version__}"'
    yield from (".SH NAME", f"{_roff(name)} \\- {_roff(text)}")


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped
