"""`serve`: serve the chain of an image over NBD on a Unix socket, until it is told to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from pathlib import Path

from qemu_vmdk_snap.cli.image.common import add_allow_dir
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.light import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    import socket

    from qemu_vmdk_snap.serve.server import Server


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    parser.add_argument(
        "-k", "--socket", type=Path, metavar="PATH", help="listen on this Unix socket (default: what systemd passes)"
    )
    parser.add_argument(
        "--control", type=Path, metavar="PATH", help="listen for commands on this Unix socket (default: PATH.control)"
    )
    parser.add_argument("-r", "--read-only", action="store_true", help="serve the image read-only")
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME=IMAGE",
        help="also serve IMAGE, read-only, as the export NAME (may be repeated)",
    )
    parser.add_argument(
        "--socket-mode", type=_mode, default=0o600, metavar="MODE", help="mode of the socket, octal (default: 0600)"
    )
    parser.add_argument("--socket-owner", metavar="USER[:GROUP]", help="owner of the socket")
    add_allow_dir(parser)
    parser.add_argument("filename", type=Path)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Serve until SIGTERM, SIGINT or the command `stop`; then flush and close."""
    from qemu_vmdk_snap.serve.disk.opening import TopNote
    from qemu_vmdk_snap.serve.server import Server
    from qemu_vmdk_snap.serve.sockets import listen, passed, remove

    given = passed()
    if args.socket is None and "nbd" not in given:
        raise InvalidRequest("--socket", "is needed, or a socket that systemd passes")
    path = Path(given["nbd"].getsockname() if args.socket is None else args.socket).absolute()
    control_path = (args.control or path.with_name(path.name + ".control")).absolute()
    exports = _exports(args.export)
    image = args.filename.absolute()
    owner = None if args.socket_owner is None else _owner(args.socket_owner)
    with contextlib.ExitStack() as stack:
        listeners: dict[str, socket.socket] = dict(given)
        for listener in given.values():
            stack.callback(listener.close)
        # At the end each goes before it is closed: whoever finds it closed takes its place.
        if "nbd" not in listeners:
            listeners["nbd"] = stack.enter_context(listen(path, mode=args.socket_mode, owner=owner))
            stack.callback(remove, path)
        if "control" not in listeners:
            listeners["control"] = stack.enter_context(listen(control_path, mode=0o600))
            stack.callback(remove, control_path)
        note = TopNote(path.with_name(path.name + ".top"), image)
        server = Server(
            note.top(args.allow_dir), read_only=args.read_only, trusted_dirs=args.allow_dir, exports=exports, note=note
        )
        _serve(server, listeners, lambda: _say(image, path, control_path, ui))


def _say(image: Path, path: Path, control: Path, ui: Ui) -> None:
    if ui.json_output:
        ui.json({"serving": str(image), "socket": str(path), "control": str(control)})
    else:
        ui.text(f"serving {image} on {path} (control {control})")
    sys.stdout.flush()


def _serve(server: Server, listeners: dict[str, socket.socket], ready: object) -> None:
    from qemu_vmdk_snap.cli.exit_status import as_error
    from qemu_vmdk_snap.serve.control.control import Control

    control = Control(server, as_error)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop_asked.set())
    try:
        for accept, listener in ((server.accept, listeners["nbd"]), (control.accept, listeners["control"])):
            threading.Thread(target=accept, args=(listener,), daemon=True).start()
        assert callable(ready)
        ready()
        while not server.stop_asked.wait(1.0):  # not without an end: signals are handled between two waits
            pass
    finally:
        control.end()
        server.close()


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r} is not an octal mode") from None
    if not 0 <= mode <= 0o777:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r} is not a mode of a socket")
    return mode


def _exports(words: list[str]) -> dict[str, Path]:
    exports: dict[str, Path] = {}
    for word in words:
        name, equals, image = word.partition("=")
        if not equals or not name or not image or name in exports:
            raise InvalidRequest(f"--export {word}", "must be NAME=IMAGE, each name once")
        exports[name] = Path(image)
    return exports


def _owner(text: str) -> tuple[int, int]:
    import grp
    import pwd

    user, colon, group = text.partition(":")
    try:
        known = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
        if not colon:
            return known.pw_uid, known.pw_gid
        return known.pw_uid, int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise InvalidRequest(f"--socket-owner {text}", "no such user or group") from None
