"""Do small chains have the same runs whether they are gone through one by one or as tables?"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain import chain as chain_module
from qemu_vmdk_snap.chain.small import is_small

SIZE = 5 << 20
KINDS = ("monolithicSparse", "twoGbMaxExtentSparse", "monolithicFlat")


@pytest.mark.parametrize("seed", range(24))
def test_the_runs_are_those_of_the_tables(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    below: Path | None = None
    for number in range(draw.randint(1, 4)):
        path = tmp_path / f"{number}.vmdk"
        size = SIZE + 40_960 * number + 4096 * draw.randint(0, 9)
        kind = draw.choice(KINDS if below is None else KINDS[:2])
        grain = draw.choice([4096, 16384, 65536])
        zeroed = draw.random() < 0.5 and kind != "monolithicFlat"
        options = ImageOptions(subformat=kind, zeroed_grain=zeroed)
        if kind != "monolithicFlat":
            options = ImageOptions(grain_size=grain, subformat=kind, zeroed_grain=zeroed)
        if below is None:
            create_image(path, size, options=options, durable=False)
        else:
            create_overlay(path, below, size=size, options=options, durable=False)
        below = path
        with open_chain(path, writable=True) as chain:
            for _ in range(draw.randint(0, 12)):
                at = draw.randrange(0, chain.capacity - 1)
                chain.write_at(at, bytes([number + 1]) * min(draw.randint(1, 300_000), chain.capacity - at))
    assert below is not None
    with open_chain(below) as chain:
        ranges: list[tuple[int, int]] = [(0, chain.capacity)]
        for _ in range(8):
            start = draw.randrange(chain.capacity)
            ranges.append((start, draw.randint(1, chain.capacity - start)))
        assert is_small(chain.links)
        one_by_one = [list(chain.rows(*one)) for one in ranges]
        monkeypatch.setattr(chain_module, "is_small", lambda _: False)
        assert one_by_one == [list(chain.rows(*one)) for one in ranges]
