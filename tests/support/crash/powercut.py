"""A folder whose changes are recorded while an operation runs on it, and the states that a power cut could leave.

The operation runs for real; the calls by which Python changes a file or a name are watched. The model of the disk:

- the data of a file is durable after fsync or fdatasync of that file. What was written since reaches the disk in any
  subset, each write torn at 512-byte sectors; a length may reach it before the data, which then is old rubbish;
- a name (made, linked, renamed, unlinked) is durable after fsync of its folder, and not by fsync of its file. Names
  changed since reach the disk in any subset too; a rename is one step.

Operation records know files by inode. So every inode that there ever was is kept by a hard link in a second folder, and
a state is put back into the same inodes.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import linecache
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest.mock import patch

from qemu_vmdk_snap.storage import blockfile

SECTOR: Final = 512
MARK: Final = b"\xa5"
"""What free space of the disk holds before it is written."""
_PACKAGE: Final = str(Path(blockfile.__file__).parent.parent)
_PRIMITIVES: Final = ("PosixFile.flush", "sync_folder", "_sync_folders", "_sync_file")
"""Functions that are a barrier themselves: what matters is who calls them."""


class Write(NamedTuple):
    inode: int
    offset: int
    data: bytes


class Punch(NamedTuple):
    inode: int
    offset: int
    length: int


class Length(NamedTuple):
    inode: int
    size: int


class Names(NamedTuple):
    """One change of names: each becomes the inode, or nothing."""

    folder: str
    become: tuple[tuple[str, int | None], ...]


class Barrier(NamedTuple):
    of: int | str
    """An inode, or a folder."""
    site: str


class Mark(NamedTuple):
    """A promise from here on: what was asked for before is durable."""


Change = Write | Punch | Length | Names
Event = Change | Barrier | Mark


class State(NamedTuple):
    """What a power cut could leave, and how many promises had been made by then."""

    names: tuple[tuple[str, int], ...]
    contents: dict[int, bytes]
    marks: int
    at: int
    """The event before which the power is cut."""


class Recorder:
    """Watches one folder. `events` has what was done in the order it was done, `initial` what was there before."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self.folder, self._kept = folder, kept
        kept.mkdir(exist_ok=True)
        self._known: set[int] = set()
        self.events: list[Event] = []
        self.initial = State((), {}, 0, 0)

    def again(self) -> Recorder:
        """Return a recorder of the same folder that knows the same inodes."""
        other = Recorder(self.folder, self._kept)
        other._known = self._known
        return other

    def mark(self) -> None:
        self.events.append(Mark())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record what the block does; nothing waits for the real disk meanwhile."""
        self.events = []
        self.initial = self.now()
        with self.still(), contextlib.ExitStack() as stack:
            for module, name, wrapper in self._wrappers():
                stack.enter_context(patch.object(module, name, wrapper))
            yield

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Let nothing wait for the real disk in the block, and nobody see the links by which the inodes are kept."""
        with contextlib.ExitStack() as stack:
            for name in ("fsync", "fdatasync"):
                stack.enter_context(patch.object(os, name, lambda fd: None))
            for name in ("stat", "lstat", "fstat"):
                stack.enter_context(patch.object(os, name, self._unkept(getattr(os, name))))
            yield

    def _unkept(self, call: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def wrapper(*args: Any, **keywords: Any) -> os.stat_result:  # noqa: ANN401
            facts = call(*args, **keywords)
            if facts.st_ino not in self._known:
                return facts
            parts: Any = facts.__reduce__()
            values, more = parts[1]
            return os.stat_result((*values[:3], values[3] - 1, *values[4:]), more)

        return wrapper

    def now(self) -> State:
        """Return what is in the folder, all of it durable."""
        names, contents = {}, {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                inode = self._keep(path)
                names[str(path.relative_to(self.folder))] = inode
                contents[inode] = path.read_bytes()
        return State(tuple(names.items()), contents, 0, 0)

    def put(self, state: State) -> None:
        """Let the folder hold `state`, in the inodes that it is about."""
        for path in self.folder.rglob("*"):
            if not path.is_dir():
                path.unlink()
        for name, inode in state.names:
            kept = self._kept / str(inode)
            (self.folder / name).hardlink_to(kept)
            with kept.open("r+b") as file:
                file.truncate(0)
                file.write(state.contents[inode])

    # --- what is watched ----------------------------------------------------------------------------------------------

    def _keep(self, path: Path) -> int:
        inode = path.lstat().st_ino
        if inode not in self._known:
            _LINK(path, self._kept / str(inode))
            self._known.add(inode)
        return inode

    def _name(self, path: Any) -> str | None:  # noqa: ANN401
        """Return the path within the folder, None for one elsewhere."""
        full = os.path.abspath(os.fspath(path))  # noqa: PTH100 (a link stays one)
        return os.path.relpath(full, self.folder) if full.startswith(f"{self.folder}/") else None

    def _inode(self, fd: int) -> int | None:
        inode = os.fstat(fd).st_ino
        return inode if inode in self._known else None

    def _rename(self, old: Any, new: Any) -> None:  # noqa: ANN401
        before, after = self._name(old), self._name(new)
        if before is None or after is None:
            return
        inode = os.lstat(new).st_ino
        folder = str(Path(after).parent)
        assert folder == str(Path(before).parent), "a rename from folder to folder is not modelled"
        self.events.append(Names(folder, ((before, None), (after, inode))))

    def _wrappers(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        real = {name: getattr(os, name) for name in _WATCHED}
        ioctl, punch = fcntl.ioctl, blockfile._fallocate_function()
        log = self.events.append

        def opened(path: Any, flags: int, *rest: Any, **keywords: Any) -> int:  # noqa: ANN401
            new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
            fd: int = real["open"](path, flags, *rest, **keywords)
            name = self._name(path) if new else None
            if name is not None:
                log(Names(str(Path(name).parent), ((name, self._keep(Path(path))),)))
            return fd

        def written(fd: int, offset: int, length: int) -> None:
            inode = self._inode(fd)
            if inode is not None and length > 0:
                log(Write(inode, offset, _read(fd, offset, length)))

        def pwrite(fd: int, data: Any, offset: int) -> int:  # noqa: ANN401
            done: int = real["pwrite"](fd, data, offset)
            written(fd, offset, done)
            return done

        def write(fd: int, data: Any) -> int:  # noqa: ANN401
            inode = self._inode(fd)
            offset = os.lseek(fd, 0, os.SEEK_CUR) if inode is not None else 0
            done: int = real["write"](fd, data)
            if inode is not None:
                log(Write(inode, offset, bytes(memoryview(data).cast("B")[:done])))
            return done

        def copy_file_range(source: int, target: int, count: int, at: int, to: int) -> int:
            done: int = real["copy_file_range"](source, target, count, at, to)
            written(target, to, done)
            return done

        def cloned(fd: int, code: int, argument: Any = 0, *rest: Any) -> Any:  # noqa: ANN401
            result = ioctl(fd, code, argument, *rest)
            if code == 0x4020940D:
                _, _, length, to = memoryview(argument).cast("B").cast("Q").tolist()
                written(fd, to, length)
            return result

        def truncated(fd: int, size: int) -> None:
            real["ftruncate"](fd, size)
            if (inode := self._inode(fd)) is not None:
                log(Length(inode, size))

        def allocated(fd: int, offset: int, length: int) -> None:
            real["posix_fallocate"](fd, offset, length)
            if (inode := self._inode(fd)) is not None:
                log(Length(inode, os.fstat(fd).st_size))

        def punched(fd: int, mode: int, offset: int, length: int) -> int:
            failed = punch(fd, mode, offset, length)
            if not failed and (inode := self._inode(fd)) is not None:
                log(Punch(inode, offset, length))
            return failed

        def synced(fd: int) -> None:
            path = Path(f"/proc/self/fd/{fd}").readlink()
            if (inode := self._inode(fd)) is not None:
                log(Barrier(inode, _site()))
            elif path == self.folder or self.folder in path.parents:
                log(Barrier(str(path.relative_to(self.folder)), _site()))

        def unlink(path: Any, **keywords: Any) -> None:  # noqa: ANN401
            real["unlink"](path, **keywords)
            if (name := self._name(path)) is not None:
                log(Names(str(Path(name).parent), ((name, None),)))

        def link(source: Any, target: Any, **keywords: Any) -> None:  # noqa: ANN401
            real["link"](source, target, **keywords)
            if (name := self._name(target)) is not None:
                log(Names(str(Path(name).parent), ((name, self._keep(Path(target))),)))

        def rename(old: Any, new: Any, **keywords: Any) -> None:  # noqa: ANN401
            real["rename"](old, new, **keywords)
            self._rename(old, new)

        changed: dict[str, Callable[..., Any]] = {
            "open": opened,
            "pwrite": pwrite,
            "write": write,
            "copy_file_range": copy_file_range,
            "ftruncate": truncated,
            "posix_fallocate": allocated,
            "fsync": synced,
            "fdatasync": synced,
            "unlink": unlink,
            "remove": unlink,
            "link": link,
            "rename": rename,
            "replace": rename,
        }
        wrappers: list[tuple[Any, str, Callable[..., Any]]] = [(os, name, changed[name]) for name in _WATCHED]
        return [*wrappers, (fcntl, "ioctl", cloned), (blockfile, "_fallocate_function", lambda: punched)]

    # --- what a cut leaves --------------------------------------------------------------------------------------------

    def barriers(self) -> list[str]:
        """Return where the barriers are that the operation came to, in the order of the first of each."""
        return list(dict.fromkeys(event.site for event in self.events if isinstance(event, Barrier)))

    def cuts(self, *, limit: int, seed: int = 1, without: str | None = None) -> Iterator[State]:
        """Yield what a cut at any moment could leave, `limit` states at most between two barriers.

        `without` is the site of barriers that are left out.
        """
        chooser = random.Random(seed)
        names, contents = dict(self.initial.names), dict(self.initial.contents)
        pending: list[Change] = []
        seen: set[int] = set()
        marks, fresh = 0, False
        for at, event in enumerate([*self.events, None]):
            if isinstance(event, Barrier) and event.site == without:
                continue
            if isinstance(event, Mark):
                marks, fresh = marks + 1, True
            elif event is None or isinstance(event, Barrier):
                for kept in _subsets(pending, limit, chooser) if fresh else ():
                    state = _left(names, contents, pending, kept, marks, at)
                    # (the promises count: the same state may be right before one and wrong after it)
                    key = hash((state.names, marks, tuple(hash(state.contents[inode]) for _, inode in state.names)))
                    if key not in seen:
                        seen.add(key)
                        yield state
                fresh = False
                if event is not None:
                    settled = [change for change in pending if _of(change) == event.of]
                    pending = [change for change in pending if _of(change) != event.of]
                    names, contents = _applied(names, contents, settled)
            else:
                pending.append(event)
                fresh = True


_WATCHED: Final = (
    "open",
    "pwrite",
    "write",
    "copy_file_range",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "unlink",
    "remove",
    "link",
    "rename",
    "replace",
)
_LINK: Final = os.link


def _read(fd: int, offset: int, length: int) -> bytes:
    """Read from a file that is perhaps open for writing alone."""
    with Path(f"/proc/self/fd/{fd}").open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _site() -> str:
    """Return what asks for the barrier: the module, the function, and its comment or, without one, the call."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        not frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_code.co_qualname.endswith(_PRIMITIVES)
    ):
        frame = frame.f_back
    where = os.path.relpath(frame.f_code.co_filename, _PACKAGE)
    lines = [line for _, _, line in frame.f_code.co_lines() if line is not None]
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    alike = [line for line in sorted(set(lines)) if linecache.getline(frame.f_code.co_filename, line).strip() == text]
    number = f" [{alike.index(frame.f_lineno) + 1}]" if len(alike) > 1 else ""
    what = text.partition("# barrier: ")[2] or text
    return f"{where.removesuffix('.py')}:{frame.f_code.co_qualname}: {what[:40].strip()}{number}"


def _of(change: Change) -> int | str:
    return change.folder if isinstance(change, Names) else change.inode


class _Kept(NamedTuple):
    """Which of the pending changes reach the disk: whole, or of a write the sectors."""

    changes: dict[int, frozenset[int] | None]
    full_length: bool


def _sectors(change: Change) -> int:
    if not isinstance(change, Write):
        return 1
    return (change.offset + len(change.data) - 1) // SECTOR - change.offset // SECTOR + 1


def _subsets(pending: Sequence[Change], limit: int, chooser: random.Random) -> Iterator[_Kept]:
    """Yield subsets of the changes: every one where they are few, else the telling ones and a seeded sample."""
    count, pieces = len(pending), [(i, j) for i, change in enumerate(pending) for j in range(_sectors(change))]
    yield _Kept({}, False)
    if not count:
        return
    yield _Kept(dict.fromkeys(range(count)), True)
    if 1 << len(pieces) <= limit:
        for mask in itertools.product((False, True), repeat=len(pieces)):
            yield from _by_piece([piece for piece, there in zip(pieces, mask, strict=True) if there])
        return
    if 1 << count <= max(limit // 2, 16):
        masks = itertools.product((False, True), repeat=count)
        chosen = [[i for i in range(count) if mask[i]] for mask in masks]
    else:
        chosen = [part for i in range(count) for part in ([i], [j for j in range(count) if j != i], [*range(i)])]
        chooser.shuffle(chosen)
    whole = [_Kept(dict.fromkeys(part), full) for part in chosen for full in (False, True)]
    yield from whole[: limit // 2]
    for _ in range(limit - min(limit // 2, len(whole))):
        share = chooser.choice((0.1, 0.5, 0.9))
        yield chooser.choice(_by_piece([piece for piece in pieces if chooser.random() < share]))


def _by_piece(pieces: Sequence[tuple[int, int]]) -> list[_Kept]:
    """Return what reaches the disk, with the length of the files and without."""
    kept: dict[int, set[int]] = {}
    for change, sector in pieces:
        kept.setdefault(change, set()).add(sector)
    parts: dict[int, frozenset[int] | None] = {change: frozenset(sectors) for change, sectors in kept.items()}
    return [_Kept(parts, False), _Kept(parts, True)]


def _left(
    names: dict[str, int],
    contents: dict[int, bytes],
    pending: Sequence[Change],
    kept: _Kept,
    marks: int,
    at: int,
) -> State:
    """Return the state with those of the pending changes that reached the disk."""
    there = [_torn(pending[i], sectors) for i, sectors in sorted(kept.changes.items())]
    changes = [change for part in there for change in part]
    if kept.full_length:
        changes = [*_rubbish(contents, pending), *changes]
    after, data = _applied(names, contents, changes)
    return State(tuple(sorted(after.items())), {inode: data.get(inode, b"") for inode in after.values()}, marks, at)


def _torn(change: Change, sectors: frozenset[int] | None) -> list[Change]:
    if sectors is None or not isinstance(change, Write):
        return [change]
    first = change.offset // SECTOR
    parts: list[Change] = []
    for sector in sorted(sectors):
        start = max(change.offset, (first + sector) * SECTOR)
        end = min(change.offset + len(change.data), (first + sector + 1) * SECTOR)
        parts.append(Write(change.inode, start, change.data[start - change.offset : end - change.offset]))
    return parts


def _rubbish(contents: dict[int, bytes], pending: Sequence[Change]) -> list[Change]:
    """Return what the space past the durable end of a file holds where a write to it did not reach the disk."""
    return [
        Write(change.inode, start, MARK * (end - start))
        for change in pending
        if isinstance(change, Write)
        and (end := change.offset + len(change.data))
        > (start := max(change.offset, len(contents.get(change.inode, b""))))
    ]


def _applied(
    names: dict[str, int], contents: dict[int, bytes], changes: Sequence[Change]
) -> tuple[dict[str, int], dict[int, bytes]]:
    """Return names and contents after the changes; a gap that a write leaves is a hole."""
    after, data = dict(names), dict(contents)
    arrays: dict[int, bytearray] = {}
    for change in changes:
        if isinstance(change, Names):
            for name, inode in change.become:
                after.pop(name, None)
                if inode is not None:
                    after[name] = inode
            continue
        content = arrays.setdefault(change.inode, bytearray(data.get(change.inode, b"")))
        match change:
            case Write(_, offset, written):
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(written)] = written
            case Punch(_, offset, length):
                end = min(len(content), offset + length)
                if offset < end:
                    content[offset:end] = bytes(end - offset)
            case Length(_, size):
                del content[size:]
                content.extend(bytes(max(0, size - len(content))))
    data.update({inode: bytes(content) for inode, content in arrays.items()})
    return after, data
