"""Can an overlay be made on an image that a running QEMU holds open, and does that QEMU take it as its new top?"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_vmdk_snap import LockBusy, create_image, create_overlay, open_chain
from tests.support.qemu import content, qemu_content

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

MIB = 1 << 20


class Holder:
    """A paused QEMU with one disk, spoken to by QMP on its standard streams."""

    def __init__(self, image: Path) -> None:
        node = {"driver": "vmdk", "node-name": "base", "file": {"driver": "file", "filename": str(image)}}
        words = ["qemu-system-x86_64", "-accel", "tcg", "-m", "16", "-S", "-nodefaults", "-display", "none"]
        words += ["-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=base,id=disk", "-qmp", "stdio"]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self._answer()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 # whatever QEMU answers
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        while "return" not in (answer := self._answer()):
            assert "event" in answer, answer
        return answer["return"]

    def io(self, command: str) -> None:
        """Do what a guest would do to the disk."""
        said = self.ask(
            "human-monitor-command",
            **{"command-line": f'qemu-io -d /machine/peripheral/disk/virtio-backend "{command}"'},
        )
        assert said == "", said
        assert "wrote" in self.said[0], self.said
        self.said.clear()

    def quit(self) -> None:
        self.ask("quit")
        assert self.process.wait(60) == 0

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith("{"):
            assert line, "QEMU ended"
            self.said.append(line)  # qemu-io prints beside the monitor
        answer: dict[str, Any] = json.loads(line)
        return answer


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Holder]:
    create_image(tmp_path / "base.vmdk", 8 * MIB, kind=request.param, durable=False)
    running = Holder(tmp_path / "base.vmdk")
    yield running
    if running.process.poll() is None:
        running.process.kill()
    with running.process:
        pass


@pytest.mark.parametrize("holder", ["monolithicSparse", "twoGbMaxExtentSparse", "monolithicFlat"], indirect=True)
def test_a_running_qemu_takes_an_overlay_on_the_image_that_it_holds(tmp_path: Path, holder: Holder) -> None:
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    holder.io("write -P 1 0 3M")
    refused = subprocess.run(
        ["qemu-img", "create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", tmp_path / "no.vmdk"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "lock" in refused.stderr, "qemu-img can do it as well"
    with pytest.raises(LockBusy):
        open_chain(base)
    create_overlay(top, base, durable=False)
    holder.io("write -P 2 1M 1M")  # it holds the image as it did
    node = {"driver": "vmdk", "node-name": "top", "backing": None}
    holder.ask("blockdev-add", **node, file={"driver": "file", "filename": str(top)})
    holder.ask("blockdev-snapshot", node="base", overlay="top")
    holder.io("write -P 3 2M 64k")
    holder.quit()
    model = b"\1" * MIB + b"\2" * MIB + b"\3" * 65536 + b"\1" * (MIB - 65536) + bytes(5 * MIB)
    assert content(top) == qemu_content(top) == model
    assert content(base) == b"\1" * MIB + b"\2" * MIB + b"\1" * MIB + bytes(5 * MIB)
