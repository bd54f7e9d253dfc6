"""A power cut at any moment while a disk is served: is everything there that was flushed, and every image sound?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from unittest.mock import patch

import pytest

from qemu_vmdk_snap.serve.control.merge import Merger
from qemu_vmdk_snap.serve.control.switch import Holder, Switcher
from qemu_vmdk_snap.serve.disk.disk import Disk
from qemu_vmdk_snap.serve.server import Server
from tests.support.crash.cutplans import (
    GRAIN,
    KINDS,
    PLANS,
    SIZE,
    Cutter,
    Kind,
    Lost,
    Mark,
    Plan,
    Promise,
    base,
    overlay,
    pattern,
)

STATES: Final = int(os.environ.get("VMDK_CUT_STATES", "6"))
FIRST: Final = [(5 * GRAIN, GRAIN), (GRAIN + 1024, 512), (17 * GRAIN + 512, 2048), (12 * GRAIN, 3 * GRAIN)]
SECOND: Final = [(5 * GRAIN, 512), (7 * GRAIN, 2 * GRAIN), (21 * GRAIN, GRAIN), (13 * GRAIN + 512, 512)]


@contextlib.contextmanager
def serving(image: Path) -> Iterator[tuple[Server, Disk]]:
    server = Server(image)
    try:
        disk = server.open("")
        assert disk is not None
        yield server, disk
        disk.close()
    finally:
        server.close()


def write(disk: Disk, places: list[tuple[int, int]], seed: int) -> None:
    for at, length in places:
        with disk.stack.turn:
            disk.write(at, memoryview(pattern(seed)[at : at + length]))


def after(before: bytes, places: list[tuple[int, int]], seed: int) -> bytes:
    content = bytearray(before)
    for at, length in places:
        content[at : at + length] = pattern(seed)[at : at + length]
    return bytes(content)


def plan_write(folder: Path, kind: Kind) -> Plan:
    below, before = base(folder, kind), overlay(folder, kind, "top.vmdk", "base.vmdk", 2)
    middle = after(before, FIRST, 7)
    written = after(middle, SECOND, 8)
    end = bytearray(written)
    end[8 * GRAIN : 11 * GRAIN] = bytes(3 * GRAIN)

    def run(mark: Mark) -> None:
        with serving(folder / "top.vmdk") as (_, disk):
            write(disk, FIRST, 7)
            with disk.stack.turn:
                disk.flush()
            mark()
            write(disk, SECOND, 8)
            with disk.stack.turn:
                disk.zero(8 * GRAIN, 3 * GRAIN)

    def promises(marks: int) -> list[Promise]:
        allowed = [(before, middle, written, bytes(end)), (middle, written, bytes(end)), (bytes(end),)][marks]
        return [Promise(("base.vmdk",), (below,)), Promise(("top.vmdk",), allowed, sectors=True)]

    return Plan(run, promises)


def plan_snapshot(folder: Path, kind: Kind) -> Plan:
    before = base(folder, kind, "top.vmdk")
    middle = after(before, FIRST, 7)
    end = after(middle, SECOND, 8)

    def run(mark: Mark) -> None:
        with serving(folder / "top.vmdk") as (server, disk):
            write(disk, FIRST, 7)
            Switcher(server).commands()["snapshot"]({"overlay": str(folder / "new.vmdk")}, Holder())
            mark()
            write(disk, SECOND, 8)

    def promises(marks: int) -> list[Promise]:
        frozen = Promise(("top.vmdk",), (before, middle)[min(marks, 1) :], sectors=True)
        allowed = (before, middle, end)[marks:]
        return [frozen, Promise(("new.vmdk",), allowed, may_be_missing=not marks, sectors=True)]

    return Plan(run, promises)


def plan_merge(folder: Path, kind: Kind) -> Plan:
    below, held = base(folder, kind), overlay(folder, kind, "mid.vmdk", "base.vmdk", 2)
    before = overlay(folder, kind, "top.vmdk", "mid.vmdk", 3, step=5 * GRAIN)
    end = after(before, FIRST, 7)

    def run(mark: Mark) -> None:
        with serving(folder / "top.vmdk") as (server, disk):
            write(disk, FIRST, 7)
            merger = Merger(server, Switcher(server))
            merger.commands()["merge"]({"delete": str(folder / "mid.vmdk")}, Holder())
            assert merger._thread is not None
            merger._thread.join()
            status = merger.status()
            assert status is not None
            assert status["state"] == "done", status
            mark()

    def promises(marks: int) -> list[Promise]:
        return [
            Promise(("base.vmdk",), (below,)),
            Promise(("mid.vmdk",), (held,), may_be_missing=True),
            Promise(("top.vmdk",), (before, end)[min(marks, 1) :], sectors=True),
        ]

    return Plan(run, promises)


SERVED: Final = {"write": plan_write, "snapshot": plan_snapshot, "merge": plan_merge}
CASES: Final = [
    (plan, kind)
    for plan in SERVED
    for kind in KINDS
    if STATES > 6 or kind == "sparse" or (plan == "write" and kind in ("cowd", "split"))
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("plan", "kind"), CASES)
def test_a_cut_while_a_disk_is_served(tmp_path: Path, plan: str, kind: str) -> None:
    assert SIZE > 22 * GRAIN
    with patch.dict(PLANS, SERVED):
        cutter = Cutter(tmp_path, plan, kind)
        count = 0
        for state in cutter.states(limit=STATES):
            count += 1
            try:
                cutter.judge(state)
            except Lost as lost:
                pytest.fail(f"cut before {cutter.event(state)}: {lost}", pytrace=False)
    assert count > 5


def test_without_the_barrier_before_the_tables_a_cut_loses_something(tmp_path: Path) -> None:
    with patch.dict(PLANS, SERVED):
        cutter = Cutter(tmp_path, "write", "sparse")
        site = "vmdk/grain/extent:GrainExtent.flush: grain data is durable before a table ent"
        assert site in cutter.recorder.barriers(), cutter.recorder.barriers()
        for state in reversed(list(cutter.states(limit=80, without=site))):
            try:
                cutter.judge(state)
            except Lost:
                return
    pytest.fail("nothing is lost")
