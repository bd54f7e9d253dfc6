"""Does any history of writes, snapshots, reopens and reads over 1 to 6 links equal a bytearray?"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qemu_vmdk_snap import ImageOptions, RunKind, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.chain import WritableChain

MAX_LINKS = 6
SIZES = [512, 4096, 4096 * 3 + 512, 300 * 512, 512 * 4096 + 1536]


class ChainMatchesBytearray(RuleBasedStateMachine):
    @initialize(
        size=st.sampled_from(SIZES),
        grain=st.sampled_from([4096, 8192, 65536]),
        zeroed=st.booleans(),
        kind=st.sampled_from(["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "vmfsThin", "vmfsSparse"]),
    )
    def begin(self, size: int, grain: int, zeroed: bool, kind: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmdk-history-"))
        self.links = 1
        self.model = bytearray(size)
        self.frozen: list[tuple[Path, bytes]] = []
        options = ImageOptions(grain_size=grain, zeroed_grain=zeroed, subformat=kind)
        create_image(self.top, size, options=options, durable=False)
        self.chain: WritableChain = open_chain(self.top, writable=True)

    @property
    def top(self) -> Path:
        return self.folder / f"link-{self.links}.vmdk"

    @rule(data=st.data(), piece=st.binary(min_size=1, max_size=600), times=st.integers(1, 40))
    def write(self, data: st.DataObject, piece: bytes, times: int) -> None:
        offset = data.draw(st.integers(0, len(self.model) - 1))
        content = (piece * times)[: len(self.model) - offset]
        self.chain.write_at(offset, content)
        self.model[offset : offset + len(content)] = content

    @rule()
    def flush(self) -> None:
        self.chain.flush()

    @rule()
    def reopen(self) -> None:
        self.chain.close()
        self.chain = open_chain(self.top, writable=True)

    @precondition(lambda self: self.links < MAX_LINKS)
    @rule(
        grain=st.sampled_from([None, 4096, 16384]),
        kind=st.sampled_from(["monolithicSparse", "twoGbMaxExtentSparse", "vmfsSparse"]),
    )
    def snapshot(self, grain: int | None, kind: str) -> None:
        self.chain.close()
        base = self.top
        self.frozen.append((base, bytes(self.model)))
        self.links += 1
        options = None if grain is None else ImageOptions(grain_size=grain)
        create_overlay(self.top, base, kind=kind, options=options, durable=False)
        self.chain = open_chain(self.top, writable=True)

    @rule(data=st.data())
    def read_a_part(self, data: st.DataObject) -> None:
        offset = data.draw(st.integers(0, len(self.model) - 1))
        length = data.draw(st.integers(0, len(self.model) - offset))
        assert self.chain.read_at(offset, length) == self.model[offset : offset + length]

    @invariant()
    def reads_match(self) -> None:
        assert self.chain.read_at(0, len(self.model)) == self.model

    @invariant()
    def map_covers_the_disk_and_tells_the_truth(self) -> None:
        at = 0
        for run in self.chain.map():
            assert run.offset == at
            at += run.length
            content = self.model[run.offset : run.offset + run.length]
            if run.kind is RunKind.DATA:
                assert run.path is not None
                assert run.file_offset is not None
                with run.path.open("rb") as file:
                    file.seek(run.file_offset)
                    assert file.read(run.length).ljust(run.length, b"\0") == content
            else:
                assert not any(content)
        assert at == len(self.model)

    def teardown(self) -> None:
        if not hasattr(self, "chain"):
            return
        self.chain.close()
        for path, content in self.frozen:
            with open_chain(path) as chain:
                assert chain.read_at(0, len(content)) == content, f"{path.name} no longer reads what was frozen"
        shutil.rmtree(self.folder)


TestChainMatchesBytearray = ChainMatchesBytearray.TestCase
TestChainMatchesBytearray.settings = settings(max_examples=60, stateful_step_count=25)
