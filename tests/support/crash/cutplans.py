"""Every operation that writes, on every kind of image that can be written: what it does, and what a cut must not break.

A plan prepares a folder, runs one operation there, and says what each image, or what takes its place, reads before the
operation and after it.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple
from unittest.mock import patch

from qemu_vmdk_snap import (
    ImageOptions,
    VmdkSnapError,
    apply_delta,
    check_image,
    commit,
    compact,
    confined,
    convert,
    create_image,
    create_overlay,
    link_over,
    make_delta,
    merge_links,
    open_chain,
    rebase,
    recover,
    remove,
    renew_overlay,
    repair,
    resize,
)
from qemu_vmdk_snap.ops.check.repair import take_back
from qemu_vmdk_snap.storage.journal.record import pending_in
from tests.support.crash.powercut import Recorder, State

SIZE: Final = 96 << 10
GRAIN: Final = 4096
GROWN: Final = (2 << 20) + 3 * GRAIN
"""Past what one table of a sparse extent covers (512 grains)."""
_SPLIT: Final = 96
"""Sectors of an extent of a split image: two make the disk."""
_NEVER: Final = 99
Mark = Callable[[], None]


class Lost(AssertionError):
    """A cut lost something."""


class Kind(NamedTuple):
    name: str
    base: ImageOptions
    overlay: ImageOptions


_SPARSE: Final = ImageOptions(grain_size=GRAIN)
_ZEROED: Final = ImageOptions(grain_size=GRAIN, zeroed_grain=True)
_PARTS: Final = ImageOptions(grain_size=GRAIN, subformat="twoGbMaxExtentSparse")
_COWD: Final = ImageOptions(subformat="vmfsSparse")
KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("sparse", _SPARSE, _SPARSE),
        Kind("zeroed", _ZEROED, _ZEROED),
        Kind("split", _PARTS, _PARTS),
        Kind("flat", ImageOptions(subformat="monolithicFlat"), _SPARSE),
        Kind("cowd", _COWD, _COWD),
    )
}


class Promise(NamedTuple):
    """Someone's view of a disk: the first of `places` that is there reads one of `allowed`."""

    places: tuple[str, ...]
    allowed: tuple[bytes, ...]
    may_be_missing: bool = False
    """Of a new image, before it is promised."""
    while_pending: bool = True
    """Whether it can be relied on before `recover`: not a base that is being merged into."""
    sectors: bool = False
    """Each sector reads as it does in one of `allowed`: writes that nobody has flushed."""
    changed_cid: tuple[bytes, int] | None = None
    """What it read, and the CID it had: where it reads something else, the CID is another."""


class Plan(NamedTuple):
    run: Callable[[Mark], object]
    promises: Callable[[int], list[Promise]]
    """Takes how often `mark` was called, once more after the end."""
    checked_from: int = 0
    """How many marks it takes until `check` finds nothing: none but where the image is damaged before."""


Make = Callable[[Path, Kind], Plan]
PLANS: Final[dict[str, Make]] = {}


def _plan(make: Make) -> Make:
    PLANS[make.__name__.removeprefix("_plan_")] = make
    return make


def pattern(seed: int, length: int = SIZE) -> bytes:
    """Return bytes of which every sector tells its seed and number."""
    return b"".join(b"%02d%06d" % (seed, sector) * 64 for sector in range(length // 512))


def base(folder: Path, kind: Kind, name: str = "base.vmdk", seed: int = 1) -> bytes:
    """Make a base with data in its first half, and return what it reads."""
    create_image(folder / name, SIZE, options=kind.base, durable=False)
    return write(folder, name, [(0, pattern(seed, SIZE // 2))])


def overlay(folder: Path, kind: Kind, name: str, parent: str, seed: int, step: int = 2 * GRAIN) -> bytes:
    """Make an overlay with data in some grains, a part of one and zeros, and return what it reads."""
    create_overlay(folder / name, folder / parent, options=kind.overlay, durable=False)
    pieces = [(at, pattern(seed)[at : at + GRAIN]) for at in range(0, SIZE, step)]
    return write(folder, name, [*pieces, (GRAIN + 512, pattern(seed, 1024)), (3 * GRAIN, bytes(GRAIN))])


def write(folder: Path, name: str, pieces: list[tuple[int, bytes]]) -> bytes:
    with open_chain(folder / name, writable=True) as chain:
        for at, data in pieces:
            chain.write_at(at, data)
        return chain.read_at(0, chain.capacity)


def read(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, chain.capacity)


def cid(path: Path) -> int:
    with open_chain(path) as chain:
        return chain.links[0].cid


def _after(before: bytes, pieces: list[tuple[int, bytes]]) -> bytes:
    content = bytearray(before)
    for at, data in pieces:
        content[at : at + len(data)] = data
    return bytes(content)


# --- the operations ---------------------------------------------------------------------------------------------------


@_plan
def _plan_create(folder: Path, kind: Kind) -> Plan:
    return Plan(
        lambda mark: create_image(folder / "new.vmdk", SIZE, options=kind.base),
        lambda marks: [Promise(("new.vmdk",), (bytes(SIZE),), may_be_missing=not marks)],
    )


@_plan
def _plan_overlay(folder: Path, kind: Kind) -> Plan:
    content = base(folder, kind)
    return Plan(
        lambda mark: create_overlay(folder / "new.vmdk", folder / "base.vmdk", options=kind.overlay),
        lambda marks: [
            Promise(("base.vmdk",), (content,)),
            Promise(("new.vmdk",), (content,), may_be_missing=not marks),
        ],
    )


def _writing(folder: Path, name: str, before: bytes, kept: list[Promise], *, checked: bool = True) -> Plan:
    """Write new grains, old grains and parts; flush between; close at the end."""
    first = [(5 * GRAIN, pattern(7, GRAIN)), (GRAIN + 1024, pattern(7, 512)), (17 * GRAIN + 512, pattern(7, 2048))]
    second = [(5 * GRAIN, pattern(8, 512)), (7 * GRAIN, pattern(8, 2 * GRAIN)), (21 * GRAIN, pattern(8, GRAIN))]
    middle, after = _after(before, first), _after(_after(before, first), second)
    old_cid = cid(folder / name)

    def run(mark: Mark) -> None:
        with open_chain(folder / name, writable=True) as chain:
            for at, data in first:
                chain.write_at(at, data)
            chain.flush()
            mark()
            for at, data in second:
                chain.write_at(at, data)

    def promises(marks: int) -> list[Promise]:
        allowed = (before, middle, after)[marks:]
        return [*kept, Promise((name,), allowed, sectors=True, changed_cid=(before, old_cid))]

    return Plan(run, promises, checked_from=0 if checked else _NEVER)


@_plan
def _plan_write_base(folder: Path, kind: Kind) -> Plan:
    return _writing(folder, "base.vmdk", base(folder, kind), [])


@_plan
def _plan_copy_on_write(folder: Path, kind: Kind) -> Plan:
    below = base(folder, kind)
    return _writing(folder, "top.vmdk", overlay(folder, kind, "top.vmdk", "base.vmdk", 2), _kept("base.vmdk", below))


@_plan
def _plan_write_empty_table(folder: Path, kind: Kind) -> Plan:
    """The first write into a part of the disk for which there is no table yet, as other writers leave it."""
    below = base(folder, kind)
    create_overlay(folder / "top.vmdk", folder / "base.vmdk", options=kind.overlay, durable=False)
    for extent in sorted(folder.glob("top*.vmdk")):
        with extent.open("r+b") as file:
            head = file.read(512)
            if head[:4] == b"KDMV":
                for at in struct.unpack_from("<QQ", head, 48):
                    file.seek(at * 512)
                    file.write(bytes(4))
            elif head[:4] == b"COWD":
                file.seek(struct.unpack_from("<I", head, 20)[0] * 512)
                file.write(bytes(4))
    return _writing(folder, "top.vmdk", read(folder / "top.vmdk"), _kept("base.vmdk", below), checked=False)


def _kept(name: str, content: bytes) -> list[Promise]:
    return [Promise((name,), (content,))]


@_plan
def _plan_commit(folder: Path, kind: Kind) -> Plan:
    below, content = base(folder, kind), overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    return Plan(
        lambda mark: commit(folder / "top.vmdk"),
        lambda marks: [
            Promise(("top.vmdk",), (content,)),
            Promise(("base.vmdk",), (below, content)[marks:], while_pending=False),
        ],
    )


@_plan
def _plan_commit_and_write(folder: Path, kind: Kind) -> Plan:
    """A record that comes back after the next write would hold up an image that is in use again."""
    base(folder, kind)
    content = overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    after = _after(content, [(9 * GRAIN, pattern(6, GRAIN))])

    def run(mark: Mark) -> None:
        commit(folder / "top.vmdk")
        mark()
        write(folder, "top.vmdk", [(9 * GRAIN, pattern(6, GRAIN))])

    def promises(marks: int) -> list[Promise]:
        kept = _kept("base.vmdk", content) if marks else []
        return [*kept, Promise(("top.vmdk",), (content, after)[marks > 1 :], sectors=True)]

    return Plan(run, promises)


@_plan
def _plan_commit_delete(folder: Path, kind: Kind) -> Plan:
    base(folder, kind)
    content = overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    return Plan(
        lambda mark: commit(folder / "top.vmdk", delete=True),
        lambda marks: [Promise(("base.vmdk",) if marks else ("top.vmdk", "base.vmdk"), (content,))],
    )


@_plan
def _plan_commit_delete_middle(folder: Path, kind: Kind) -> Plan:
    base(folder, kind)
    middle = overlay(folder, kind, "middle.vmdk", "base.vmdk", 2)
    content = overlay(folder, kind, "top.vmdk", "middle.vmdk", 3, 5 * GRAIN)
    return Plan(
        lambda mark: commit(folder / "middle.vmdk", delete=True),
        lambda marks: [
            Promise(("top.vmdk",), (content,)),
            Promise(("base.vmdk",) if marks else ("middle.vmdk", "base.vmdk"), (middle,)),
        ],
    )


@_plan
def _plan_commit_siblings(folder: Path, kind: Kind) -> Plan:
    base(folder, kind)
    sibling = overlay(folder, kind, "sibling.vmdk", "base.vmdk", 3, 6 * GRAIN)
    content = overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    return Plan(
        lambda mark: commit(folder / "top.vmdk", delete=True, keep_siblings=True),
        lambda marks: [
            Promise(("top.vmdk", "base.vmdk"), (content,)),
            Promise(("sibling.vmdk",), (sibling,)),
        ],
    )


@_plan
def _plan_merge_links(folder: Path, kind: Kind) -> Plan:
    """The image takes the name of the upper link, then the lower one goes: what is above both finds it."""
    base(folder, kind)
    middle = overlay(folder, kind, "middle.vmdk", "base.vmdk", 2)
    content = overlay(folder, kind, "top.vmdk", "middle.vmdk", 3, 5 * GRAIN)

    def run(mark: Mark) -> None:
        merge_links(folder / "middle.vmdk", folder / "base.vmdk", folder / "image.vmdk")
        mark()
        link_over(folder / "image.vmdk", folder / "middle.vmdk")
        for path in (folder / "image.vmdk", *folder.glob("base*.vmdk")):
            path.unlink()

    def promises(marks: int) -> list[Promise]:
        image = Promise(
            ("image.vmdk", "middle.vmdk") if marks else ("image.vmdk",), (middle,), may_be_missing=not marks
        )
        return [Promise(("top.vmdk",), (content,)), Promise(("middle.vmdk",), (middle,)), image]

    return Plan(run, promises)


@_plan
def _plan_rebase(folder: Path, kind: Kind) -> Plan:
    """To a parent whose name is longer, so that the descriptor grows."""
    base(folder, kind)
    other = "a-parent-with-a-name-that-is-longer-by-far-than-that-of-the-old-one.vmdk"
    beside = overlay(folder, kind, other, "base.vmdk", 3, 3 * GRAIN)
    content = overlay(folder, kind, "top.vmdk", "base.vmdk", 2, 6 * GRAIN)
    return Plan(
        lambda mark: rebase(folder / "top.vmdk", folder / other),
        lambda marks: [Promise(("top.vmdk",), (content,)), Promise((other,), (beside,))],
    )


@_plan
def _plan_flatten(folder: Path, kind: Kind) -> Plan:
    below, content = base(folder, kind), overlay(folder, kind, "top.vmdk", "base.vmdk", 2, 6 * GRAIN)
    return Plan(
        lambda mark: rebase(folder / "top.vmdk", None),
        lambda marks: [Promise(("top.vmdk",), (content,)), *_kept("base.vmdk", below)],
    )


@_plan
def _plan_rebase_unsafe(folder: Path, kind: Kind) -> Plan:
    below = base(folder, kind)
    base(folder, kind, "the-same-disk-under-a-longer-name.vmdk", 1)
    content = overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    return Plan(
        lambda mark: rebase(folder / "top.vmdk", folder / "the-same-disk-under-a-longer-name.vmdk", unsafe=True),
        lambda marks: [Promise(("top.vmdk",), (content,)), *_kept("base.vmdk", below)],
    )


@_plan
def _plan_remove(folder: Path, kind: Kind) -> Plan:
    below = base(folder, kind)
    overlay(folder, kind, "middle.vmdk", "base.vmdk", 2)
    content = overlay(folder, kind, "top.vmdk", "middle.vmdk", 3, 5 * GRAIN)
    return Plan(
        lambda mark: remove(folder / "middle.vmdk"),
        lambda marks: [Promise(("top.vmdk",), (content,)), *_kept("base.vmdk", below)],
    )


def _damaged(folder: Path, kind: Kind) -> tuple[str, bytes]:
    """Make an overlay whose extent is not closed, has space that nothing names, and lost its second directory."""
    base(folder, kind)
    content = overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    for extent in sorted(folder.glob("top*.vmdk")):
        with extent.open("r+b") as file:
            head = file.read(4)
            if head == b"KDMV":
                file.seek(72)
                file.write(b"\1")
                file.seek(56)
                file.write(b"\xff" * 8)
                file.seek(0, 2)
                file.write(b"leaked" * 3000)
            elif head == b"COWD":
                file.seek(28)
                (free,) = struct.unpack("<I", file.read(4))
                file.seek(28)
                file.write(struct.pack("<I", free - 2))
    return "top.vmdk", content


@_plan
def _plan_repair(folder: Path, kind: Kind) -> Plan:
    name, content = _damaged(folder, kind)
    return Plan(
        lambda mark: repair(folder / name, resolver=confined()),
        lambda marks: [Promise((name,), (content,))],
        checked_from=1,
    )


@_plan
def _plan_take_back(folder: Path, kind: Kind) -> Plan:
    name, content = _damaged(folder, kind)
    undo = repair(folder / name, resolver=confined()).undo
    assert undo is not None
    return Plan(lambda mark: take_back(undo), lambda marks: [Promise((name,), (content,))], checked_from=_NEVER)


def _grown(content: bytes) -> bytes:
    return content + bytes(GROWN - len(content))


@_plan
def _plan_resize(folder: Path, kind: Kind) -> Plan:
    content = base(folder, kind)
    return Plan(
        lambda mark: resize(folder / "base.vmdk", GROWN),
        lambda marks: [Promise(("base.vmdk",), (content, _grown(content))[marks:])],
    )


@_plan
def _plan_resize_overlay(folder: Path, kind: Kind) -> Plan:
    below, content = base(folder, kind), overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    return Plan(
        lambda mark: resize(folder / "top.vmdk", GROWN),
        lambda marks: [
            Promise(("top.vmdk",), (content, _grown(content))[marks:]),
            *_kept("base.vmdk", below),
        ],
    )


@_plan
def _plan_compact(folder: Path, kind: Kind) -> Plan:
    below = base(folder, kind)
    overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    content = write(folder, "top.vmdk", [(14 * GRAIN, bytes(8 * GRAIN))])
    return Plan(
        lambda mark: compact(folder / "top.vmdk"),
        lambda marks: [Promise(("top.vmdk",), (content,)), *_kept("base.vmdk", below)],
    )


@_plan
def _plan_apply(folder: Path, kind: Kind) -> Plan:
    below, content = base(folder, kind), overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    with open_chain(folder / "top.vmdk") as chain:
        make_delta(chain, 1, folder / "delta.vmdk", stream=False, durable=False)
    for path in folder.glob("top*"):
        path.unlink()
    return Plan(
        lambda mark: apply_delta(folder / "delta.vmdk", folder / "base.vmdk"),
        lambda marks: [Promise(("base.vmdk",), (below, content)[marks:], while_pending=False)],
    )


@_plan
def _plan_renew(folder: Path, kind: Kind) -> Plan:
    below, content = base(folder, kind), overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    old = cid(folder / "top.vmdk")
    return Plan(
        lambda mark: renew_overlay(folder / "top.vmdk"),
        lambda marks: [
            *_kept("base.vmdk", below),
            Promise(("top.vmdk",), (content, below)[marks:], while_pending=False, changed_cid=(content, old)),
        ],
    )


@_plan
def _plan_convert(folder: Path, kind: Kind) -> Plan:
    content, below = _two(folder, kind)

    def run(mark: Mark) -> None:
        with open_chain(folder / "top.vmdk") as chain:
            convert(chain, folder / "new.vmdk", options=kind.base)

    return Plan(run, lambda marks: [*below, Promise(("new.vmdk",), (content,), may_be_missing=not marks)])


@_plan
def _plan_convert_onto(folder: Path, kind: Kind) -> Plan:
    content, below = _two(folder, kind)

    def run(mark: Mark) -> None:
        with open_chain(folder / "top.vmdk") as chain:
            convert(chain, folder / "new.vmdk", options=kind.overlay, backing=folder / "base.vmdk")

    return Plan(run, lambda marks: [*below, Promise(("new.vmdk",), (content,), may_be_missing=not marks)])


@_plan
def _plan_convert_onto_same(folder: Path, kind: Kind) -> Plan:
    """The overlay takes nothing, and so nothing but its own making flushes it."""
    content = base(folder, kind)

    def run(mark: Mark) -> None:
        with open_chain(folder / "base.vmdk") as chain:
            convert(chain, folder / "new.vmdk", options=kind.overlay, backing=folder / "base.vmdk")

    return Plan(run, lambda marks: [Promise(("new.vmdk",), (content,), may_be_missing=not marks)])


@_plan
def _plan_delta(folder: Path, kind: Kind) -> Plan:
    content, below = _two(folder, kind)

    def run(mark: Mark) -> None:
        with open_chain(folder / "top.vmdk") as chain:
            make_delta(chain, 1, folder / "new.vmdk", stream=kind.name != "sparse")

    return Plan(run, lambda marks: [*below, Promise(("new.vmdk",), (content,), may_be_missing=not marks)])


def _two(folder: Path, kind: Kind) -> tuple[bytes, list[Promise]]:
    below, content = base(folder, kind), overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    return content, [*_kept("base.vmdk", below), *_kept("top.vmdk", content)]


RECOVERED: Final = (
    "commit",
    "commit_delete_middle",
    "rebase",
    "flatten",
    "rebase_unsafe",
    "remove",
    "repair",
    "take_back",
    "resize",
    "apply",
    "renew",
)
"""Plans that leave a record when the power is cut: `recover` has something to do."""


# --- a plan, run and judged -------------------------------------------------------------------------------------------


class Cutter:
    """One plan on one kind: runs it once, recorded, and judges the states that a cut can leave."""

    def __init__(self, folder: Path, plan: str, kind: str) -> None:
        self.folder = folder / "disk"
        self.folder.mkdir()
        self.recorder = Recorder(self.folder, folder / "kept")
        self._split = patch("qemu_vmdk_snap.ops.make.layout.SPLIT_SECTORS", _SPLIT)
        with self._split, self.recorder.still():
            self.plan = PLANS[plan](self.folder, KINDS[kind])
        self._run(lambda: self.plan.run(self.recorder.mark))

    def _run(self, work: Callable[[], object]) -> None:
        with self._split, self.recorder.watching():
            work()
            self.recorder.mark()

    def states(self, *, limit: int, without: str | None = None, seed: int = 1) -> Iterator[State]:
        return self.recorder.cuts(limit=limit, without=without, seed=seed)

    def event(self, state: State) -> str:
        """Return what was about to happen when the power was cut."""
        events = self.recorder.events
        return str(events[state.at])[:200] if state.at < len(events) else "the end"

    def is_pending(self, state: State) -> bool:
        """Return whether the state has an operation that `recover` has to deal with."""
        self.recorder.put(state)
        return bool(pending_in(self.folder))

    def recovering(self, state: State) -> Cutter:
        """Record `recover` of a state: a cutter of its own, which shares the folder with this one."""
        self.recorder.put(state)
        cutter = copy.copy(self)
        cutter.recorder = self.recorder.again()
        promises = self.plan.promises
        checked = 0 if state.marks >= self.plan.checked_from else _NEVER
        cutter.plan = self.plan._replace(promises=lambda _: promises(state.marks), checked_from=checked)
        cutter._run(lambda: recover(self.folder))
        return cutter

    def judge(self, state: State) -> None:
        """Remount after the cut; raise Lost where a promise does not hold."""
        self.recorder.put(state)
        promises = self.plan.promises(state.marks)
        with self.recorder.still():
            pending = bool(pending_in(self.folder))
            for promise in promises:
                if promise.while_pending or not pending:
                    self._hold(promise, state, pending=pending)
            try:
                recover(self.folder)
            except (VmdkSnapError, OSError) as error:
                raise Lost(f"recover fails: {error!r}") from error
            if left := [path.name for path in self.folder.iterdir() if path.name.startswith(".")]:
                raise Lost(f"recover leaves {left}")
            for promise in promises:
                self._hold(promise, state, pending=False)

    def _hold(self, promise: Promise, state: State, *, pending: bool) -> None:
        place = next((path for name in promise.places if (path := self.folder / name).exists()), None)
        if place is None:
            if promise.may_be_missing:
                return
            raise Lost(f"{promise.places} is gone")
        try:
            content = read(place)
            changed = promise.changed_cid is not None and content != promise.changed_cid[0]
            same_cid = promise.changed_cid is not None and cid(place) == promise.changed_cid[1]
        except (VmdkSnapError, OSError) as error:
            if pending and not isinstance(error, OSError):
                return  # nobody reads anything wrong, and `recover` is said to be needed
            raise Lost(f"{place.name} cannot be read: {error!r}") from error
        if not (_mixed(content, promise.allowed) if promise.sectors else content in promise.allowed):
            raise Lost(f"{place.name} reads something else: {_difference(content, promise.allowed[-1])}")
        if changed and same_cid and not pending:
            raise Lost(f"{place.name} reads something else under the old CID")
        if state.marks >= self.plan.checked_from and not pending:
            report = check_image(place, resolver=confined())
            if report.corruptions:
                raise Lost(f"{place.name} is damaged: {[str(finding) for finding in report.findings][:3]}")


def _mixed(content: bytes, allowed: tuple[bytes, ...]) -> bool:
    return len(content) == len(allowed[0]) and all(
        any(content[at : at + 512] == one[at : at + 512] for one in allowed) for at in range(0, len(content), 512)
    )


def _difference(content: bytes, wanted: bytes) -> str:
    if len(content) != len(wanted):
        return f"{len(content)} bytes, not {len(wanted)}"
    at = next((at for at in range(0, len(content), 512) if content[at : at + 512] != wanted[at : at + 512]), -1)
    return f"sector {at // 512}: {content[at : at + 8]!r}, not {wanted[at : at + 8]!r}"


__all__ = ["KINDS", "PLANS", "RECOVERED", "Cutter", "Lost"]
