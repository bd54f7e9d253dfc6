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
from qemu_vmdk_snap.light import dataclass, field, replace

HEAVY = {"numpy", "libvirt", "logging", "asyncio", "dataclasses", "inspect", "ast", "json", "uuid"}

COUNTED = """
import sys
before = set(sys.modules)
from qemu_vmdk_snap.cli.main import main
status = main({words!r})
print()
print(status, sorted(set(sys.modules) - before))
"""


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
        (["--help"], 75),
        (["image", "create", "-q", "-b", "base.vmdk", "NEW"], 110),
        (["image", "info", "--backing-chain", "TOP"], 122),
        (["image", "map", "TOP"], 110),
        (["image", "measure", "-O", "raw", "--size", "1G"], 122),
    ],
)
def test_little_is_imported(top: Path, words: list[str], most: int) -> None:
    there = {"TOP": str(top), "NEW": str(top.with_name("new.vmdk"))}
    code = COUNTED.format(words=[there.get(word, word) for word in words])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
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
