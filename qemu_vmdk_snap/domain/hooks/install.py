"""Put the libvirt hook in its place, take it away, and tell how it is.

The hook is a shell script: for a domain without a policy, and for every event that is none of ours (reconnect among
them, where a failure would kill the guest), it ends before any interpreter but the shell is started. libvirt runs every
executable in `/etc/libvirt/hooks/qemu.d` in the order of their names; the folder is fixed when libvirt is built.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain.hooks import policy as policies
from qemu_vmdk_snap.errors import InvalidRequest, VmdkSnapError

FOLDER: Final = Path("/etc/libvirt/hooks/qemu.d")
NAME: Final = "50-qemu-vmdk-snap"
KEPT_VARIABLES: Final = ("QEMU_VMDK_SNAP_STATE", "QEMU_VMDK_SNAP_HOOKS")
"""What the hook must know as the commands know it; libvirt starts hooks with next to no environment."""

DAEMONS: Final = ("libvirtd", "virtqemud")
_MARK: Final = "# libvirt hook of qemu-vmdk-snap "
_MADE_FOLDER: Final = "# its folder was made with it"
_PYTHON: Final = "python="
_SCRIPT: Final = """\
#!/bin/sh
{mark}{version}
{made}# Written by `qemu-vmdk-snap hook install`; `qemu-vmdk-snap hook uninstall` removes it.
# Arguments: domain, operation, sub-operation, extra. A domain without a policy is let through here.
policy={policies}/"$1.toml"
[ -e "$policy" ] || exit 0
# At reconnect a failure would kill the guest: only these two are ours.
case "$2/$3" in
prepare/begin) refused=1 ;;
release/end) refused=0 ;;
*) exit 0 ;;
esac
python={python}
if [ ! -x "$python" ]; then
    echo "qemu-vmdk-snap: $python is gone: install the hook again, or remove $policy" >&2
    exit "$refused"
fi
{exports}exec "$python" -I -S -c {code} "$policy" "$@"
"""
_CODE: Final = (
    "import sys; sys.path.insert(0, {root!r}); "
    "from qemu_vmdk_snap.domain.hooks.run import main; sys.exit(main(sys.argv[1:], sys.stdin.buffer, sys.stderr))"
)


@dataclass(frozen=True, slots=True)
class PolicyState:
    """One policy file, and what is wrong with it."""

    domain: str
    path: Path
    problem: str | None


@dataclass(frozen=True, slots=True)
class HookStatus:
    """How the hook is installed."""

    path: Path
    installed: bool
    version: str | None
    """Of the package that wrote it."""
    current: bool
    """Whether it is what this package would write."""
    problem: str | None
    policies: tuple[PolicyState, ...]
    restart: tuple[str, ...]
    """Daemons that were started before the hook was there, and have not seen it if it is the first."""


def install(
    folder: Path = FOLDER, policy_folder: Path = policies.FOLDER, environ: Mapping[str, str] = os.environ
) -> Path:
    """Write the hook, in one step, and return its path; an older one of ours is replaced.

    Raises:
        InvalidRequest: something else bears its name, or the paths are not absolute.
        OSError: it cannot be written.
    """
    path = folder / NAME
    if not (folder.is_absolute() and policy_folder.is_absolute()):
        raise InvalidRequest(folder, "and the folder of the policies must be absolute paths")
    old = _read(path)
    if old is not None and _version_of(old) is None:
        raise InvalidRequest(path, "is not of this program: it was left as it is")
    made = _MADE_FOLDER in old if old is not None else not folder.exists()
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    policy_folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    engine.replace_file(path, _script(policy_folder, environ, made=made).encode(), mode=0o755)
    path.chmod(0o755)  # whatever the umask says: the daemon runs it
    return path


def uninstall(folder: Path = FOLDER) -> bool:
    """Remove the hook, and its folder if it was made with it and is empty now; False when there is none.

    Policies stay: they are the user's.

    Raises:
        InvalidRequest: what bears its name is not of this program.
        OSError: it cannot be removed.
    """
    path = folder / NAME
    text = _read(path)
    if text is None:
        return False
    if _version_of(text) is None:
        raise InvalidRequest(path, "is not of this program: it was left as it is")
    path.unlink()
    if _MADE_FOLDER in text:
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()
    return True


def status(folder: Path = FOLDER, policy_folder: Path | None = None) -> HookStatus:
    """Return how the hook is installed, and what its policies are like."""
    path = folder / NAME
    text = _read(path)
    version = None if text is None else _version_of(text)
    installed = version is not None
    policy_folder = policy_folder or (_policies_of(text) if text else None) or policies.FOLDER
    return HookStatus(
        path=path,
        installed=installed,
        version=version,
        current=text is not None and _unnoted(text) == _unnoted(_script(policy_folder, _kept(text), made=False)),
        problem=_problem(path, text),
        policies=tuple(_policy_states(policy_folder)),
        restart=tuple(_older_daemons(path)) if installed else (),
    )


def _script(policy_folder: Path, environ: Mapping[str, str], *, made: bool) -> str:
    root = Path(engine.__file__).resolve().parents[1]
    exports = [f"export {name}={shlex.quote(environ[name])}\n" for name in KEPT_VARIABLES if environ.get(name)]
    return _SCRIPT.format(
        mark=_MARK,
        version=engine.__version__,
        made=f"{_MADE_FOLDER}\n" if made else "",
        policies=shlex.quote(str(policy_folder)),
        python=shlex.quote(sys.executable),
        exports="".join(exports),
        code=shlex.quote(_CODE.format(root=str(root))),
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _version_of(text: str) -> str | None:
    lines = text.splitlines()[:2]
    return lines[1].removeprefix(_MARK) if len(lines) > 1 and lines[1].startswith(_MARK) else None


def _unnoted(text: str) -> str:
    return text.replace(f"{_MADE_FOLDER}\n", "")


def _kept(text: str) -> dict[str, str]:
    """Return the variables that the script sets."""
    words = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("export ")]
    return dict(word.split("=", 1) for word in words)


def _policies_of(text: str) -> Path | None:
    """Return where the script looks for policies."""
    for line in text.splitlines():
        if line.startswith("policy="):
            return Path(shlex.split(line.removeprefix("policy="))[0]).parent
    return None


def _problem(path: Path, text: str | None) -> str | None:
    if text is None:
        return "is not installed"
    if _version_of(text) is None:
        return "is not of this program"
    facts = path.stat()
    if not facts.st_mode & stat.S_IXUSR:
        return "is not executable: libvirt passes it over"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "may be written by others than its owner, and the daemon runs it as root"
    for line in text.splitlines():
        if line.startswith(_PYTHON):
            (python,) = shlex.split(line.removeprefix(_PYTHON))
            return None if os.access(python, os.X_OK) else f"needs {python}, which is gone: install it again"
    return "is damaged: install it again"


def _policy_states(folder: Path) -> list[PolicyState]:
    found = []
    for path in sorted(folder.glob("*.toml")) if folder.is_dir() else []:
        problem = None
        try:
            policies.load(path)
            if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                problem = "may be written by others than its owner, and tells root what to throw away"
        except InvalidRequest as error:
            problem = error.reason
        except (VmdkSnapError, OSError) as error:
            problem = str(error)
        found.append(PolicyState(path.name.removesuffix(".toml"), path, problem))
    return found


def _older_daemons(path: Path) -> list[str]:
    """Return the running daemons that started before the hook's file was written."""
    written = path.stat().st_mtime
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            name = (process / "comm").read_text().strip()
            if name in DAEMONS and process.stat().st_mtime < written:
                found.append(f"{name} ({process.name})")
    return sorted(found)
