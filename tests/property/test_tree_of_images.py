"""Does every image that survives any sequence of operations on any tree read what a model says?"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qemu_vmdk_snap import InvalidRequest, open_chain
from qemu_vmdk_snap.ops.copy.diff import make_delta
from qemu_vmdk_snap.ops.edit.apply import apply_delta
from qemu_vmdk_snap.ops.edit.commit import commit
from qemu_vmdk_snap.ops.edit.compact import compact
from qemu_vmdk_snap.ops.edit.rebase import rebase
from qemu_vmdk_snap.ops.edit.remove import remove
from tests.support.tree import Tree

SIZES = [4096 * 3 + 512, 131072, 300 * 512, 512 * 4096 + 1536]
GRAINS = [4096, 8192, 65536]
MAX_IMAGES = 7


class TreeMatchesModel(RuleBasedStateMachine):
    @initialize(size=st.sampled_from(SIZES), grain=st.sampled_from(GRAINS), zeroed=st.booleans())
    def begin(self, size: int, grain: int, zeroed: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmdk-tree-"))
        self.tree = Tree(self.folder, size)
        self.tree.base(grain=grain, zeroed=zeroed)

    def pick(self, data: st.DataObject, names: list[str]) -> str:
        return data.draw(st.sampled_from(sorted(names)))

    @property
    def leaves(self) -> list[str]:
        return [name for name in self.tree.model if not self.tree.children(name)]

    @property
    def overlays(self) -> list[str]:
        return [name for name, parent in self.tree.parents.items() if parent is not None]

    def line_of(self, name: str) -> list[str]:
        """Return the image and all below it, top first."""
        found: list[str] = []
        at: str | None = name
        while at is not None:
            found.append(at)
            at = self.tree.parents[at]
        return found

    @rule(data=st.data(), piece=st.binary(min_size=1, max_size=600), times=st.integers(1, 60), zeros=st.booleans())
    def write(self, data: st.DataObject, piece: bytes, times: int, zeros: bool) -> None:
        name = self.pick(data, self.leaves)
        offset = data.draw(st.integers(0, self.tree.size - 1))
        content = (bytes(len(piece)) if zeros else piece) * times
        self.tree.write(name, offset, content[: self.tree.size - offset])

    @precondition(lambda self: len(self.tree.model) < MAX_IMAGES)
    @rule(data=st.data(), grain=st.sampled_from([None, *GRAINS]), zeroed=st.booleans())
    def overlay(self, data: st.DataObject, grain: int | None, zeroed: bool) -> None:
        self.tree.overlay(self.pick(data, list(self.tree.model)), grain=grain, zeroed=zeroed)

    @precondition(lambda self: self.overlays)
    @rule(data=st.data(), delete=st.booleans(), deep=st.booleans())
    def commit(self, data: st.DataObject, delete: bool, deep: bool) -> None:
        tree = self.tree
        top = self.pick(data, self.overlays)
        below = self.line_of(top)[1:]
        base = self.pick(data, below) if deep else below[0]
        between = below[: below.index(base)]
        try:
            report = commit(tree.path(top), base=tree.path(base), delete=delete, keep_siblings=True)
        except InvalidRequest:
            assert delete
            line = [top, *between]
            assert any(set(tree.children(name)) - set(line) for name in between)
            return
        tree.model[base] = tree.model[top]
        if delete:
            for child in tree.children(top):
                tree.parents[child] = base
            for name in [top, *between]:
                tree.forget(name)
        else:
            tree.parents[top] = base
        assert {path.name for path in report.deleted} == ({f"{n}.vmdk" for n in [top, *between]} if delete else set())

    @rule(data=st.data(), flatten=st.booleans())
    def rebase(self, data: st.DataObject, flatten: bool) -> None:
        tree = self.tree
        name = self.pick(data, list(tree.model))
        allowed = [other for other in tree.model if name not in self.line_of(other)]
        parent = self.pick(data, allowed) if allowed and not flatten else None
        rebase(tree.path(name), None if parent is None else tree.path(parent))
        tree.parents[name] = parent

    @precondition(lambda self: len(self.tree.model) > 1)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        tree = self.tree
        name = self.pick(data, list(tree.model))
        parent = tree.parents[name]
        report = remove(tree.path(name))
        assert {path.name for path in report.moved} == {f"{child}.vmdk" for child in tree.children(name)}
        for child in tree.children(name):
            tree.parents[child] = parent
        tree.forget(name)

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        compact(self.tree.path(self.pick(data, list(self.tree.model))))

    @precondition(lambda self: self.overlays)
    @rule(data=st.data())
    def back_up_and_restore(self, data: st.DataObject) -> None:
        tree = self.tree
        top = self.pick(data, self.overlays)
        line = self.line_of(top)
        base = self.pick(data, line[1:])
        with tempfile.TemporaryDirectory() as folder:
            for name in line[line.index(base) :]:
                shutil.copy(tree.path(name), folder)
            delta, copy = Path(folder, "delta.vmdk"), Path(folder, f"{base}.vmdk")
            with open_chain(tree.path(top)) as chain:
                make_delta(chain, line.index(base), delta)
            apply_delta(delta, copy)
            with open_chain(copy) as chain:
                assert chain.read_at(0, tree.size) == tree.model[top]

    @invariant()
    def every_image_reads_what_the_model_says(self) -> None:
        self.tree.verify()

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


TestTreeMatchesModel = TreeMatchesModel.TestCase
TestTreeMatchesModel.settings = settings(max_examples=40, stateful_step_count=20)
