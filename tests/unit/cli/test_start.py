"""Do short commands start without what they have no use for?

How long a start takes depends on the machine; what is imported does not. `python -m bench start` has the times.
"""

from __future__ import annotations

import ast
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, create_overlay, open_chain
from qemu_vmdk_snap.light import NamedTuple, Protocol, dataclass, field, replace, runtime_checkable

HEAVY = {"numpy", "libvirt", "logging", "asyncio", "dataclasses", "inspect", "ast", "json", "uuid", "typing"}
HEAVY |= {"argparse", "gettext", "locale", "threading", "tempfile", "subprocess", "shutil", "deflate"}

COUNTED = """
import sys
sys.path[:0] = {path!r}
from qemu_vmdk_snap.cli.main import main
status = main({words!r})
print()
print(status, sorted(sys.modules))
"""
"""Run without `site`: what its files import on this machine would count as there already."""


@pytest.fixture
def top(tmp_path: Path) -> Path:
    create_image(tmp_path / "base.vmdk", 1 << 30, durable=False)
    with open_chain(tmp_path / "base.vmdk", writable=True) as chain:
        chain.write_at(1 << 20, b"x" * 200_000)
    create_overlay(tmp_path / "top.vmdk", tmp_path / "base.vmdk", durable=False)
    return tmp_path / "top.vmdk"


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["--help"], 82),
        (["image", "create", "-q", "-b", "base.vmdk", "NEW"], 134),
        (["image", "info", "TOP"], 132),
        (["image", "check", "TOP"], 127),
        (["image", "map", "TOP"], 130),
        (["image", "measure", "-O", "vmdk", "TOP"], 148),
        (["image", "measure", "-O", "raw", "--size", "1G"], 143),
    ],
)
def test_little_is_imported(top: Path, words: list[str], most: int) -> None:
    there = {"TOP": str(top), "NEW": str(top.with_name("new.vmdk"))}
    code = COUNTED.format(path=sys.path, words=[there.get(word, word) for word in words])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    status, modules = done.stdout.splitlines()[-1].split(" ", 1)
    assert status == "0"
    found = ast.literal_eval(modules)
    assert not HEAVY & set(found)
    assert len(found) <= most, found


def test_a_light_record_is_as_one_of_dataclasses() -> None:
    @dataclass(frozen=True, slots=True)
    class Point:
        x: int
        y: int = 3
        more: list[int] = field(default_factory=list)

    @dataclass
    class Counter:
        count: int
        seen: list[int] = field(default_factory=list, compare=False, repr=False)

        def __post_init__(self) -> None:
            self.count += 1

    point = Point(1)
    assert point == Point(x=1, y=3, more=[])
    assert repr(point).endswith("Point(x=1, y=3, more=[])")
    assert Point(1).more is not point.more
    assert replace(point, y=9).y == dataclasses.replace(point, y=9).y == 9
    assert dataclasses.asdict(point) == {"x": 1, "y": 3, "more": []}
    assert [one.name for one in dataclasses.fields(Point)] == ["x", "y", "more"]
    assert not hasattr(point, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 4  # type: ignore[misc]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        Point()  # type: ignore[call-arg]
    counter = Counter(1)
    counter.seen.append(7)
    assert counter.count == 2
    assert counter == Counter(1)
    assert repr(counter).endswith("Counter(count=2)")
    with pytest.raises(TypeError, match="unhashable"):
        hash(counter)


def test_a_light_record_can_be_a_key_and_be_pickled(top: Path) -> None:
    with open_chain(top) as chain:
        descriptor = chain.links[0].descriptor
    assert pickle.loads(pickle.dumps(descriptor.extents)) == descriptor.extents
    again = pickle.loads(pickle.dumps(descriptor))
    assert again == descriptor
    assert again.cid == descriptor.cid


class Pair(NamedTuple):
    """Two values."""

    first: int
    second: str = "x"

    @property
    def shown(self) -> str:
        return f"{self.first}{self.second}"


def test_a_light_named_tuple_is_as_one_of_typing() -> None:
    for _ in range(40):  # the first ones are made without a compiled constructor
        assert Pair(1) == Pair(first=1) == (1, "x")
        assert Pair(2, "y") == Pair(2, second="y") == Pair._make([2, "y"])
    assert repr(Pair(1)) == "Pair(first=1, second='x')"
    assert (Pair(1).shown, Pair(1)._asdict(), Pair._fields) == ("1x", {"first": 1, "second": "x"}, ("first", "second"))
    assert Pair(1)._replace(second="z") == (1, "z")
    assert hash(Pair(1)) == hash((1, "x"))
    assert not hasattr(Pair(1), "__dict__")
    again = pickle.loads(pickle.dumps(Pair(3)))
    assert (type(again), again) == (Pair, Pair(3))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'first'"):
        Pair()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="third"):
        Pair(1)._replace(third=1)  # type: ignore[call-arg]
    match Pair(4):
        case Pair(first, second):
            assert (first, second) == (4, "x")


def test_a_light_protocol_is_asked_by_its_methods() -> None:
    @runtime_checkable
    class Closes(Protocol):
        def close(self) -> None: ...

        def reopen(self) -> None: ...

    class Both:
        def close(self) -> None: ...

        def reopen(self) -> None: ...

    class One:
        def close(self) -> None: ...

    assert isinstance(Both(), Closes)
    assert not isinstance(One(), Closes)


STARTED = "import sys; sys.argv[1:] = {words!r}; {before}; from qemu_vmdk_snap.cli.program import program; {end}"


def program(words: list[str], *, before: str = "pass") -> subprocess.CompletedProcess[str]:
    code = STARTED.format(words=words, before=before, end="sys.exit(program())")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_end_of_the_process_keeps_what_was_written_and_registered(top: Path) -> None:
    done = program(["image", "info", str(top)], before="import atexit; atexit.register(print, 'at the end')")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"image: {top}"
    assert done.stdout.splitlines()[-1] == "at the end"
    done = program(["image", "info", str(top) + ".missing"])
    assert (done.returncode, done.stdout) == (74, "")
    assert "No such file" in done.stderr
    assert program(["image", "info"]).returncode == 64


def test_other_threads_are_waited_for(top: Path) -> None:
    """The thread ends when the command has answered: its line is after the answer."""
    thread = "threading.Thread(target=lambda: (threading.main_thread().join(), print('ended')))"
    wait = f"import threading; {thread}.start()"
    done = program(["image", "info", str(top)], before=wait)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ended"), done.stderr


def test_a_server_is_collected_as_usual() -> None:
    shown = "import atexit, gc; atexit.register(lambda: print(gc.get_threshold()[0]))"
    usual = program(["serve", "--help"], before=shown).stdout.splitlines()[-1]
    raised = program(["image", "info", "--help"], before=shown).stdout.splitlines()[-1]
    assert int(usual) < 5000 < int(raised)


BESIDE_LIBVIRT = """
import sys
sys.path[:0] = {path!r}
import libvirt
before = set(sys.modules)
from qemu_vmdk_snap.cli.main import main
status = main(["snapshot", "list", "-c", "test:///default", "test"])
print()
print(status, sorted(set(sys.modules) - before))
"""


@pytest.mark.needs("libvirt")
def test_the_snapshots_of_a_domain_are_listed_with_little_more_than_the_binding() -> None:
    code = BESIDE_LIBVIRT.format(path=sys.path)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    status, modules = done.stdout.splitlines()[-1].split(" ", 1)
    found = set(ast.literal_eval(modules))
    assert status == "0"
    assert not found & {"numpy", "logging", "dataclasses", "inspect", "json", "argparse", "uuid"}
    assert len(found) <= 88, found
