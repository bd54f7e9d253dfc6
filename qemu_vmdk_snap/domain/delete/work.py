"""What deleting snapshots does to the files of one disk, as a record keeps it and as people read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qemu_vmdk_snap.domain.journal.record import Intent, Merge
from qemu_vmdk_snap.domain.needs.needed import place_in, same_file

Mode = Literal["merge", "copy", "drop", "keep", "empty", "exchange"]
Change = Callable[[Sequence[Path]], Sequence[Path]]
"""Takes the files of a disk, the top first, and returns those that it has afterwards."""

_LISTS = ("moving", "siblings", "copied", "links", "orphans")


@dataclass(frozen=True, slots=True)
class Work:
    """What is done to one disk of a deleted snapshot."""

    target: str
    mode: Mode
    frozen: str
    """F."""
    child: str | None = None
    """C, where the mode is merge; of an exchange the link whose name the new image takes."""
    moving: tuple[str, ...] = ()
    """merge: the children of C, which move to F; copy: those of F, which move to its parent."""
    parent: str | None = None
    """The image that backs F."""
    size: int = 0
    """About so many bytes are copied."""
    live: bool = False
    """Whether it is done beneath a running guest."""
    orphans: tuple[str, ...] = ()
    """Files that the user gives up: they may lose what they need."""
    siblings: tuple[str, ...] = ()
    """merge: the other children of F, which get what they would lose."""
    copied: tuple[str, ...] = ()
    """merge: the other children of F, which get all of its data first, and move to its parent."""
    copy_size: int = 0
    """About so many bytes go into each of those."""
    links: tuple[str, ...] = ()
    """exchange: the links that become one, the top first; all but the first go."""
    reason: str | None = None
    """keep: why."""
    overlay: str | None = None
    """exchange: the new overlay that freezes what the guest writes to first."""
    served: bool = False
    """copy: whether the server of the running guest's disk does it."""

    @property
    def removed(self) -> Path | None:
        """The image that is deleted; None as well for an exchange, which has a record of its own."""
        gone = {"merge": self.child, "copy": self.frozen, "drop": self.frozen, "empty": self.frozen}
        name = gone.get(self.mode)
        return None if name is None else Path(name)

    @property
    def handled(self) -> tuple[str, ...]:
        """The overlays that are taken care of."""
        return (*self.moving, *self.siblings, *self.copied)

    @property
    def cost(self) -> int:
        """About so many bytes are written in all."""
        if self.mode == "copy":
            return self.size * len(self.moving)
        return self.size * (1 + len(self.siblings)) + self.copy_size * len(self.copied)

    def change(self, files: Sequence[Path]) -> list[Path]:
        """Return the files of a disk (the top first) as they are afterwards, under the names that they have there."""
        changed = list(files)
        if self.mode == "merge" and (above := place_in(files, self.child)) is not None:
            below = place_in(files, self.frozen)
            changed[above] = Path(self.frozen) if below is None else files[below]
            if below is not None:
                del changed[below]
            return changed
        if self.mode == "merge":
            below = place_in(files, self.frozen)
            if below and place_in(map(Path, self.copied), files[below - 1]) is not None:
                del changed[below]
            return changed
        if self.mode == "copy" and len(files) == 1 and same_file(files[0], Path(self.frozen)):
            return [Path(self.moving[0])]  # the overlay that a snapshot names as its own
        gone = place_in(files, self.removed)
        if gone is not None:
            del changed[gone]
        return changed

    def lines(self) -> list[str]:
        """Return every file operation, one line each."""
        if self.mode == "keep":
            return [f"keep {self.frozen}: {self.reason or 'another snapshot, or the domain, has it too'}"]
        if self.mode == "exchange":
            return self._exchange_lines()
        lines = [_moved(image, self.parent, self.copy_size) for image in self.copied]
        lines += [f"merge {self.child} into {self.frozen} ({self.size} bytes)"] if self.mode == "merge" else []
        lines += [f"copy into {image} what it would lose (at most {self.size} bytes)" for image in self.siblings]
        onto = self.frozen if self.mode == "merge" else self.parent
        lines += [_moved(image, onto, self.size if self.mode == "copy" else 0) for image in self.moving]
        holds = " (it holds no data)" if self.mode == "empty" else ""
        return [*lines, f"delete {self.removed}{holds}"]

    def _exchange_lines(self) -> list[str]:
        if not self.links:
            return [f"merge {self.frozen} in the same step"]
        head, *gone = self.links
        base = f", backed by {self.parent}" if self.parent else ", a base"
        return [
            *([f"freeze {head}: the guest continues in the new overlay {self.overlay}"] if self.overlay else []),
            f"merge {', '.join(gone)} into a copy of {head}{base} ({self.size} bytes)",
            f"replace {head} with the copy beneath the running guest",
            *(f"delete {name}" for name in gone),
        ]

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        return {"target": self.target, "mode": self.mode, "bytes": self.cost, "operations": self.lines()}

    def as_record(self) -> dict[str, Any]:
        """Return it with JSON's own types, for a record."""
        return asdict(self) | {name: list(getattr(self, name)) for name in _LISTS}


def _moved(image: str, onto: str | None, size: int) -> str:
    where = f"move {image} onto {onto}" if onto else f"make {image} a base"
    return where + (f" ({size} bytes copied)" if size else "")


@dataclass(frozen=True, slots=True)
class Deleted:
    """One snapshot that is gone (or would be)."""

    name: str
    work: tuple[Work, ...]
    memory: Path | None = None
    """The file with the guest's memory, which goes with it."""

    def as_dict(self) -> dict[str, object]:
        """Return it with JSON's own types."""
        disks = [work.as_dict() for work in self.work]
        memory = {} if self.memory is None else {"memory": str(self.memory)}
        return {"snapshot": self.name, "disks": disks, **memory}


def work_of(intent: Intent) -> tuple[Work, ...]:
    """Return the work in a record, without that of an exchange."""
    return tuple(Work(**one | {name: tuple(one.get(name, ())) for name in _LISTS}) for one in intent.work)


def deleted_by(intent: Intent) -> Deleted:
    """Return what the record of the delete of one snapshot tells of, for a report."""
    return Deleted(intent.snapshot, work_of(intent), next(map(Path, intent.memories), None))


def change_of(work: Sequence[Work], merges: Sequence[Merge] = ()) -> Change:
    """Return what turns the files of a disk into those that it has afterwards."""

    def change(files: Sequence[Path]) -> Sequence[Path]:
        for one in work:
            files = one.change(files)
        for merge in merges:
            files = _merged(files, merge, merge.links[0])
        return files

    return change


def change_before(merges: Sequence[Merge]) -> Change:
    """Return what puts the new images, under the names that they were made with, in the place of the links."""

    def change(files: Sequence[Path]) -> Sequence[Path]:
        for merge in merges:
            files = _merged(files, merge, merge.image)
        return files

    return change


def _merged(files: Sequence[Path], merge: Merge, name: str) -> list[Path]:
    """Return the files with one in the place of the links; a head that keeps its name is called as it was."""
    links = list(map(Path, merge.links))
    found: list[Path] = []
    met = False
    for file in files:
        new = str(file) == merge.image
        at = 0 if new else place_in(links, file)
        if at is None:
            found.append(file)
        elif not met:
            found.append(file if at == 0 and name == merge.links[0] and not new else Path(name))
            met = True
    return found
