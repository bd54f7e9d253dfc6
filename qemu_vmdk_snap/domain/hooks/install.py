"""Install and remove the libvirt hook, and report its state.

The hook is a shell script: for a domain without a policy, and for every event that is not handled (reconnect among
them, where a failure would kill the guest), it ends before it starts Python. libvirt runs every executable in
`/etc/libvirt/hooks/qemu.d` in the order of their names; the folder is fixed when libvirt is built.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import re
import shlex
import site
import stat
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain.dropins.trust import Distrust, distrust, distrust_tree
from qemu_vmdk_snap.domain.hooks import policy as policies
from qemu_vmdk_snap.domain.xml.served import NAMESPACE
from qemu_vmdk_snap.errors import InvalidRequest, VmdkSnapError

_log = logging.getLogger(__name__)

FOLDER: Final = Path("/etc/libvirt/hooks/qemu.d")
NAME: Final = "50-qemu-vmdk-snap"
KEPT_VARIABLES: Final = ("QEMU_VMDK_SNAP_STATE", "QEMU_VMDK_SNAP_HOOKS")
"""Variables that the hook must have as the commands do; libvirt starts hooks with almost no environment."""

DAEMONS: Final = ("libvirtd", "virtqemud")
_MARK: Final = "# libvirt hook of qemu-vmdk-snap "
_MADE_FOLDER: Final = "# its folder was made with it"
_PYTHON: Final = "python="
_SCRIPT: Final = """\
#!/bin/sh
{mark}{version}
{made}# Written by `qemu-vmdk-snap hook install`; `qemu-vmdk-snap hook uninstall` removes it.
# Arguments: domain, operation, sub-operation, extra; the domain's XML is on standard input.
# At reconnect a failure would kill the guest: only these two are ours.
case "$2/$3" in
prepare/begin) refused=1 ;;
release/end) refused=0 ;;
*) exit 0 ;;
esac
policies={policies}
policy="$policies/$1.toml"
# A policy by UUID goes before one by name. Disks that are to be served are told of in the metadata, and need no policy.
# The XML is read no further than that, and only where there are policies by UUID, or there is none by name.
head=
served=
read=
[ -e "$policy" ] || read=1
for file in "$policies"/????????-????-????-????-????????????.toml; do
    [ -e "$file" ] && read=1
    break
done
while [ -n "$read" ] && {{ IFS= read -r line || [ -n "$line" ]; }}; do
    head="$head$line
"
    case "$line" in
    *"<uuid>"*"</uuid>"*)
        line="${{line#*<uuid>}}"
        if [ -e "$policies/${{line%%</uuid>*}}.toml" ]; then policy="$policies/${{line%%</uuid>*}}.toml"; fi
        ;;
    *{served}*) served=1 ;;
    *"</metadata>"* | *"<memory"* | *"<os"*) break ;;
    esac
done
# A domain without a policy and without served disks is let through here.
[ -e "$policy" ] || [ -n "$served" ] || exit 0
python={python}
if [ ! -x "$python" ]; then
    echo "qemu-vmdk-snap: $python is gone: install the hook again, or remove $policy" >&2
    exit "$refused"
fi
{exports}if [ -n "$head" ]; then
    {{
        printf '%s' "$head"
        cat
    }} | "$python" -I -S -c {code} "$policy" "$@"
    exit
fi
exec "$python" -I -S -c {code} "$policy" "$@"
"""
_CODE: Final = (
    "import gc, os, sys; gc.set_threshold(50000); sys.path.insert(0, {root!r}); "
    "from qemu_vmdk_snap.domain.hooks.run import main; "
    "status = main(sys.argv[1:], sys.stdin.buffer, sys.stderr); sys.stderr.flush(); os._exit(status)"
)
"""As `cli.program` begins and ends: a quarter of the time that a guest's start waits for the hook."""


@dataclass(frozen=True, slots=True)
class PolicyState:
    """One policy file, and its problem."""

    domain: str
    """The name or the UUID of the domain in the file's name."""
    path: Path
    problem: str | None
    connect: str = policies.DEFAULT_CONNECT


@dataclass(frozen=True, slots=True)
class HookStatus:
    """How the hook is installed."""

    path: Path
    installed: bool
    version: str | None
    """The version of the package that wrote it."""
    current: bool
    """Whether it is what this package would write."""
    problem: str | None
    policies: tuple[PolicyState, ...]
    restart: tuple[str, ...]
    """Daemons that were started before the hook was installed, and do not know it if it is the first."""


def install(
    folder: Path = FOLDER, policy_folder: Path = policies.FOLDER, environ: Mapping[str, str] = os.environ
) -> Path:
    """Write the hook, in one step, and return its path; an older one of this package is replaced.

    Raises:
        InvalidRequest: another file has its name, the paths are not absolute, or others could change what the
            daemon would run.
        OSError: it cannot be written.
    """
    path = folder / NAME
    if not (folder.is_absolute() and policy_folder.is_absolute()):
        raise InvalidRequest(folder, "and the folder of the policies must be absolute paths")
    old = _read(path)
    if old is not None and _version_of(old) is None:
        raise InvalidRequest(path, "was not installed by this program: it was not changed")
    for problem in _distrusted(Path(sys.executable), _root(), {path.parent, policy_folder}):
        raise InvalidRequest(
            problem.place, f"{problem.reason}, and libvirt would run it as root: nothing was installed"
        )
    made = _MADE_FOLDER in old if old is not None else not folder.exists()
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    policy_folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    engine.replace_file(path, _script(policy_folder, environ, made=made).encode(), mode=0o755)
    path.chmod(0o755)  # independent of the umask: the daemon runs it
    _log.info("hook %s installed", path)
    return path


def uninstall(folder: Path = FOLDER) -> bool:
    """Remove the hook, and its folder if it was made with it and is empty now; False when there is none.

    Policies stay: they are the user's.

    Raises:
        InvalidRequest: the file of that name was not installed by this program.
        OSError: it cannot be removed.
    """
    path = folder / NAME
    text = _read(path)
    if text is None:
        return False
    if _version_of(text) is None:
        raise InvalidRequest(path, "was not installed by this program: it was not changed")
    path.unlink()
    if _MADE_FOLDER in text:
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()
    return True


def status(folder: Path = FOLDER, policy_folder: Path | None = None) -> HookStatus:
    """Return the state of the hook and of its policies."""
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


def _root() -> Path:
    """Return the folder that the package is in."""
    return Path(engine.__file__).resolve().parents[1]


def _distrusted(
    python: Path, root: Path, folders: Collection[Path], owners: Collection[int] = ()
) -> Iterator[Distrust]:
    """Yield how others could change what the daemon runs: script, interpreter, package and imported modules.

    Raises:
        OSError: a part of it is gone.
    """
    for folder in folders:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        yield from filter(None, [distrust(there, owners)])
    libraries = [Path(name) for name in site.getsitepackages()]
    for path in (python, root, *(one for one in libraries if one.is_dir())):
        yield from filter(None, [distrust(path, owners)])
    yield from filter(None, [distrust_tree(root / Path(engine.__file__).parent.name, owners)])


def _script(policy_folder: Path, environ: Mapping[str, str], *, made: bool) -> str:
    root = _root()
    exports = [f"export {name}={shlex.quote(environ[name])}\n" for name in KEPT_VARIABLES if environ.get(name)]
    return _SCRIPT.format(
        mark=_MARK,
        version=engine.__version__,
        made=f"{_MADE_FOLDER}\n" if made else "",
        policies=shlex.quote(str(policy_folder)),
        python=shlex.quote(sys.executable),
        exports="".join(exports),
        served=shlex.quote(NAMESPACE),
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
        if line.startswith("policies="):
            return Path(shlex.split(line.removeprefix("policies="))[0])
        if line.startswith("policy=/"):  # of an earlier version
            return Path(shlex.split(line.removeprefix("policy="))[0]).parent
    return None


def _root_of(text: str) -> Path | None:
    """Return where the script finds the package."""
    found = re.search(r"sys\.path\.insert\(0, (.+?)\); from qemu_vmdk_snap", text)
    try:
        # Inside the script it is quoted once more, for the shell.
        return None if found is None else Path(ast.literal_eval(found[1].replace("'\"'\"'", "'")))
    except (ValueError, SyntaxError):
        return None


def _problem(path: Path, text: str | None) -> str | None:
    if text is None:
        return "is not installed"
    if _version_of(text) is None:
        return "was not installed by this program"
    facts = path.stat()
    if not facts.st_mode & stat.S_IXUSR:
        return "is not executable: libvirt ignores it"
    found = [shlex.split(line.removeprefix(_PYTHON)) for line in text.splitlines() if line.startswith(_PYTHON)]
    root = _root_of(text)
    if not found or root is None:
        return "is damaged: install it again"
    python = Path(found[0][0])
    if not os.access(python, os.X_OK):
        return f"needs {python}, which is gone: install it again"
    try:
        for problem in _distrusted(python, root, {path}, {facts.st_uid}):
            which = "" if problem.place == path else f"runs {problem.place}, which "
            return f"{which}{problem.reason}, and the daemon runs it as root"
    except OSError as error:
        return f"needs {error.filename}: {error.strerror}: install it again"
    return None


def _policy_states(folder: Path) -> list[PolicyState]:
    found = []
    for path in sorted(folder.glob("*.toml")) if folder.is_dir() else []:
        problem, connect = None, policies.DEFAULT_CONNECT
        try:
            connect = policies.load(path).connect
            others = distrust(path)
            if others is not None:
                place = "" if others.place == path else f"{others.place} "
                problem = f"{place}{others.reason}, and decides what root discards"
        except InvalidRequest as error:
            problem = error.reason
        except (VmdkSnapError, OSError) as error:
            problem = str(error)
        found.append(PolicyState(path.name.removesuffix(".toml"), path, problem, connect))
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
