"""Deleting a frozen link while the disk is used: what it stores goes into the link above it, then its file goes.

In order, so that every image reads what it read whenever this stops:
1. Other overlays on the link, of other branches, are rebased to its parent; each is independent of the rest.
2. The link above, the top or a frozen one, gets what it lacks of the link, piece by piece, and that is durable.
3. The operation is recorded as `image remove` records it; the descriptor of the link above names the parent; the file
   of the link is deleted. A server that is killed here leaves that to the next one, or to `recover`.
4. In a pause the link leaves the chain that is served.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from qemu_vmdk_snap import Census, Link, children_of, log, open_link, own_files, rebase, require_fit
from qemu_vmdk_snap.chain.change import TwoCopies
from qemu_vmdk_snap.chain.identity import on_parent
from qemu_vmdk_snap.chain.needs.dependents import require_nobody_new, search_folders
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.errors import InvalidRequest, LockBusy, VmdkSnapError
from qemu_vmdk_snap.ops.edit.move import relink_copied
from qemu_vmdk_snap.ops.journal.relink import DescriptorChange
from qemu_vmdk_snap.serve.control.arguments import Arguments, path_argument
from qemu_vmdk_snap.serve.control.switch import Holder, Switcher
from qemu_vmdk_snap.serve.disk.disk import Disk
from qemu_vmdk_snap.serve.disk.pull import Puller, stored_pieces
from qemu_vmdk_snap.serve.server import Server
from qemu_vmdk_snap.storage.identity import identity_of_open
from qemu_vmdk_snap.storage.locks import keep_from_writers, let_go, lock_image

_log = log.of(__name__)

_OPERATION: Final = "remove"
_RETRY_SECONDS: Final = 0.05
_LOOK_SECONDS: Final = 0.1
"""How often a merge that waits looks whether its limit has changed."""

State = Literal["running", "done", "failed", "cancelled"]


class _Cancelled(Exception):
    """The merge was cancelled, or the server ends."""


@dataclass(slots=True)
class _Job:
    name: str
    link: Link
    """What is deleted."""
    child: Link
    """The link above it, open for writing."""
    doomed: list[Path]
    census: Census
    done: int = 0
    total: int = 0
    copied: int = 0
    state: State = "running"
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("done", "total", "copied", "state")}
        into, deleted = str(self.child.path), str(self.link.path)
        error = {} if self.error is None else {"error": self.error}
        return {"job": self.name, "delete": deleted, "into": into, **facts, **error}


class Merger:
    """The merges of a server, one at a time."""

    def __init__(self, server: Server, switcher: Switcher) -> None:
        self._server, self._stack, self._switcher = server, server.stack, switcher
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._count = 0
        self._limit = 0
        self._stopped = threading.Event()

    def commands(self) -> dict[str, Callable[[Arguments, Holder], dict[str, Any]]]:
        """Return the commands by name."""
        return {"merge": self._merge, "merge-cancel": self._cancel, "merge-speed": self._speed}

    def status(self) -> dict[str, Any] | None:
        """Return how far the last merge is, None before the first."""
        return None if self._job is None else self._job.as_dict()

    def end(self) -> None:
        """Stop the merge: the server ends."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    # --- commands -----------------------------------------------------------------------------------------------------

    def _merge(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        path = path_argument(arguments, "delete")
        with self._switcher.alone():
            if self._job is not None and self._job.state == "running":
                raise InvalidRequest(path, f"{self._job.link.path} is being merged: one at a time")
            self._set_limit(arguments)
            self._count += 1
            try:
                job = self._prepared(path, f"merge-{self._count}")
                try:
                    self._server.remember_merge(Path(job.child.path))
                except BaseException:
                    self._take_back(job)
                    raise
            except BaseException:
                self._server.hidden = frozenset()
                raise
            self._stopped.clear()
            self._job = job
            self._switcher.keep_locked = job.child
            self._server.hidden = frozenset([job.link, job.child])
            self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
            self._thread.start()
            return {"job": job.name}

    def _cancel(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        return {}

    def _speed(self, arguments: Arguments, holder: Holder) -> dict[str, Any]:
        self._set_limit(arguments)
        return {}

    def _set_limit(self, arguments: Arguments) -> None:
        limit = arguments.get("bytes_per_second", 0)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise InvalidRequest("bytes_per_second", "must be a number of bytes, 0 for no limit")
        self._limit = limit

    # --- what can be known before the first change --------------------------------------------------------------------

    def _prepared(self, path: Path, name: str) -> _Job:
        stack, server = self._stack, self._server
        if stack.read_only:
            raise InvalidRequest(path, "is served read-only")
        real = path.resolve()
        depth = next((i for i, link in enumerate(stack.links) if Path(link.path).resolve() == real), None)
        if not depth:
            reason = "is the top, which is in use" if depth == 0 else "is no link of the served chain"
            raise InvalidRequest(path, reason)
        link, child = stack.links[depth], stack.links[depth - 1]
        parent = stack.links[depth + 1] if depth + 1 < len(stack.links) else None
        with stack.turn:  # nobody opens one of them after the count
            for one in (link, child) if depth > 1 else (link,):
                if readers := Disk.users(stack, one):
                    raise LockBusy(Path(one.path), "write", f"{readers} clients read this export")
            server.hidden = frozenset([link, child])
        if parent is not None and child.capacity > link.capacity < parent.capacity:
            reason = f"cannot be deleted: {child.path} reads zeros past its end, and would read {parent.path} there"
            raise InvalidRequest(path, reason)
        doomed = own_files(link)
        census = self._move_others(link, child, parent, doomed)
        self._lock(link)
        try:
            if depth > 1:
                child = self._for_writing(child)
            else:
                with stack.pause():
                    stack.begin_writing()  # its CID changes no more
        except BaseException:
            self._unlock(link)
            raise
        return _Job(name, link, child, doomed, census)

    def _move_others(self, link: Link, child: Link, parent: Link | None, doomed: list[Path]) -> Census:
        """Put the overlays of other branches on the parent; return who needs the files of the link then."""
        resolver = confined(self._server.trusted_dirs)
        served = Path(child.path).resolve()
        for again in (True, False):
            census = Census.of(search_folders([Path(link.path), *doomed, served], resolver))
            found = children_of(link.path, doomed, census, named=[child.path])
            require_fit(link.path, link.cid, found)
            others = [one.path for one in found if one.path.resolve() != served]
            if not others or not again:
                return census
            for one in others:
                rebase(one, None if parent is None else parent.path, resolver=resolver)
        raise AssertionError

    def _lock(self, link: Link) -> None:
        """Keep everybody else from the files of the link, which will be deleted."""
        done = []
        try:
            for file in link.files:
                descriptor = file.fileno()
                assert descriptor is not None
                done.append(descriptor)
                lock_image(descriptor, file.path, writable=True)
        except BaseException:
            for descriptor in done:
                keep_from_writers(descriptor)
            raise

    def _unlock(self, link: Link) -> None:
        for file in link.files:
            descriptor = file.fileno()
            if descriptor is not None and descriptor >= 0:
                keep_from_writers(descriptor)

    def _for_writing(self, child: Link) -> Link:
        """Return a frozen link open for writing, which is served from now on.

        Its locks pass to the new descriptors, and are never let go of. The old opening would not do any more: it has
        tables, and the length of the file, in memory.
        """
        resolver = confined([*self._server.trusted_dirs, Path(child.path).parent])
        target = open_link(child.path, writable=True, resolver=resolver, lock=False)
        try:
            pairs = list(zip(target.files, child.files, strict=True))
            for new, old in pairs:
                new_fd, old_fd = new.fileno(), old.fileno()
                assert new_fd is not None
                assert old_fd is not None
                if identity_of_open(new_fd) != identity_of_open(old_fd):
                    raise InvalidRequest(new.path, "was replaced by another file")  # noqa: TRY301
                lock_image(new_fd, new.path, writable=False)
                let_go(old_fd)
            self._lock(target)
            for placed in target.extents:
                if isinstance(placed.extent, TwoCopies):
                    placed.extent.settle_copies()
        except BaseException:
            self._unlock(target)
            for file in child.files:
                descriptor = file.fileno()
                assert descriptor is not None
                lock_image(descriptor, file.path, writable=False)
            target.close()
            raise
        with self._stack.pause():
            links = [target if one is child else one for one in self._stack.links]
            self._stack.set_links(links, keep_places=False)
        child.close()
        return target

    # --- the work -----------------------------------------------------------------------------------------------------

    def _run(self, job: _Job) -> None:
        state: State = "failed"
        try:
            self._copy(job)
            self._finish(job)
            state = "done"
        except _Cancelled:
            state = "cancelled"
        except (VmdkSnapError, OSError) as error:
            job.error = str(error)
            _log.info("%s: the merge failed: %s", job.link.path, error)
        finally:
            if state != "done":
                self._take_back(job)
            self._switcher.keep_locked = None
            self._server.hidden = frozenset()
            with contextlib.suppress(OSError):
                self._server.remember_merge(None)
            job.state = state  # last: whoever sees it may begin the next one

    def _copy(self, job: _Job) -> None:
        pieces = list(stored_pieces(self._stack, job.link))
        job.total = sum(end - start for start, end in pieces)
        puller = Puller(self._stack, job.child, job.link)
        began, allowed = time.monotonic(), 0.0
        for start, end in pieces:
            self._check_stopped()
            copied = puller.pull(start, end)
            job.copied += copied
            job.done += end - start
            limit = self._limit
            if limit:
                allowed += copied / limit
                self._wait_until(began + allowed, limit)
            if not limit or limit != self._limit:
                began, allowed = time.monotonic(), 0.0
        with self._stack.turn:
            puller.flush()

    def _wait_until(self, moment: float, limit: int) -> None:
        """Wait as that limit asks; no longer than until there is another one, or the merge is stopped."""
        while limit == self._limit and (left := moment - time.monotonic()) > 0:
            if self._stopped.wait(min(left, _LOOK_SECONDS)):
                return

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise _Cancelled

    def _finish(self, job: _Job) -> None:
        """Take the link out: of the images, then of what is served."""
        while True:
            self._check_stopped()
            with self._switcher.alone():
                if not self._switcher.held:
                    self._finish_alone(job)
                    return
            self._stopped.wait(_RETRY_SECONDS)

    def _finish_alone(self, job: _Job) -> None:
        stack, link, child = self._stack, job.link, job.child
        at = stack.links.index(link)
        parent = stack.links[at + 1] if at + 1 < len(stack.links) else None
        path = None if parent is None else Path(parent.path)
        below = None if parent is None else parent.descriptor
        new = on_parent(child.descriptor, Path(child.path), path, below)
        change = DescriptorChange.plan(child, new)

        def still() -> None:
            require_nobody_new(Path(link.path), job.doomed, job.census)

        relink_copied(_OPERATION, change, child, path, link, job.doomed, still)
        with stack.pause():
            stack.set_links([one for one in stack.links if one is not link], keep_places=False)
        if child is not stack.top:
            child.share()
        link.close()

    def _take_back(self, job: _Job) -> None:
        """Leave everything as it reads: what was copied stays where it is, and does no harm."""
        with contextlib.suppress(OSError, VmdkSnapError):
            if self._stack.top is not job.child:
                with self._stack.turn:
                    job.child.flush()
                job.child.share()
            if job.link in self._stack.links:
                self._unlock(job.link)
