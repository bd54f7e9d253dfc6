"""`manual`: write the manual pages, one for the program and one for each command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_vmdk_snap.cli.ui import Ui

if TYPE_CHECKING:
    from qemu_vmdk_snap.cli.pages.catalogue import Entry

_STATUSES = (
    ("0", "Done; for compare: the same; for check: good; for guest verify and demo: as expected."),
    ("1", "compare: different; guest verify and demo: a guest saw something else."),
    ("2, 3", "check: corrupt, leaks. compare: 2 for any error."),
    ("63", "Not supported."),
    ("64", "The command line or the request is invalid."),
    ("65", "A file breaks the format."),
    ("66", "The backing chain cannot be followed."),
    ("67", "CID mismatch: a parent was modified."),
    ("68", "Something else still needs a file that was to be removed or changed, or may need it."),
    ("69", "The libvirt domain does not allow it."),
    ("70", "A library, a tool or a drop-in is missing or failed."),
    ("71", "A guest, or the QEMU around it, failed."),
    ("74", "The system refused: no such file, no space, I/O error."),
    ("75", "Another process holds the image."),
    ("130", "Cancelled."),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `manual`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder for the pages, e.g. ~/.local/share/man/man1")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Write the pages and name them."""
    from qemu_vmdk_snap.cli.main import PROGRAM
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
    yield from _head("qemu-vmdk-snap", "snapshots of VMDK disks under QEMU and libvirt, proven by booting a guest")
    yield from (".SH SYNOPSIS", ".B qemu-vmdk-snap", ".I GROUP COMMAND", "[options] ...", ".SH COMMANDS")
    for entry in entries:
        yield from (".TP", f".B {_roff(' '.join(entry.words))}", _roff(entry.help))
    yield ".SH EXIT STATUS"
    for status, text in _STATUSES:
        yield from (".TP", f".B {status}", _roff(text))
    yield from (".SH SEE ALSO", ".BR qemu-img (1),", ".BR virsh (1)")


def _command_page(entry: Entry) -> Iterator[str]:
    name = "qemu-vmdk-snap-" + "-".join(entry.words)
    yield from _head(name, entry.help)
    usage = " ".join(entry.parser.format_usage().removeprefix("usage: ").split())
    yield from (".SH SYNOPSIS", _roff(usage))
    for title, actions in (("ARGUMENTS", entry.positionals), ("OPTIONS", entry.options)):
        if actions:
            yield f".SH {title}"
        for action in actions:
            value = action.metavar or (action.dest if action.nargs != 0 else "")
            if action.choices and not action.metavar:
                value = "|".join(map(str, action.choices))
            shown = ", ".join(action.option_strings) + (" " if action.option_strings and value else "") + str(value)
            yield from (".TP", f".B {_roff(shown)}", _roff((action.help or "").replace("%%", "%")))
    yield from (".SH SEE ALSO", ".BR qemu-vmdk-snap (1)")


def _head(name: str, text: str) -> Iterator[str]:
    from qemu_vmdk_snap import __version__

    yield f'.TH {name.upper().replace("-", chr(92) + "-")} 1 "" "qemu-vmdk-snap {__version__}"'
    yield from (".SH NAME", f"{_roff(name)} \\- {_roff(text)}")


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped
