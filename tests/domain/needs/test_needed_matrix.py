"""Every destructive command x every kind of dependent x where it is: it refuses, or everything still reads.

What reads is compared with what was written before. Each command is also run without a dependent, and with the
dependent given up by name: there it must go through, so that a refusal of the matrix is one for the dependent.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from qemu_vmdk_snap import create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.hooks import run as hook
from qemu_vmdk_snap.domain.hooks import unneeded
from qemu_vmdk_snap.domain.revert.run import revert
from qemu_vmdk_snap.domain.xml import list_disks
from qemu_vmdk_snap.errors import MissingFile
from tests.domain.lab import Lab, contents, xml_of

if TYPE_CHECKING:
    import libvirt

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64", "qemu-img", "qemu-io")

GRAIN = 64 * 1024


class Scene(NamedTuple):
    """A domain before a destructive command, and the file that the command changes or removes."""

    domain: libvirt.virDomain
    subject: Path
    words: tuple[str, ...]
    """The command; none: the hook at the start of the domain."""


class Kind(NamedTuple):
    """A kind of dependent."""

    make: Callable[[Path, Path], Path]
    """(subject, folder) -> the dependent, made."""
    image_format: str = "vmdk"
    element: str = "<source file='{dep}'/>"
    """How the other domain names it; {subject} and {dep} are filled in."""
    type: str = "file"
    reads: bool = True
    """Whether it can be read as it is: one that needs a repair first cannot."""
    places: tuple[str, ...] = ("same folder", "other folder", "other domain")


def write(path: Path, text: bytes, grain: int = 0) -> None:
    with open_chain(path, writable=True, trusted_dirs=["/"]) as chain:
        chain.write_at(grain * GRAIN, text.ljust(512, b"."))


def read(path: Path) -> bytes:
    if path.suffix == ".qcow2":
        raw = path.with_suffix(".raw")
        subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", path, raw], check=True)
        data = raw.read_bytes()
        raw.unlink()
        return data
    with open_chain(path, trusted_dirs=["/"], lock=False) as chain:
        return chain.read_at(0, chain.capacity)


# The commands.


def chain_of(lab: Lab, snapshots: int) -> tuple[libvirt.virDomain, list[Path]]:
    """Return a domain with so many snapshots, and its files, the base first; each has data of its own."""
    folder = lab.folder / "own"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    domain = lab.define(lab.disk("a", folder))
    files = [folder / "a.vmdk", *(folder / f"a-{number:06d}.vmdk" for number in range(1, snapshots + 1))]
    for number, path in enumerate(files):
        if number:
            create_snapshot(lab.conn, domain.name(), f"s{number}")
        write(path, f"data of {path.name}".encode(), number)
        write(path, b"a grain that everyone has", 9)
    return domain, files


def merge(lab: Lab) -> Scene:
    domain, files = chain_of(lab, 1)
    return Scene(domain, files[0], ("snapshot", "delete", domain.name(), "s1"))


def merged_away(lab: Lab) -> Scene:
    domain, files = chain_of(lab, 2)
    return Scene(domain, files[1], ("snapshot", "delete", domain.name(), "s1"))


def copy_up(lab: Lab) -> Scene:
    domain, files = chain_of(lab, 2)
    revert(lab.conn, domain.name(), "s2")
    write(files[0].with_name("a-000003.vmdk"), b"data of the branch of today", 3)
    return Scene(domain, files[1], ("snapshot", "delete", domain.name(), "s2"))


def drop(lab: Lab) -> Scene:
    domain, files = chain_of(lab, 2)
    revert(lab.conn, domain.name(), "s1", discard=True)
    return Scene(domain, files[1], ("snapshot", "delete", domain.name(), "s2"))


def prune(lab: Lab) -> Scene:
    domain, files = chain_of(lab, 2)
    return Scene(domain, files[0], ("snapshot", "prune", domain.name(), "--keep-last", "1"))


def discard_top(lab: Lab) -> Scene:
    domain, files = chain_of(lab, 1)
    return Scene(domain, files[1], ("snapshot", "revert", domain.name(), "s1", "--discard"))


def discard_orphan(lab: Lab) -> Scene:
    domain, files = chain_of(lab, 1)
    orphan = files[0].with_name("orphan.vmdk")
    create_overlay(orphan, files[0], durable=False)
    write(orphan, b"data of the orphan", 3)
    return Scene(domain, orphan, ("doctor", domain.name(), "--discard", str(orphan)))


def remove_orphan(lab: Lab) -> Scene:
    domain, files = chain_of(lab, 1)
    orphan = files[0].with_name("orphan.vmdk")
    create_overlay(orphan, files[0], durable=False)
    return Scene(domain, orphan, ("doctor", domain.name(), "--remove"))


def clean_start(lab: Lab) -> Scene:
    domain, files = chain_of(lab, 1)
    return Scene(domain, files[1], ())


DELETES = ("merge", "merged_away", "copy_up", "drop", "prune")
HARMLESS = {name: {"overlay"} for name in DELETES} | {"drop": {"overlay", "disk by a hard link"}}
"""What goes through all the same: an overlay is moved, and a hard link keeps what one name loses."""

COMMANDS = [merge, merged_away, copy_up, drop, prune, discard_top, discard_orphan, remove_orphan, clean_start]


# The dependents.


def overlay(suffix: str) -> Callable[[Path, Path], Path]:
    def make(subject: Path, folder: Path) -> Path:
        path = folder / f"dependent{suffix}"
        create_overlay(path, subject, durable=False)
        write(path, b"data of the dependent", 5)
        return path

    return make


def unfit(subject: Path, folder: Path) -> Path:
    path = overlay(".vmdk")(subject, folder)
    raw = path.read_bytes()
    at = raw.index(b"parentCID=") + len(b"parentCID=")
    path.write_bytes(raw[:at] + b"12345678" + raw[at + 8 :])
    return path


def damaged(subject: Path, folder: Path) -> Path:
    path = overlay(".vmdk")(subject, folder)
    path.write_bytes(path.read_bytes()[:300])
    return path


def qcow2(subject: Path, folder: Path) -> Path:
    path = folder / "dependent.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", subject, "-F", "vmdk", path, "4M"], check=True
    )
    return path


def symlink(subject: Path, folder: Path) -> Path:
    path = folder / "link.vmdk"
    path.symlink_to(subject)
    return path


def linked_folder(subject: Path, folder: Path) -> Path:
    (folder / "linked").symlink_to(subject.parent)
    return folder / "linked" / subject.name


def hard_link(subject: Path, folder: Path) -> Path:
    path = folder / "hard.vmdk"
    path.hardlink_to(subject)
    return path


def itself(subject: Path, folder: Path) -> Path:
    return subject


def missing(subject: Path, folder: Path) -> Path:
    return folder / "unmounted" / "missing.vmdk"


def clone_of_a_clone(subject: Path, folder: Path) -> Path:
    below = folder / "deep"
    below.mkdir()
    first = overlay(".vmdk")(subject, below)
    path = folder / "clone.vmdk"
    create_overlay(path, first, durable=False)
    write(path, b"data of the clone", 6)
    return path


NAMED = ("other domain",)
BACKED = (
    "<source file='{folder}/top.vmdk'/><backingStore type='file'><format type='vmdk'/><source file='{dep}'/>"
    "<backingStore/></backingStore>"
)
KINDS = {
    "overlay": Kind(overlay(".vmdk")),
    "overlay called .new": Kind(overlay(".new"), places=("same folder",)),
    "overlay called .tmp": Kind(overlay(".tmp"), places=("other folder",)),
    "overlay called .snap1": Kind(overlay(".snap1"), places=("other domain",)),
    "overlay of an older content": Kind(unfit, reads=False),
    "overlay with a damaged header": Kind(damaged, reads=False),
    "qcow2 overlay": Kind(qcow2, "qcow2"),
    "disk": Kind(itself, places=NAMED),
    "disk by another spelling": Kind(itself, element="<source file='{spelled}'/>", places=NAMED),
    "disk as a block device": Kind(itself, element="<source dev='{dep}'/>", type="block", places=NAMED),
    "disk by a symbolic link": Kind(symlink, places=NAMED),
    "disk in a linked folder": Kind(linked_folder, places=NAMED),
    "disk by a hard link": Kind(hard_link, places=NAMED),
    "clone of a clone": Kind(clone_of_a_clone, places=NAMED),
    "spelled out below a missing top": Kind(itself, element=BACKED, places=NAMED),
    "missing file": Kind(missing, reads=False, places=NAMED),
    "volume of a pool that cannot be asked": Kind(
        itself, element="<source pool='nowhere' volume='v'/>", type="volume", places=NAMED
    ),
}


def stage(lab: Lab, subject: Path, kind: Kind, place: str) -> Path:
    """Make the dependent, and the other domain where there is one; return the dependent."""
    other = lab.folder / "other"
    other.mkdir()
    dependent = kind.make(subject, subject.parent if place == "same folder" else other)
    element, image_format, kind_of_disk = kind.element, kind.image_format, kind.type
    if place == "other folder":  # it is looked through as some disk of a domain is there
        (other / "data.img").write_bytes(bytes(512))
        element, image_format, kind_of_disk = f"<source file='{other}/data.img'/>", "raw", "file"
    if place != "same folder":
        spelled = f"{dependent.parent}/./{dependent.name}"
        source = element.format(dep=dependent, folder=other, spelled=spelled)
        lab.define(
            extra=f"<disk type='{kind_of_disk}' device='disk'><driver name='qemu' type='{image_format}'/>{source}"
            "<target dev='vda' bus='virtio'/></disk>"
        )
    return dependent


def clear(lab: Lab, dependent: Path, subject: Path) -> None:
    """Take the dependent and the other domain away again."""
    if dependent.parent == subject.parent and dependent != subject:
        dependent.unlink(missing_ok=True)
    if (lab.folder / "other" / "linked").is_symlink():
        (lab.folder / "other" / "linked").unlink()
    shutil.rmtree(lab.folder / "other")


def run(lab: Lab, scene: Scene, *options: str) -> int:
    if scene.words:
        return main([*scene.words, *options, "-c", lab.uri])
    folder = lab.folder / "drivers"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("qemu", "run", "snapshot", "storage"):
        (folder / name).mkdir(parents=True)
    for domain in lab.conn.listAllDomains():
        (folder / "qemu" / f"{domain.name()}.xml").write_text(xml_of(domain))
        for snapshot in domain.listAllSnapshots():
            place = folder / "snapshot" / domain.name()
            place.mkdir(exist_ok=True)
            (place / f"{snapshot.getName()}.xml").write_text(snapshot.getXMLDesc(0))
    policy = lab.folder / "policy.toml"
    policy.write_text("revert-on-start = true\n")
    stdin = io.BytesIO(xml_of(scene.domain).encode())
    return hook.main([str(policy), scene.domain.name(), "prepare", "begin"], stdin, io.StringIO())


@pytest.fixture(autouse=True)
def drivers(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lab.folder / "drivers"
    places = unneeded.Drivers(folder / "qemu", folder / "run", folder / "snapshot", folder / "storage")
    monkeypatch.setattr(unneeded, "drivers", lambda: places)


def images(lab: Lab) -> dict[str, str]:
    return contents(*(folder for name in ("own", "other") if (folder := lab.folder / name).is_dir()))


def own_disk(scene: Scene) -> bytes:
    """Return what the domain's disk shows."""
    (top, *_) = [disk.path for disk in list_disks(xml_of(scene.domain))]
    assert top is not None
    return read(top)


def judge(lab: Lab, scene: Scene, command: Callable[[Lab], Scene], kind: Kind, dependent: Path) -> str | None:
    """Run the command; return what it destroyed, or None."""
    shown = None
    if kind.reads:
        with contextlib.suppress(MissingFile):  # a link to an overlay: nothing is beside it there
            shown = read(dependent)
    was, before = own_disk(scene), images(lab)
    status = run(lab, scene)
    after = images(lab)
    if status not in (0, 1) and after != before:  # 1: the doctor still finds something
        return f"status {status}, and {[name for name in before if after.get(name) != before[name]]} changed"
    if command not in (discard_top, clean_start) and own_disk(scene) != was:
        return "the domain reads something else"
    if shown is not None:
        return None if read(dependent) == shown else f"status {status}, and the dependent reads something else"
    return None if after.get(str(scene.subject)) == before[str(scene.subject)] else f"status {status}: it is destroyed"


CELLS = [(name, place) for name, kind in KINDS.items() for place in kind.places]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_it_refuses_or_everything_still_reads(
    lab: Lab, command: Callable[[Lab], Scene], capsys: pytest.CaptureFixture[str]
) -> None:
    scene = command(lab)
    untouched, destroyed, went_through = images(lab), [], []
    for name, place in CELLS:
        dependent = stage(lab, scene.subject, KINDS[name], place)
        fault = judge(lab, scene, command, KINDS[name], dependent)
        said = capsys.readouterr().err.splitlines()
        if fault is not None:
            destroyed.append(f"{name} in {place}: {fault} ({' '.join(said)})")
        clear(lab, dependent, scene.subject)
        changed = images(lab) != untouched
        if changed:
            went_through.append(name)
        lab.close(*([] if changed else [scene.domain]))
        if changed:
            scene = command(lab)
            untouched = images(lab)
    assert destroyed == []
    if command is not discard_top:  # which goes back in any case, and keeps what something needs
        assert set(went_through) <= HARMLESS.get(command.__name__, set())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_without_a_dependent_the_file_changes_or_goes(lab: Lab, command: Callable[[Lab], Scene]) -> None:
    scene = command(lab)
    before = images(lab)
    run(lab, scene)
    assert images(lab).get(str(scene.subject)) != before[str(scene.subject)]


GIVEN_UP = [cell for cell in CELLS if cell[0] not in ("overlay", "disk by a hard link") and cell[1] != "other folder"]


@pytest.mark.parametrize(("name", "place"), GIVEN_UP, ids=lambda text: text.replace(" ", "-"))
def test_what_is_given_up_by_name_holds_nothing_up(
    lab: Lab, name: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scene, kind = drop(lab), KINDS[name]
    dependent = stage(lab, scene.subject, kind, place)
    assert run(lab, scene) == (67 if name == "overlay of an older content" else 68)
    said = capsys.readouterr().err
    assert ("is still needed: " in said) is not ("--relink-cids" in said)
    given = [Path("nowhere", "v") if kind.type == "volume" else dependent]
    if name == "clone of a clone":
        given.append(dependent.parent / "deep" / "dependent.vmdk")
    options = [word for path in given for word in ("--orphan", str(path))]
    assert run(lab, scene, *options) == 0
    assert not scene.subject.exists()
