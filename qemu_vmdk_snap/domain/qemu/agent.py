"""Freezing a guest's file systems with its agent during a live snapshot.

libvirt waits for an agent without a limit by default, and once it has talked to one it no
longer tests whether that still answers: virDomainFSFreeze on an agent that hangs never returns, and nothing can
interrupt it. So each command here goes to the agent with a deadline of its own. A freeze that was not answered in time
may still happen later: it is thawed before anything else is done.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from qemu_vmdk_snap import log
from qemu_vmdk_snap.domain.qemu.monitor import import_binding
from qemu_vmdk_snap.errors import DomainError, InvalidRequest

if TYPE_CHECKING:
    import libvirt

_log = log.of(__name__)

QUIESCE: Final = ("no", "auto", "require")
PING_SECONDS: Final = 5
FREEZE_SECONDS: Final = 60
THAW_SECONDS: Final = 30
_AGENT_COMMAND_TIMEOUT: Final = 112


def check_quiesce(quiesce: str) -> None:
    """Accept what `--quiesce` can be.

    Raises:
        InvalidRequest: it is something else.
    """
    if quiesce not in QUIESCE:
        raise InvalidRequest(f"quiesce {quiesce!r}", f"must be one of {', '.join(QUIESCE)}")


@contextlib.contextmanager
def frozen(domain: libvirt.virDomain, quiesce: str, notes: list[str]) -> Iterator[bool]:
    """Hold the file systems for the length of the block, as far as that is wanted; give whether they are held.

    Raises:
        DomainError: they are required to be held, and cannot be; none is.
    """
    held = 0
    if quiesce != "no":
        try:
            held = _freeze(domain)
        except DomainError as error:
            if quiesce == "require":
                raise
            notes.append(error.reason)
    try:
        yield held > 0
    finally:
        if held:
            _release(domain, notes)


def thaw_left(domain: libvirt.virDomain) -> None:
    """Thaw what a command that died may have left frozen, if its agent answers."""
    import libvirt

    with contextlib.suppress(libvirt.libvirtError):
        _ask(domain, "guest-fsfreeze-thaw", PING_SECONDS)


def _freeze(domain: libvirt.virDomain) -> int:
    """Return how many file systems are frozen now: at least one."""
    import libvirt

    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        raise DomainError(domain.name(), "its file systems cannot be frozen: it is paused, and so is its agent")
    asked = False
    try:
        _ask(domain, "guest-ping", PING_SECONDS)  # an agent that hangs is given nothing that it would do later
        asked = True
        count = int(_ask(domain, "guest-fsfreeze-freeze", FREEZE_SECONDS))
    except libvirt.libvirtError as error:
        reason = f"its file systems cannot be frozen: {_message(error)}"
        # The agent's own "no" undoes what it has begun, and leaves alone what somebody else has frozen before.
        if asked and _is_silence(error):
            complaint = _thaw(domain)[1]
            reason += f", nor thawed: {complaint}: try `virsh domfsthaw`" if complaint else " (thawed again)"
        raise DomainError(domain.name(), reason) from error
    except BaseException:  # an interruption, which is raised only once libvirt has let go: it may be frozen by now
        if asked:
            _thaw(domain)
        raise
    if not count:
        raise DomainError(domain.name(), "its file systems cannot be frozen: the agent has found none that can be")
    return count


def _release(domain: libvirt.virDomain, notes: list[str]) -> None:
    count, complaint = _thaw(domain)
    if complaint:
        notes.append(f"its file systems could not be thawed: {complaint}: try `virsh domfsthaw`")
    elif not count:
        notes.append("its file systems were thawed too early, by something else: the snapshot may not be clean")


def _thaw(domain: libvirt.virDomain) -> tuple[int, str | None]:
    """Return how many file systems were thawed, and what stood in the way if it could not be done.

    An agent that is still busy, or is just being started again, is given time: a frozen guest can do nothing else.
    """
    import libvirt

    deadline = time.monotonic() + THAW_SECONDS
    while True:
        try:
            return int(_ask(domain, "guest-fsfreeze-thaw", max(1, int(deadline - time.monotonic())))), None
        except libvirt.libvirtError as error:
            if not _is_silence(error) or time.monotonic() > deadline:
                return 0, _message(error)
        time.sleep(0.2)


def _ask(domain: libvirt.virDomain, command: str, seconds: int) -> Any:  # noqa: ANN401
    """Return what the agent answers; its "no" is a libvirtError as well."""
    _log.debug("domain %s: sent to the guest's agent: %s", domain.name(), command)
    answer = import_binding().qemuAgentCommand(domain, json.dumps({"execute": command}), seconds, 0)
    return json.loads(answer)["return"]


def _is_silence(error: libvirt.libvirtError) -> bool:
    import libvirt

    # Newer libvirt has a code of its own for an answer that does not come; older bindings do not know its name.
    timeout = getattr(libvirt, "VIR_ERR_AGENT_COMMAND_TIMEOUT", _AGENT_COMMAND_TIMEOUT)
    return error.get_error_code() in (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, timeout)


def _message(error: libvirt.libvirtError) -> str:
    return " ".join(str(error).split())
