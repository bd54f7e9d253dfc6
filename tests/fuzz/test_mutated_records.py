"""Does a damaged operation record give our own errors and nothing else, and hold up nothing but its own images?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, open_chain, recover
from qemu_vmdk_snap.ops.journal.recover import give_up
from tests.support.crash.cutplans import RECOVERED, Cutter
from tests.support.fuzzing import bounded, cases, chooser, mutated, mutated_json


@pytest.mark.parametrize("plan", [*RECOVERED, "commit_delete"])
def test_recover_with_a_damaged_record(tmp_path: Path, plan: str) -> None:
    cutter, chance = Cutter(tmp_path, plan, "sparse"), chooser(plan)
    states = [state for state in cutter.states(limit=2) if cutter.is_pending(state)]
    for number in cases(20):
        cutter.recorder.put(chance.choice(states))
        [record] = [path for path in cutter.folder.iterdir() if path.name.endswith(".intent")]
        raw = record.read_bytes()
        if number % 4:
            record.write_text(json.dumps(mutated_json(json.loads(raw), chance)))
        else:
            record.write_bytes(mutated(raw, chance))
        create_image(cutter.folder / "other.vmdk", 65536, durable=False)
        with cutter.recorder.still():
            with bounded():
                recover(cutter.folder)
            with open_chain(cutter.folder / "other.vmdk", writable=True) as chain:
                chain.write_at(0, b"nothing holds this up")
            with bounded():
                give_up(cutter.folder)
