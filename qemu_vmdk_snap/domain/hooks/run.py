"""The libvirt hook for a domain with a policy. Imports are few and late, as a guest's start waits for it.

libvirt's rules (docs/hooks.html): the domain's XML comes on standard input; what is written to standard error is shown
when the status is not 0; at `prepare begin` such a status refuses the start. A hook must never call libvirt back: it
would wait for the hook. What needs libvirt is done by a process of its own, which outlives the hook.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import qemu_vmdk_snap as engine
from qemu_vmdk_snap.domain.hooks import policy as policies
from qemu_vmdk_snap.domain.xml.served import direct_view, served_disks
from qemu_vmdk_snap.errors import DomainError, VmdkSnapError
from qemu_vmdk_snap.light import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import FrameType

    from qemu_vmdk_snap.domain.hooks.policy import Policy
    from qemu_vmdk_snap.domain.xml import Disk

PROGRAM: Final = "qemu-vmdk-snap"
WAITING: Final = "urn:qemu-vmdk-snap:waiting:1"
"""The namespace of waiting deletes in a domain's XML (`xml.waiting`, which takes longer to import)."""
_PATIENCE: Final = 2.0
"""Seconds from the deadline to the end of the process, if the exception does not end it."""

_SYSLOG: Final = "/dev/log"
_DAEMON, _ERR, _INFO = 3 << 3, 3, 6
_LONGEST_LINE: Final = 8192

_MAX_XML: Final = 16 << 20
_LOOKED_AT: Final = ("is read-only", "is shared", "is transient")
"""Disks that take no part in a snapshot for these reasons are checked nevertheless."""


def main(argv: Sequence[str], stdin: IO[bytes], stderr: IO[str]) -> int:
    """Do what the policy says for (POLICY, NAME, OPERATION, SUBOPERATION, ...) and return the exit status.

    1, with one line on `stderr`, refuses a start. After a guest has stopped it is 0, whatever happens.
    """
    path, name, operation, sub, *_ = [*argv, "", "", "", ""]
    if (operation, sub) == ("prepare", "begin"):
        return _guarded(name, lambda: _prepare(Path(path), name, stdin), stderr, failed=1)
    if (operation, sub) == ("release", "end"):
        return _guarded(name, lambda: _release(Path(path), name, stdin), stderr, failed=0)
    return 0


def log(line: str, *, error: bool = False) -> None:
    """Send one line to syslog without waiting; it is lost if there is no syslog, or if syslog hangs.

    Written as syslog(3) does (RFC 3164, local form), which itself waits for as long as the receiver does not read: a
    guest's start would hang with it.
    """
    import socket
    import time

    priority = _DAEMON | (_ERR if error else _INFO)
    text = f"<{priority}>{time.strftime('%b %e %H:%M:%S')} {PROGRAM}[{os.getpid()}]: {' '.join(line.split())}"
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.connect(_SYSLOG)
        sender.send(text.encode("utf-8", "backslashreplace")[:_LONGEST_LINE])


def verify_disks(disks: Sequence[Disk], policy: Policy, name: str) -> None:
    """Accept chains that are valid and equal to what the XML spells out; with `deep`, valid tables too.

    Raises:
        VmdkSnapError, OSError: one is not.
    """
    for disk in disks:
        if disk.path is None:
            continue
        trusted = _folders(disk, policy)
        links = engine.read_links(disk.path, trusted_dirs=trusted)
        # QEMU follows the XML, not the hints.
        if disk.closed and [link.path.resolve() for link in links[1:]] != [path.resolve() for path in disk.backing]:
            reason = f"disk {disk.target}: the chain in its XML differs from that of its files: {_names(disk)}"
            raise DomainError(name, reason)
        if policy.verify == "deep":
            _check_deep(disk, disk.path, trusted, name)


def require_tops(disks: Sequence[Disk], policy: Policy, name: str) -> None:
    """Accept disks that nothing is backed by: what a guest writes to one would change what its overlays read.

    Looked for are overlays of any format, in the folders of the chain and in the trusted ones.

    Raises:
        DomainError: an overlay is backed by a disk, as where a live XML was defined after a snapshot.
        StillNeeded: a folder cannot be listed.
    """
    for disk in disks:
        if disk.path is None or disk.refusal is not None:
            continue
        folders = {disk.path.parent, Path(os.path.realpath(disk.path)).parent, *_folders(disk, policy)}
        for one in engine.Census.of(folder for folder in folders if folder.is_dir()).dependents([disk.path]):
            if one.how == "parent":
                reason = f"disk {disk.target}: {disk.path} backs {one.path}, which would read what the guest writes"
                raise DomainError(name, f"{reason}: `doctor {name}` says what to do")


def vmdk_disks(domain_xml: str, name: str) -> list[Disk]:
    """Return the VMDK disks of the domain.

    Raises:
        DomainError: one of them is a volume of a pool, whose file only libvirt knows.
    """
    from qemu_vmdk_snap.domain.xml import list_disks

    nowhere = Path()  # relative: refused for that, but only where it would be a VMDK disk
    disks = list_disks(domain_xml, lambda _pool, _volume: nowhere)
    for disk in disks:
        if disk.path == nowhere and disk.refusal == "has a relative path":
            reason = (
                f"disk {disk.target} is a volume, and a hook cannot ask libvirt for its file: name the file instead"
            )
            raise DomainError(name, reason)
    return [disk for disk in disks if disk.refusal is None or disk.refusal.startswith(_LOOKED_AT)]


def _guarded(name: str, work: Callable[[], None], stderr: IO[str], *, failed: int) -> int:
    """Run `work` and return 0; a failure is reported in syslog and in one line on `stderr`, and returns `failed`."""
    try:
        work()
    except (VmdkSnapError, OSError, _DeadlinePassed) as error:
        line = " ".join(str(error).split()).replace("(--allow-dir)", "(trusted-dirs, in its policy)")
        reason = line if line.startswith("domain ") else f"domain {name}: {line}"
    except Exception as error:  # a bug, or a broken installation: one line too, never a traceback
        reason = f"domain {name}: {type(error).__name__}: {' '.join(str(error).split())}"
    else:
        return 0
    log(reason, error=True)
    if failed:
        stderr.write(f"{PROGRAM}: {reason}\n")
    return failed


def _prepare(path: Path, name: str, stdin: IO[bytes]) -> None:
    with _deadline(policies.DEFAULT_DEADLINE) as extend:
        policy = _policy(path)
        extend(policy.deadline)
        text = direct_view(_read_xml(stdin))
        _require_reason(path, text)
        if served_disks(text):
            from qemu_vmdk_snap.domain.hooks.serve import refuse_other_state

            refuse_other_state(text, name)
        disks = vmdk_disks(text, name)
        serving = policy.serve and bool(served_disks(text))
        if serving:
            from qemu_vmdk_snap.domain.hooks.serve import refuse_other_state

            refuse_other_state(text, name)
        named = {path.parent for disk in disks if disk.path is not None for path in (disk.path, *disk.backing)}
        with engine.allowing(*named, below=False):
            if policy.verify != "no":
                verify_disks(disks, policy, name)
                require_tops(disks, policy, name)
            if policy.revert:
                _revert(disks, policy, name, text)
        if serving:
            from qemu_vmdk_snap.domain.hooks.serve import start_servers

            start_servers(text, policy, name)


def _policy(path: Path) -> Policy:
    """Return the policy; a domain with served disks needs none of its own."""
    if path.exists():
        return policies.load(path)
    return policies.Policy(path, connect=policies.DEFAULT_CONNECT if os.geteuid() == 0 else "qemu:///session")


def _require_reason(path: Path, text: str) -> None:
    """Refuse a policy that is not there, but for a domain with served disks.

    Raises:
        OSError: there is none.
    """
    if not path.exists() and not served_disks(text):
        policies.load(path)


def _revert(disks: Sequence[Disk], policy: Policy, name: str, domain_xml: str) -> None:
    chosen = {disk.target: disk for disk in disks if disk.refusal is None}
    if not isinstance(policy.revert, bool):
        missing = [target for target in policy.revert if target not in chosen]
        if missing:
            raise DomainError(
                name, f"{policy.path}: revert-on-start names {missing[0]}, which is not a disk of the domain"
            )
        chosen = {target: chosen[target] for target in policy.revert}
    from qemu_vmdk_snap.domain.hooks.unneeded import require_tops_unneeded

    require_tops_unneeded([disk.path for disk in chosen.values() if disk.path is not None], domain_xml)
    for disk in chosen.values():
        if disk.path is not None:
            engine.renew_overlay(disk.path, trusted_dirs=_folders(disk, policy))
    log(f"domain {name}: reverted {', '.join(chosen)} for a clean start")


def _release(path: Path, name: str, stdin: IO[bytes]) -> None:
    with _deadline(policies.DEFAULT_DEADLINE):
        policy = _policy(path)
        text = _read_xml(stdin)
        _require_reason(path, text)
        if policy.serve and served_disks(text):
            from qemu_vmdk_snap.domain.hooks.serve import stop_servers

            stop_servers(text, name)
        if not policy.snapshot_after_stop and WAITING not in text:
            return
        import re

        # The id distinguishes the run that has ended from the next one. libvirt writes it first: no parser is needed.
        found = re.search(r"<domain\b[^>]*\bid='(\d+)'", text[:4096])
        run = found[1] if found else "-1"
    root = Path(__file__).resolve().parents[2]
    start = "from qemu_vmdk_snap.cli.program import program; sys.exit(program())"
    code = f"import sys; sys.path.append({str(root)!r}); {start}"
    spawn_detached([sys.executable, "-I", "-c", code, "hook", "after-stop", name, "--policy", str(path), "--id", run])


def spawn_detached(words: Sequence[str]) -> None:
    """Start a process that outlives this one and has none of its files open, and do not wait for it."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    # In the child nothing may return to the caller, and libvirt waits until standard output and error are closed.
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.closerange(3, 1024)
        os.execv(words[0], list(words))
    finally:
        os._exit(127)


class _DeadlinePassed(Exception):
    """The hook's deadline has passed."""


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[Callable[[float], None]]:
    """Raise _DeadlinePassed in the block at the deadline; if the block does not end, the process is ended.

    The block gets a function that sets a new deadline, counted from its call.
    """
    allowed = seconds
    called = False

    def ring(_signal: int, _frame: FrameType | None) -> None:
        nonlocal called
        if called:
            os.write(2, f"{PROGRAM}: the deadline of {allowed:g} s has passed\n".encode())
            os._exit(1)
        called = True
        raise _DeadlinePassed(f"the deadline of {allowed:g} s has passed")

    def extend(more: float) -> None:
        nonlocal allowed
        allowed = more
        signal.setitimer(signal.ITIMER_REAL, more, _PATIENCE)

    signal.signal(signal.SIGALRM, ring)
    extend(seconds)
    try:
        yield extend
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _read_xml(stdin: IO[bytes]) -> str:
    return stdin.read(_MAX_XML).decode("utf-8", "replace")


def _folders(disk: Disk, policy: Policy) -> list[Path]:
    """Return the folders of the chain, from the domain's own XML and its policy."""
    return sorted({*(path.parent for path in disk.backing), *map(Path, policy.trusted)})


def _names(disk: Disk) -> str:
    return ", ".join(path.name for path in disk.backing) or "none"


def _check_deep(disk: Disk, path: Path, trusted: Sequence[Path], name: str) -> None:
    import site

    site.main()  # the hook runs without it; NumPy is there
    report = engine.check_image(path, resolver=engine.confined(trusted), whole_chain=True)
    if errors := report.corruptions + report.check_errors:
        raise DomainError(name, f"disk {disk.target}: {errors} errors in its chain: {report.findings[0]}")
