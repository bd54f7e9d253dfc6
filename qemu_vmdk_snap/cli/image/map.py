"""`image map`: which file stores which part of the guest's disk."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from qemu_vmdk_snap.cli.image.common import add_open_options, open_disk, size_argument
from qemu_vmdk_snap.cli.image.names import image_file
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.light import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

    from qemu_vmdk_snap.chain.chain import Chain
    from qemu_vmdk_snap.chain.disk import Disk
    from qemu_vmdk_snap.vmdk.runs import Row

_HEADING: Final = f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `image map`."""
    add_open_options(parser, raw=True)
    parser.add_argument(
        "-s", "--start-offset", type=size_argument, default=0, metavar="OFFSET", help="first byte of the range"
    )
    parser.add_argument("-l", "--max-length", type=size_argument, metavar="LENGTH", help="length of the range")
    parser.add_argument("filename", type=image_file, help="the image")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Show the map with qemu-img's columns, or its JSON keys."""
    from qemu_vmdk_snap.chain.chain import Chain

    with open_disk(args.filename, args.format, args) as disk:
        length = disk.capacity - args.start_offset
        if args.max_length is not None:
            length = min(length, args.max_length)
        if ui.json_output:
            ui.streams()
            if isinstance(disk, Chain):
                _write_json(_json_lines(disk, args.start_offset, length))
            else:
                _write_json(_raw_json_lines(disk, args.start_offset, length))
        elif isinstance(disk, Chain):
            _write_text(disk, args.start_offset, length, ui)
        else:
            _write_raw_text(disk, args.start_offset, length, ui)


def _write_json(found: Iterable[list[str]]) -> None:
    """Write one object a line as qemu-img (from 8.2) does; straight from the rows, as there may be millions."""
    before = "["
    for lines in found:
        sys.stdout.write(before + ",\n".join(lines))
        before = ",\n"
    sys.stdout.write("]\n" if before != "[" else "[]\n")


def _raw_json_lines(disk: Disk, offset: int, length: int) -> Iterator[list[str]]:
    """Yield what qemu-img says of a raw image: a hole is stored as well, in its place."""
    import json

    from qemu_vmdk_snap.vmdk.runs import DATA

    name = json.dumps(str(disk.path))

    for row in disk.rows(offset, length):
        data = row.kind == DATA
        zero, words = ("false", "true") if data else ("true", "false")
        place = f'"depth": 0, "present": true, "zero": {zero}, "data": {words}, "compressed": false'
        yield [
            f'{{ "start": {row.offset}, "length": {row.length}, {place}, "offset": {row.offset}, "filename": {name}}}'
        ]


def _json_lines(chain: Chain, offset: int, length: int) -> Iterator[list[str]]:
    import json

    from qemu_vmdk_snap.vmdk.runs import COMPRESSED, DATA, NO_SOURCE, ZERO

    files = [(source.placed.extent.file, chain.links[source.depth]) for source in chain.sources]
    names = [json.dumps(str(link.path if file is None else file.path)) for file, link in files]
    base = chain.depth - 1
    depths = [source.depth for source in chain.sources]
    data = (
        '{ "start": %d, "length": %d, "depth": %d, "present": true, "zero": false, "data": true, "compressed": false, '
        '"offset": %d, "filename": %s}'
    )
    other = '{ "start": %d, "length": %d, "depth": %d, %s}'
    words = {
        COMPRESSED: '"present": true, "zero": false, "data": true, "compressed": true',
        ZERO: '"present": true, "zero": true, "data": false, "compressed": false',
    }
    hole = '"present": false, "zero": true, "data": false, "compressed": false'
    lines: list[str] = []
    for start, size, kind, source, file_offset in _joined(chain.rows(offset, length), COMPRESSED):
        if kind == DATA:
            lines.append(data % (start, size, depths[source], file_offset, names[source]))
        elif source == NO_SOURCE:
            lines.append(other % (start, size, base, hole))
        else:
            lines.append(other % (start, size, depths[source], f'{words[kind]}, "filename": {names[source]}'))
        if len(lines) == 1 << 16:
            yield lines
            lines = []
    if lines:
        yield lines


def _joined(rows: Iterable[Row], compressed: int) -> Iterator[Row]:
    """Yield the rows with neighbouring compressed grains of one source as one, as qemu-img counts them."""
    last: Row | None = None
    for row in rows:
        if last is not None:
            if row.kind == compressed == last.kind and row.source == last.source:
                last = last._replace(length=last.length + row.length)
                continue
            yield last
            last = None
        if row.kind == compressed:
            last = row
        else:
            yield row
    if last is not None:
        yield last


def _write_text(chain: Chain, offset: int, length: int, ui: Ui) -> None:
    ui.text(_HEADING)
    for run in chain.map(offset, length):
        if run.path is not None:
            where = "compressed" if run.compressed else f"{run.file_offset or 0:#x}"
            ui.text(f"{_hex(run.offset):<16}{_hex(run.length):<16}{where:<16}{run.path}")


def _write_raw_text(disk: Disk, offset: int, length: int, ui: Ui) -> None:
    from qemu_vmdk_snap.vmdk.runs import DATA

    ui.text(_HEADING)
    for row in disk.rows(offset, length):
        if row.kind == DATA:
            ui.text(f"{_hex(row.offset):<16}{_hex(row.length):<16}{_hex(row.offset):<16}{disk.path}")


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"
