"""Commands on domains of another host (`-c qemu+ssh://HOST/system`): they run there, by ssh.

The engine works on local files under QEMU's own locks, and neither reaches over a network. So the same command line is
run on that host, where this program must be installed; file names on it are names of that host.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Sequence
from urllib.parse import parse_qs, urlencode, urlsplit

from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.errors import InvalidRequest, PluginError

PROGRAM = "qemu-vmdk-snap"
_KNOWN = ("command", "keyfile", "no_verify", "no_tty", "socket", "mode", "proxy", "netcat")
_NOT_FOUND, _SSH_FAILED = 127, 255


class Elsewhere:
    """A command of this program that runs on another host: replaces the command's module."""

    def __init__(self, command: Sequence[str], options: Sequence[str], uri: str) -> None:
        self._command, self._options, self._uri = command, options, uri

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add nothing: the command itself has checked its arguments."""

    def run(self, args: argparse.Namespace, ui: Ui) -> int:
        """Run it there; its exit status is that of the command."""
        return run_there(self._command, self._options, self._uri)


def is_remote(uri: str | None) -> bool:
    """Return whether the URI names another host, to be reached by ssh."""
    parts = urlsplit(uri or "")
    return parts.scheme.partition("+")[2] == "ssh" and bool(parts.hostname)


def run_there(command: Sequence[str], options: Sequence[str], uri: str) -> int:
    """Run the command line on the host that `uri` names, and return its exit status there.

    Standard input, output and error are those of this process.

    Raises:
        InvalidRequest: the URI is invalid.
        PluginError: there is no ssh here, it cannot connect, or this program is not installed there.
    """
    parts = urlsplit(uri)
    host = f"{parts.username}@{parts.hostname}" if parts.username else str(parts.hostname)
    ssh = _ssh(uri, host)
    line = shlex.join([PROGRAM, *command, *_localised(options, uri, local_uri(uri))])
    try:
        status = subprocess.run([*ssh, line], check=False).returncode
    except OSError as error:
        raise PluginError(ssh[0], f"cannot be run: {error.strerror}") from error
    if status == _NOT_FOUND:
        reason = f"{PROGRAM} is not installed there, or not in the PATH that ssh gives: install it on {parts.hostname}"
        raise PluginError(uri, reason)
    if status == _SSH_FAILED:
        raise PluginError(uri, "ssh failed: see above")
    return status


def local_uri(uri: str) -> str:
    """Return the local URI, on that host, of the libvirt that `uri` means."""
    parts = urlsplit(uri)
    socket = parse_qs(parts.query).get("socket")
    driver, query = parts.scheme.partition("+")[0], ""
    if socket:
        driver, query = f"{driver}+unix", "?" + urlencode({"socket": socket[0]}, safe="/")
    return f"{driver}://{parts.path or '/'}{query}"


def _ssh(uri: str, host: str) -> list[str]:
    parts = urlsplit(uri)
    options = {key: values[0] for key, values in parse_qs(parts.query).items()}
    unknown = [key for key in options if key not in _KNOWN]
    if unknown:
        raise InvalidRequest(uri, f"{unknown[0]!r} cannot be given to ssh")
    if host.startswith("-"):
        raise InvalidRequest(uri, "the host's name must not begin with a dash")
    words = [options.get("command", "ssh"), "-T"]
    if parts.port is not None:
        words += ["-p", str(parts.port)]
    if "keyfile" in options:
        words += ["-i", options["keyfile"]]
    if options.get("no_verify") == "1":
        words += ["-o", "StrictHostKeyChecking=no"]
    if options.get("no_tty") == "1":
        words += ["-o", "BatchMode=yes"]
    return [*words, "--", host]


def _localised(words: Sequence[str], uri: str, local: str) -> list[str]:
    """Return the options with the local URI instead of the remote one, also if that was the default."""
    changed = [local if word == uri else word for word in words]
    for option in ("--connect=", "-c"):
        changed = [option + local if word == option + uri else word for word in changed]
    return ["--connect", local, *changed] if changed == list(words) else changed
