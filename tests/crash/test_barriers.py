"""Every barrier that an operation comes to, left out once: does the enumeration of power cuts notice?

A barrier is known by the line of the engine that asks for it. `NOTICED` names, for each, an operation and a kind of
image in which its absence loses something; `SPARE` those for which no loss can be shown, with the reason why they stay.
A barrier that is in neither list, or in the list and gone from the engine, fails the last test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.support.crash.cutplans import PLANS, Cutter, Lost

STATES: Final = 80
NOTICED: Final[dict[str, tuple[str, str]]] = {
    "chain/link:Link.write_descriptor: self.file.flush()": ("write_base", "sparse"),
    "ops/check/repair:_apply: file.flush()": ("repair", "sparse"),
    "ops/check/undo:UndoFile.restore: file.flush()": ("take_back", "sparse"),
    "ops/copy/transfer:LinkWriter.finish: an extent knows its own writes, not what": ("commit_delete", "split"),
    "ops/edit/move:delete_files: sync_folder(folder)": ("commit_delete", "cowd"),
    "ops/edit/resize:_grow_file: the directories and the zeros of the tab": ("resize", "cowd"),
    "ops/edit/resize:_grow_file: file.flush() [1]": ("resize", "flat"),
    "ops/edit/resize:_grow_file: file.flush() [2]": ("resize_overlay", "cowd"),
    "ops/journal/relink:DescriptorChange.write: file.flush()": ("commit_siblings", "sparse"),
    "storage/durable:NewFiles._publish: the file is complete on disk before it g": ("create", "sparse"),
    "storage/durable:NewFiles._publish: self._sync_folders()": ("create", "sparse"),
    "storage/durable:NewFiles._publish: the extents have their names before the": ("create", "cowd"),
    "storage/durable:link_over: sync_folder(path.parent)": ("merge_links", "sparse"),
    "storage/durable:publish: the file is complete on disk before it g": ("convert_onto_same", "sparse"),
    "storage/durable:publish: sync_folder(path.parent)": ("delta", "sparse"),
    "storage/durable:publish: the extents have their names before the": ("convert_onto_same", "cowd"),
    "storage/durable:replacing: the file is complete on disk before it t": ("compact", "sparse"),
    "storage/durable:replacing: sync_folder(path.parent)": ("compact", "sparse"),
    "storage/journal/record:Operation.end: sync_folder(path.parent)": ("commit_and_write", "sparse"),
    "storage/journal/record:_store: os.fsync(fd)": ("commit_delete", "sparse"),
    "storage/journal/record:_store: sync_folder(path.parent)": ("commit_delete", "sparse"),
    "vmdk/flat/extent:FlatExtent.flush: self._file.flush()": ("write_base", "flat"),
    "vmdk/grain/extent:GrainExtent._make_table: the table is durable in its zeros before": (
        "write_empty_table",
        "sparse",
    ),
    "vmdk/grain/extent:GrainExtent.flush: self._file.flush()": ("write_base", "sparse"),
    "vmdk/grain/extent:GrainExtent.flush: grain data is durable before a table ent": ("write_base", "sparse"),
}
SPARE: Final[dict[str, str]] = {
    "ops/check/repair:_apply: grains and tables are durable where they": "the undo file takes it back",
    "ops/check/repair:_apply: nothing names what is cut": "the undo file takes it back",
    "vmdk/cowd/extent:CowdExtent.clear: self._file.flush()": "only space is given back",
    "vmdk/cowd/extent:CowdExtent.clear: nothing names a grain any more when the": "the record empties it again",
    "vmdk/sparse/clear:clear_extent: file.flush()": "only space is given back",
    "vmdk/sparse/clear:clear_extent: no table names a grain any more when the": "the record empties it again",
    "vmdk/sparse/extent:SparseExtent.clear: no table names a grain any more when the": "the record empties it again",
    "vmdk/sparse/extent:SparseExtent.cut: self._file.flush()": "only space is given back",
}


def loses(cutter: Cutter, site: str) -> str | None:
    """Return what is lost without the barrier; the late cuts, which miss the most, come first."""
    for state in reversed(list(cutter.states(limit=STATES, without=site))):
        try:
            cutter.judge(state)
        except Lost as lost:
            return f"cut before {cutter.event(state)}: {lost}"
    return None


@pytest.mark.parametrize("site", NOTICED)
def test_without_the_barrier_a_cut_loses_something(tmp_path: Path, site: str) -> None:
    cutter = Cutter(tmp_path, *NOTICED[site])
    assert site in cutter.recorder.barriers(), cutter.recorder.barriers()
    assert loses(cutter, site) is not None


def test_every_barrier_is_known(tmp_path: Path) -> None:
    """Of every operation, on the kind that each is first tried on and on those that have code of their own."""
    found: set[str] = set()
    pairs = {(plan, kind) for plan in PLANS for kind in ("sparse", "cowd") if (plan, kind) != ("renew", "cowd")}
    for plan, kind in sorted(pairs | set(NOTICED.values())):
        (tmp_path / f"{plan}-{kind}").mkdir()
        found.update(Cutter(tmp_path / f"{plan}-{kind}", plan, kind).recorder.barriers())
    assert found == NOTICED.keys() | SPARE.keys()
