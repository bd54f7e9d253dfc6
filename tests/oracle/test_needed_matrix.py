"""Does every command that destroys something leave alone whoever needs it? Each command, each kind of dependent.

The chain is `base <- mid <- top`; the dependent is backed by one of them, beside it or in a folder that is allowed. For
each cell: the command refuses with an error of ours, and every file has the bytes that it had; or it ends, and the
dependent reads what is known to have been written to it, by our engine and by qemu-img where QEMU can read its kind.
What could not be read before without a repair is repaired the same way afterwards.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from qemu_vmdk_snap import VmdkSnapError, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.ops.check.repair import repair
from qemu_vmdk_snap.ops.edit.apply import apply_delta
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.compact import compact
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.ops.edit.remove import remove
from qemu_vmdk_snap.ops.edit.renew import renew_overlay
from qemu_vmdk_snap.ops.edit.resize import resize
from tests.support.qemu import qemu_content, qemu_img

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

GRAIN: Final = 65536
SIZE: Final = 8 * GRAIN
EXTRA: Final = 4096
"""Bytes of an extent that a descriptor adds, of a file that is none of its own."""

DELTA: Final = b"delta" * 1000
NAMES: Final = ("base", "mid", "top")


@dataclass
class Lab:
    """The images and what each of them reads; `root` may be copied with all that is in it."""

    root: Path
    model: dict[str, bytes] = field(default_factory=dict)

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def away(self) -> Path:
        """A folder that no command looks into."""
        return self.root / "away"

    def path(self, name: str) -> Path:
        return self.images / f"{name}.vmdk"

    def copied(self, root: Path) -> Lab:
        shutil.copytree(self.root, root, symlinks=True)
        _link_again(self.root, root)
        return Lab(root, dict(self.model))


def _link_again(old: Path, new: Path) -> None:
    """Make files one again in a copied tree that were one in the old."""
    seen: dict[int, Path] = {}
    for path in sorted(old.rglob("*")):
        facts = path.lstat()
        if facts.st_nlink > 1 and path.is_file() and not path.is_symlink():
            first = seen.setdefault(facts.st_ino, path)
            if first is not path:
                (new / path.relative_to(old)).unlink()
                (new / path.relative_to(old)).hardlink_to(new / first.relative_to(old))


@dataclass(frozen=True)
class Command:
    """`run` destroys or changes `victims`; afterwards the images of the chain read as `after` says."""

    name: str
    victims: tuple[str, ...]
    run: Callable[[Lab, str, Path], object]
    """(lab, victim, allowed folder)"""
    after: Callable[[dict[str, bytes], str], dict[str, bytes | None]]
    """What the images of the chain read then; None is one that is gone."""
    links: int = 2


def _applied(model: dict[str, bytes], victim: str) -> dict[str, bytes | None]:
    old = model[victim]
    return {victim: old[: 6 * GRAIN] + DELTA + old[6 * GRAIN + len(DELTA) :]}


def _same(model: dict[str, bytes], victim: str) -> dict[str, bytes | None]:
    return {}


def _with_leaks(lab: Lab, victim: str, allowed: Path) -> object:
    with lab.path(victim).open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"leaked" * 30000)
    return repair(lab.path(victim), resolver=confined([allowed]))


COMMANDS: Final = [
    Command(
        "remove",
        ("base", "mid"),
        lambda lab, victim, other: remove(lab.path(victim), resolver=confined([other])),
        lambda model, victim: {victim: None},
    ),
    Command(
        "commit",
        ("base", "mid"),
        lambda lab, _, other: commit(lab.path("mid"), resolver=confined([other])),
        lambda model, _: {"base": model["mid"]},
    ),
    Command(
        "commit-d",
        ("base", "mid"),
        lambda lab, _, other: commit(lab.path("mid"), delete=True, resolver=confined([other])),
        lambda model, _: {"base": model["mid"], "mid": None},
    ),
    Command(
        "commit-keep",
        ("base", "mid"),
        lambda lab, _, other: commit(lab.path("mid"), keep_siblings=True, resolver=confined([other])),
        lambda model, _: {"base": model["mid"]},
    ),
    Command(
        "commit-keep-d",
        ("base",),
        lambda lab, _, other: commit(lab.path("mid"), keep_siblings=True, delete=True, resolver=confined([other])),
        lambda model, _: {"base": model["mid"], "mid": None},
    ),
    Command(
        "commit-two",
        NAMES,
        lambda lab, _, other: commit(lab.path("top"), base=lab.path("base"), resolver=confined([other])),
        lambda model, _: {"base": model["top"]},
        3,
    ),
    Command(
        "commit-two-d",
        NAMES,
        lambda lab, _, other: commit(lab.path("top"), base=lab.path("base"), delete=True, resolver=confined([other])),
        lambda model, _: {"base": model["top"], "mid": None, "top": None},
        3,
    ),
    Command(
        "resize",
        ("mid",),
        lambda lab, victim, other: resize(lab.path(victim), SIZE + GRAIN, resolver=confined([other])),
        lambda model, victim: {victim: model[victim] + bytes(SIZE + GRAIN - len(model[victim]))},
    ),
    Command(
        "resize-alone",
        ("base",),
        lambda lab, victim, other: resize(lab.path(victim), SIZE + GRAIN, resolver=confined([other])),
        lambda model, victim: {victim: model[victim] + bytes(SIZE + GRAIN - len(model[victim]))},
        1,
    ),
    Command(
        "apply",
        ("mid",),
        lambda lab, victim, other: apply_delta(lab.away / "delta.vmdk", lab.path(victim), resolver=confined([other])),
        _applied,
    ),
    Command(
        "apply-alone",
        ("base",),
        lambda lab, victim, other: apply_delta(lab.away / "delta.vmdk", lab.path(victim), resolver=confined([other])),
        _applied,
        1,
    ),
    Command(
        "compact",
        ("base", "mid"),
        lambda lab, victim, other: compact(lab.path(victim), resolver=confined([other])),
        _same,
    ),
    Command(
        "renew",
        ("mid",),
        lambda lab, victim, other: renew_overlay(lab.path(victim), trusted_dirs=[other]),
        lambda model, victim: {victim: model["base"]},
    ),
    Command(
        "flatten",
        ("mid",),
        lambda lab, victim, other: rebase(lab.path(victim), None, resolver=confined([other])),
        _same,
    ),
    Command("check-r", ("base", "mid"), _with_leaks, _same),
]


def stored(name: str, size: int) -> dict[int, bytes]:
    """Return what is written to an image of the chain, or to the dependent: by offset."""
    chance = random.Random(name)
    places = {
        "base": range(0, 5 * GRAIN, GRAIN),
        "mid": (GRAIN + 512, 4 * GRAIN, 6 * GRAIN + 1024),
        "top": (2 * GRAIN + 1024,),
        "between": (3 * GRAIN + 7 * 512,),
        "dependent": (3 * GRAIN + 512, 5 * GRAIN),
    }
    found = {at: chance.randbytes(GRAIN if name == "base" else GRAIN // 2) for at in places[name]}
    if size > SIZE and name in ("base", "mid"):
        found[SIZE] = chance.randbytes(512)
    return found


def fill(lab: Lab, name: str, path: Path, below: bytes) -> None:
    model = bytearray(below)
    with open_chain(path, writable=True, trusted_dirs=[lab.images]) as chain:
        for at, data in stored(name, len(below)).items():
            chain.write_at(at, data)
            model[at : at + len(data)] = data
    lab.model[name] = bytes(model)


class Kind:
    """A kind of dependent. `make` puts it into `folder`; `read` returns what it reads, once repaired."""

    split = False
    """Whether the images of the chain are descriptors in files of their own."""
    qemu = True
    victims: tuple[str, ...] = NAMES
    suffix = ".vmdk"

    def prepare(self, lab: Lab, victim: str) -> None:
        """Change the base before anything is backed by it."""

    def path(self, lab: Lab, folder: Path) -> Path:
        return folder / f"dependent{self.suffix}"

    def make(self, lab: Lab, folder: Path, victim: str) -> None:
        path = self.path(lab, folder)
        create_overlay(path, lab.path(victim), durable=False)
        fill(lab, "dependent", path, lab.model[victim])
        self.spoil(lab, path, victim)

    def spoil(self, lab: Lab, path: Path, victim: str) -> None:
        """Damage the overlay."""

    def restore(self, lab: Lab, path: Path, victim: str) -> None:
        """Do to the dependent what made it readable before the command."""

    def read(self, lab: Lab, folder: Path, victim: str) -> Iterator[bytes]:
        path = self.path(lab, folder)
        self.restore(lab, path, victim)
        with open_chain(path, trusted_dirs=[lab.images, folder]) as chain:
            yield chain.read_at(0, chain.capacity)
        if self.qemu:
            yield qemu_content(path, lab.root)

    def while_running(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        """Make the dependent hard to read while the command runs."""


class Fits(Kind):
    pass


class Stale(Kind):
    """Its CID does not fit: repaired by --relink-cids while the parent is there."""

    def spoil(self, lab: Lab, path: Path, victim: str) -> None:
        set_value(path, "parentCID", "12345678")

    def restore(self, lab: Lab, path: Path, victim: str) -> None:
        repair(path, resolver=confined([lab.images, path.parent]), relink_cids=True)


class NoParentCid(Kind):
    """parentCID=ffffffff, and a hint: QEMU follows the hint."""

    def spoil(self, lab: Lab, path: Path, victim: str) -> None:
        set_value(path, "parentCID", "ffffffff")

    def restore(self, lab: Lab, path: Path, victim: str) -> None:
        with open_chain(lab.path(victim)) as chain:
            set_value(path, "parentCID", f"{chain.links[0].cid:08x}")


def _named(name: str) -> type[Kind]:
    class Named(Kind):
        suffix = name

    return Named


class Damaged(Kind):
    """check -r repairs it."""

    def spoil(self, lab: Lab, path: Path, victim: str) -> None:
        with path.open("r+b") as file:
            file.seek(73)
            file.write(b"\r\n\r\n")

    def restore(self, lab: Lab, path: Path, victim: str) -> None:
        repair(path, resolver=confined([lab.images, path.parent]))


class Lost(Kind):
    """Cut short, and put back afterwards: from a copy of the rest, say."""

    cut = 1000

    def spoil(self, lab: Lab, path: Path, victim: str) -> None:
        (lab.away / "whole").write_bytes(path.read_bytes())
        os.truncate(path, self.cut)

    def restore(self, lab: Lab, path: Path, victim: str) -> None:
        path.write_bytes((lab.away / "whole").read_bytes())


class LostEarly(Lost):
    cut = 100


class Nameless(Kind):
    """It does not name its parent, as VirtualBox writes overlays."""

    def spoil(self, lab: Lab, path: Path, victim: str) -> None:
        swap(path, b"parentFileNameHint", b"parentFileNameNone")

    def restore(self, lab: Lab, path: Path, victim: str) -> None:
        swap(path, b"parentFileNameNone", b"parentFileNameHint")


class Symlinked(Kind):
    """A link to an overlay elsewhere, whose own hint leads by way of a link too."""

    def make(self, lab: Lab, folder: Path, victim: str) -> None:
        (lab.root / "linked").symlink_to("images")
        real = lab.away / "real.vmdk"
        create_overlay(real, lab.path(victim), hint=f"../linked/{victim}.vmdk", durable=False)
        fill(lab, "dependent", real, lab.model[victim])
        self.path(lab, folder).symlink_to(os.path.relpath(real, folder))

    def read(self, lab: Lab, folder: Path, victim: str) -> Iterator[bytes]:
        with open_chain(lab.away / "real.vmdk", trusted_dirs=[lab.images]) as chain:
            yield chain.read_at(0, chain.capacity)
        yield qemu_content(lab.away / "real.vmdk", lab.root)


class MissingMiddle(Kind):
    """What lies between it and the image is not there today."""

    def make(self, lab: Lab, folder: Path, victim: str) -> None:
        between = folder / "between.vmdk"
        create_overlay(between, lab.path(victim), durable=False)
        fill(lab, "between", between, lab.model[victim])
        create_overlay(self.path(lab, folder), between, durable=False)
        fill(lab, "dependent", self.path(lab, folder), lab.model.pop("between"))
        between.rename(lab.away / "between.vmdk")

    def restore(self, lab: Lab, path: Path, victim: str) -> None:
        (lab.away / "between.vmdk").rename(path.with_name("between.vmdk"))


class Qcow2(Kind):
    """What libvirt and linked clones make."""

    suffix = ".qcow2"

    def backing(self, lab: Lab, folder: Path, victim: str) -> str:
        return os.path.relpath(lab.path(victim), folder)

    def make(self, lab: Lab, folder: Path, victim: str) -> None:
        path = self.path(lab, folder)
        model = self.below(lab, folder, victim)
        name = self.backing(lab, folder, victim)
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "vmdk", path, str(len(model)))
        words = []
        changed = bytearray(model)
        for number, at in enumerate(stored("dependent", len(model))):
            words += [f"write -q -P {number + 1} {at} {GRAIN // 2}"]
            changed[at : at + GRAIN // 2] = bytes([number + 1]) * (GRAIN // 2)
        qemu_write(path, words)
        lab.model["dependent"] = bytes(changed)

    def below(self, lab: Lab, folder: Path, victim: str) -> bytes:
        return lab.model[victim]

    def read(self, lab: Lab, folder: Path, victim: str) -> Iterator[bytes]:
        raw = lab.root / "raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", self.path(lab, folder), raw)
        yield raw.read_bytes()


class Qcow2Json(Qcow2):
    def backing(self, lab: Lab, folder: Path, victim: str) -> str:
        # QEMU takes a name in json: for one of its own working folder, so it is absolute, and written when it is known.
        return f'json:{{"driver":"vmdk","file":{{"driver":"file","filename":"{lab.path(victim)}"}}}}'


class Qcow2Above(Qcow2):
    """Backed by an overlay that is backed by the image."""

    def backing(self, lab: Lab, folder: Path, victim: str) -> str:
        return "between.vmdk"

    def below(self, lab: Lab, folder: Path, victim: str) -> bytes:
        between = folder / "between.vmdk"
        create_overlay(between, lab.path(victim), durable=False)
        fill(lab, "between", between, lab.model[victim])
        return lab.model.pop("between")


class SharedExtents(Kind):
    """A copy of the descriptor, which names the same extents."""

    split = True

    def make(self, lab: Lab, folder: Path, victim: str) -> None:
        text = lab.path(victim).read_text()
        way = os.path.relpath(lab.images, folder)
        if way != ".":
            text = re.sub(r'(SPARSE ")', rf"\1{way}/", text)
            text = re.sub(r'(parentFileNameHint=")', rf"\1{way}/", text)
        self.path(lab, folder).write_text(text)
        lab.model["dependent"] = lab.model[victim]


class HardLink(Kind):
    """Another name of the very file; a hint holds in the folder that it was written for."""

    victims = ("base", "mid", "top")

    def make(self, lab: Lab, folder: Path, victim: str) -> None:
        self.path(lab, folder).hardlink_to(lab.path(victim))
        lab.model["dependent"] = lab.model[victim]

    def read(self, lab: Lab, folder: Path, victim: str) -> Iterator[bytes]:
        path = lab.images / "read-here.vmdk"
        path.hardlink_to(self.path(lab, folder))
        with open_chain(path) as chain:
            yield chain.read_at(0, chain.capacity)
        yield qemu_content(path, lab.root)


class Foreign(Kind):
    """The image claims a file that is none of its own: the file is what must stay."""

    split = True
    victims = ("base",)
    name = "id_rsa"

    def prepare(self, lab: Lab, victim: str) -> None:
        lab.path("base").write_text(
            lab.path("base").read_text().replace("# The Disk", f'RW {EXTRA // 512} FLAT "{self.name}" 0\n# The Disk')
        )
        (lab.images / self.name).write_bytes(self.content(lab))
        lab.model["base"] += self.content(lab)[:EXTRA]

    def content(self, lab: Lab) -> bytes:
        return random.Random(1).randbytes(5000)

    def make(self, lab: Lab, folder: Path, victim: str) -> None:
        lab.model["dependent"] = (lab.images / self.name).read_bytes()

    def read(self, lab: Lab, folder: Path, victim: str) -> Iterator[bytes]:
        yield (lab.images / self.name).read_bytes()


class ForeignImage(Foreign):
    """... and that is an image."""

    name = "other.vmdk"

    def content(self, lab: Lab) -> bytes:
        other = lab.away / "other.vmdk"
        if not other.exists():
            create_image(other, SIZE, durable=False)
        return other.read_bytes()


def _failing(call: str, code: int) -> type[Kind]:
    class Failing(Kind):
        """It gives an error the first time that it is touched."""

        def while_running(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
            real, left = getattr(os, call), [1]

            def failing(first: object, *rest: object, **words: object) -> object:
                name = os.fspath(first) if call == "open" else Path(f"/proc/self/fd/{first}").readlink()  # type: ignore[call-overload]
                if str(name) == str(path) and left[0]:
                    left[0] -= 1
                    raise OSError(code, os.strerror(code), str(path))
                return real(first, *rest, **words)

            monkeypatch.setattr(os, call, failing)

    return Failing


KINDS: Final[dict[str, type[Kind]]] = {
    "fits": Fits,
    "stale": Stale,
    "named-new": _named(".new"),
    "named-tmp": _named(".tmp"),
    "named-snap1": _named(".snap1"),
    "cid-ffffffff": NoParentCid,
    "damaged": Damaged,
    "cut": Lost,
    "cut-early": LostEarly,
    "symlinked": Symlinked,
    "nameless": Nameless,
    "missing-middle": MissingMiddle,
    "qcow2": Qcow2,
    "qcow2-json": Qcow2Json,
    "qcow2-above": Qcow2Above,
    "shared-extents": SharedExtents,
    "hard-link": HardLink,
    "foreign": Foreign,
    "foreign-image": ForeignImage,
    "EACCES": _failing("open", errno.EACCES),
    "EMFILE": _failing("open", errno.EMFILE),
    "EIO": _failing("pread", errno.EIO),
}


def set_value(path: Path, key: str, value: str) -> None:
    raw = path.read_bytes()
    found = re.search(rb"\n%s=([0-9a-f]{8})" % key.encode(), raw)
    assert found is not None
    path.write_bytes(raw[: found.start(1)] + value.encode() + raw[found.end(1) :])


def swap(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


def qemu_write(path: Path, commands: list[str]) -> None:
    import subprocess

    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words, path], check=True, capture_output=True, text=True)
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


def build(root: Path, kind: Kind, victim: str, links: int, place: str) -> Lab:
    lab = Lab(root)
    for folder in (lab.images, lab.away, root / "other"):
        folder.mkdir(parents=True)
    options = "twoGbMaxExtentSparse" if kind.split else None
    create_image(lab.path("base"), SIZE, kind=options, durable=False)
    fill(lab, "base", lab.path("base"), bytes(SIZE))
    kind.prepare(lab, victim)
    for below, name in itertools.pairwise(NAMES[:links]):
        create_overlay(lab.path(name), lab.path(below), kind=options, durable=False)
        fill(lab, name, lab.path(name), lab.model[below])
    kind.make(lab, root / place, victim)
    return lab


def put_delta(lab: Lab, victim: str) -> None:
    """Make what is applied, where no command looks for dependents."""
    delta = lab.away / "delta.vmdk"
    create_overlay(delta, lab.path(victim), durable=False)
    with open_chain(delta, writable=True, trusted_dirs=[lab.images]) as chain:
        chain.write_at(6 * GRAIN, DELTA)


def everything(root: Path) -> dict[str, bytes | str]:
    """Return all that is below `root`, by name."""
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def cells() -> list[tuple[Command, str, str, str]]:
    found = []
    for command, (name, kind) in itertools.product(COMMANDS, KINDS.items()):
        for victim in command.victims:
            if victim in kind.victims and not (kind.split and command.run is _with_leaks):  # nothing leaks there
                places = ("images",) if issubclass(kind, Foreign) else ("images", "other")
                found += [(command, victim, name, place) for place in places]
    return found


CELLS: Final = cells()


@pytest.fixture(autouse=True)
def not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: nothing is cut off here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, int, str], Lab]:
    """Return what gives a lab, made once for all commands."""
    made: dict[tuple[str, str, int, str], Lab] = {}

    def get(name: str, victim: str, links: int, place: str) -> Lab:
        key = name, victim, links, place
        if key not in made:
            made[key] = build(tmp_path_factory.mktemp("built") / "lab", KINDS[name](), victim, links, place)
        return made[key]

    return get


@pytest.mark.parametrize(
    ("command", "victim", "name", "place"),
    CELLS,
    ids=[f"{command.name}-{victim}-{name}-{place}" for command, victim, name, place in CELLS],
)
def test_who_needs_it_keeps_it(
    command: Command,
    victim: str,
    name: str,
    place: str,
    built: Callable[[str, str, int, str], Lab],
    tmp_path: Path,
) -> None:
    kind = KINDS[name]()
    lab = built(name, victim, command.links, place)
    if kind.__class__ is not Qcow2Json:
        lab = lab.copied(tmp_path / "lab")
    else:  # its name for its backing file is absolute
        lab = build(tmp_path / "lab", kind, victim, command.links, place)
    folder = lab.root / place
    if command.name.startswith("apply"):
        put_delta(lab, victim)
    before = everything(lab.root)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            kind.while_running(monkeypatch, kind.path(lab, folder))
            command.run(lab, victim, lab.root / "other")
    except VmdkSnapError:
        assert everything(lab.root) == before, "refused, and changed something all the same"
        return
    chain_reads(lab, command.after(lab.model, victim))
    for content in kind.read(lab, folder, victim):
        assert content == lab.model["dependent"], "the dependent reads something else"


def chain_reads(lab: Lab, after: dict[str, bytes | None]) -> None:
    for name in NAMES:
        expected = after.get(name, lab.model.get(name))
        if expected is None:
            assert not lab.path(name).exists()
            continue
        with open_chain(lab.path(name)) as chain:
            assert chain.read_at(0, chain.capacity) == expected, f"{name} reads something else"
