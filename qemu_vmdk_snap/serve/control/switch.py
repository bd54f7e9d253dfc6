"""Another top beneath running clients: snapshots in one step or in two, and the change to another chain.

Order of a snapshot, so that a chain that opens is left whenever this stops, and that its last writer is found:
1. The top has its new CID already, so it will not change; the overlay names it, is durable, and open.
2. The note beside the socket names the overlay before that exists; it reads what the top reads.
3. In a pause: everything is flushed, the log ends, requests go to the overlay.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qemu_vmdk_snap import Link, copy_attributes, create_overlay, log, open_link
from qemu_vmdk_snap.chain.parent import MAX_DEPTH
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import InvalidRequest, VmdkSnapError
from qemu_vmdk_snap.serve.control.arguments import Arguments, path_argument
from qemu_vmdk_snap.serve.disk.opening import open_served
from qemu_vmdk_snap.serve.disk.stack import log_for
from qemu_vmdk_snap.serve.server import Server
from qemu_vmdk_snap.storage.journal.grainlog import GrainLog
from qemu_vmdk_snap.storage.locks import lock_image

_log = log.of(__name__)

_LONGEST_HOLD: Final = 60.0


class Holder:
    """One connection of the control socket: who holds the clients loses the hold with it."""


@dataclass(slots=True)
class _Prepared:
    token: str
    overlay: Path
    link: Link
    base: Link
    preparer: Holder | None = None
    """Who has prepared it in a step of its own, and takes it back by going away before the switch is final."""
    log: GrainLog | None = None
    """That of the overlay until the switch, that of the base from then on."""
    holder: Holder | None = None
    """Who holds the clients on it, between the switch and the release."""
    timer: threading.Timer | None = field(default=None, repr=False)


class Switcher:
    """The commands that change which chain a server serves; one at a time."""

    def __init__(self, server: Server) -> None:
        self._server, self._stack = server, server.stack
        self._one = threading.RLock()
        self._prepared: dict[str, _Prepared] = {}
        self._held: _Prepared | None = None
        self.keep_locked: Link | None = None
        """A link that is written by a merge: it stays locked for writing when it is frozen."""

    @property
    def held(self) -> bool:
        """Whether the clients are held between a switch and its release."""
        return self._held is not None

    def commands(self) -> dict[str, Callable[[Arguments, Holder], dict[str, Any]]]:
        """Return the commands by name."""
        return {
            "snapshot": self._snapshot,
            "snapshot-prepare": self._snapshot_prepare,
            "snapshot-switch": self._snapshot_switch,
            "snapshot-abort": self._snapshot_abort,
            "release": self._release,
            "switch": self._switch,
        }

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other command that changes the chain away for the block."""
        with self._one:
            yield

    def let_go(self, holder: Holder) -> None:
        """Take back what the holder has prepared or holds: its connection is gone."""
        with self._one:
            for prepared in list(self._prepared.values()):
                if holder in (prepared.preparer, prepared.holder):
                    self._abort(prepared)

    def end(self) -> None:
        """Take back everything that is prepared or held: the server ends."""
        with self._one:
            for prepared in list(self._prepared.values()):
                self._abort(prepared)

    def require_free(self) -> None:
        """Refuse what cannot be done while the clients are held."""
        if self._held is not None:
            raise InvalidRequest(self._held.overlay, "a snapshot is held: release or abort it first")

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def _snapshot(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        with self._one:
            prepared = self._prepare(path_argument(arguments, "overlay"))
            try:
                with self._stack.turn:
                    self._stack.flush()  # what has come meanwhile: the less is left for the pause
                started = time.monotonic()
                with self._stack.pause():
                    self._push(prepared)
                pause = time.monotonic() - started
            except BaseException:
                self._abort(prepared)
                raise
            self._settle(prepared)
            return {**_names(prepared), "pause_seconds": pause}

    def _snapshot_prepare(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        with self._one:
            prepared = self._prepare(path_argument(arguments, "overlay"))
            prepared.preparer = holder
            return {"token": prepared.token}

    def _snapshot_switch(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        with self._one:
            self.require_free()
            prepared = self._known(arguments)
            with self._stack.turn:
                self._stack.flush()
            started = time.monotonic()
            self._stack.hold()
            try:
                self._push(prepared)
            except BaseException:
                self._stack.release()
                self._abort(prepared)
                raise
            if arguments.get("hold"):
                self._hold(prepared, holder)
            else:
                self._stack.release()
                self._settle(prepared)
            return {**_names(prepared), "pause_seconds": time.monotonic() - started}

    def _release(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        with self._one:
            if self._held is None:
                raise InvalidRequest("release", "nothing is held")
            prepared = self._let_go_of_held()
            self._stack.release()
            self._settle(prepared)
            return _names(prepared)

    def _snapshot_abort(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        with self._one:
            self._abort(self._known(arguments))
            return {}

    def _known(self, arguments: Arguments) -> _Prepared:
        prepared = self._prepared.get(str(arguments.get("token")))
        if prepared is None:
            raise InvalidRequest("token", "names no snapshot that is prepared")
        return prepared

    def _prepare(self, overlay: Path) -> _Prepared:
        """Make the overlay of a snapshot, durably, and open it."""
        self.require_free()
        stack = self._stack
        if stack.read_only:
            raise InvalidRequest(stack.top.path, "is served read-only: nothing can be written to an overlay")
        if self._prepared:
            other = next(iter(self._prepared.values()))
            raise InvalidRequest(other.overlay, "another snapshot is prepared: switch to it or abort it first")
        if len(stack.links) >= MAX_DEPTH:
            raise InvalidRequest(overlay, f"would make the chain deeper than {MAX_DEPTH} links: merge some first")
        with stack.pause():
            stack.begin_writing()  # the CID that the overlay is going to name changes no more
        with stack.turn:
            stack.flush()  # most of what there is to flush, outside the pause
        base = stack.top
        if overlay.exists() or overlay.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(overlay))
        self._server.remember_top(overlay)  # first: once it exists, the base is frozen to whoever starts again
        create_overlay(overlay, base.path)
        try:
            link = self._opened(overlay, base)
        except BaseException:
            overlay.unlink()
            raise
        prepared = _Prepared(secrets.token_hex(8), overlay, link, base)
        self._prepared[prepared.token] = prepared
        try:
            link.renew_cid()  # here, so that nothing is waited for after the switch
            prepared.log = log_for(link)
        except BaseException:
            self._abort(prepared)
            raise
        return prepared

    def _opened(self, overlay: Path, base: Link) -> Link:
        resolver = confined([*self._server.trusted_dirs, Path(base.path).parent])
        link = open_link(overlay, writable=True, resolver=resolver)
        source, target = base.file.fileno(), link.file.fileno()
        assert source is not None
        assert target is not None
        try:
            copy_attributes(source, target)
        except BaseException:
            link.close()
            raise
        return link

    def _push(self, prepared: _Prepared) -> None:
        """Let the overlay be the top; the caller holds the clients."""
        stack = self._stack
        if stack.top is not prepared.base:
            raise InvalidRequest(prepared.overlay, f"was prepared on {prepared.base.path}, which is no longer the top")
        prepared.log = stack.add_top(prepared.link, prepared.log)

    def _settle(self, prepared: _Prepared) -> None:
        """Make a switch final: nobody writes the frozen link any more, and others may read it."""
        del self._prepared[prepared.token]
        if prepared.log is not None:
            prepared.log.remove()
        if prepared.base is not self.keep_locked:
            prepared.base.share()
        _log.info("%s: frozen, %s is the top", prepared.base.path, prepared.overlay)

    def _hold(self, prepared: _Prepared, holder: Holder) -> None:
        prepared.holder = holder
        prepared.timer = threading.Timer(_LONGEST_HOLD, self.let_go, args=(holder,))
        prepared.timer.daemon = True
        prepared.timer.start()
        self._held = prepared

    def _let_go_of_held(self) -> _Prepared:
        prepared = self._held
        assert prepared is not None
        assert prepared.timer is not None
        prepared.timer.cancel()
        prepared.holder, self._held = None, None
        return prepared

    def _abort(self, prepared: _Prepared) -> None:
        """Undo: the old top is the top again, the overlay is gone."""
        self._prepared.pop(prepared.token, None)
        stack = self._stack
        held = self._held is prepared
        try:
            if stack.top is prepared.link:
                if not held:
                    stack.hold()
                    held = True
                stack.end_writing()
                stack.set_links(stack.links[1:], keep_places=False)
            with contextlib.suppress(OSError, VmdkSnapError):
                self._server.remember_top(Path(stack.top.path))
            if prepared.log is not None:
                prepared.log.remove()
            prepared.link.close()
            with contextlib.suppress(FileNotFoundError):
                prepared.overlay.unlink()
        finally:
            if self._held is prepared:
                self._let_go_of_held()
            if held:
                stack.release()

    # --- another chain ------------------------------------------------------------------------------------------------

    def _switch(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        """Serve another chain: for a revert, while the guest is off or stopped."""
        path, force = path_argument(arguments, "top"), arguments.get("force") is True
        with self._one:
            self.require_free()
            if self._prepared:
                raise InvalidRequest(path, "a snapshot is prepared: switch to it or abort it first")
            if self.keep_locked is not None:
                raise InvalidRequest(path, "a merge runs: wait for it, or cancel it")
            stack, server = self._stack, self._server
            started = time.monotonic()
            with stack.pause():  # nobody connects between the count and the exchange
                if (clients := server.connections) and not force:
                    reason = f'{clients} clients are connected, and would see another disk ("force": true)'
                    raise InvalidRequest(stack.top.path, reason)
                self._exchange(path)
            return {"top": str(stack.top.path), "pause_seconds": time.monotonic() - started}

    def _exchange(self, path: Path) -> None:
        stack, server = self._stack, self._server
        stack.end_writing()
        old = stack.links
        if not stack.read_only:
            old[0].share()  # the new chain may have it as a parent
        try:
            new = open_served(path, read_only=stack.read_only, trusted_dirs=server.trusted_dirs)
            try:
                self._require_same_size(new[0])
                server.remember_top(path)
            except BaseException:
                for link in new:
                    link.close()
                raise
        except BaseException:
            if not stack.read_only:
                _hold_for_writing(old[0])
            raise
        stack.set_links(new, keep_places=False)
        for link in old:
            link.close()

    def _require_same_size(self, top: Link) -> None:
        known = self._stack.top.capacity
        if top.capacity != known and self._server.connections:
            raise InvalidRequest(top.path, f"has {top.capacity} bytes, not the {known} that the clients know")


def _hold_for_writing(link: Link) -> None:
    for file in link.files:
        descriptor = file.fileno()
        assert descriptor is not None
        lock_image(descriptor, file.path, writable=True)


def _names(prepared: _Prepared) -> dict[str, Any]:
    return {"frozen": str(prepared.base.path), "top": str(prepared.overlay)}
