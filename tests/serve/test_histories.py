from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from qemu_vmdk_snap import check_image, create_image, open_chain
from tests.support.qemu import qemu_img
from tests.support.served import serving

MIB = 1 << 20
SIZE = 8 * MIB
BLOCK = 4096
CLIENTS = 16
ROUNDS = int(os.environ.get("VMDK_SERVED_ROUNDS", "1"))

pytestmark = pytest.mark.needs("libnbd", "qemu-img")


def assert_clean(path: Path) -> None:
    report = check_image(path)
    assert not report.findings, [str(finding) for finding in report.findings]
    qemu_img("check", "-f", "vmdk", path)


def read(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, chain.capacity)


class Client(threading.Thread):
    """Writes every sixteenth block, so that each grain is all clients'; knows what each of its blocks may hold."""

    def __init__(self, path: Path, number: int, seed: int, model: dict[int, set[bytes]]) -> None:
        super().__init__()
        self._path, self._number, self._random, self._model = path, number, random.Random(seed), model
        self.failure: BaseException | None = None
        self.steps = 0

    def run(self) -> None:
        import nbd

        try:
            handle = nbd.NBD()
            handle.connect_unix(str(self._path))
            while self._step(handle):
                self.steps += 1
        except nbd.Error:
            pass  # the server was killed: what was asked of it last may be done or not
        except BaseException as error:
            self.failure = error

    def _step(self, handle: object) -> bool:
        block = self._random.randrange(SIZE // BLOCK // CLIENTS) * CLIENTS + self._number
        kind = self._random.random()
        known = self._model.setdefault(block, {bytes(BLOCK)})
        if kind < 0.3:
            got = bytes(handle.pread(BLOCK, block * BLOCK))  # type: ignore[attr-defined]
            assert got in known, f"block {block}"
            known.intersection_update([got])
        elif kind < 0.97:
            data = self._random.randbytes(16) * (BLOCK // 16)
            known.add(data)
            handle.pwrite(data, block * BLOCK)  # type: ignore[attr-defined]
            known.intersection_update([data])
        elif kind < 0.9995:
            known.add(bytes(BLOCK))
            handle.zero(BLOCK, block * BLOCK)  # type: ignore[attr-defined]
            known.intersection_update([bytes(BLOCK)])
        else:
            handle.flush()  # type: ignore[attr-defined]
        return True


def until(clients: list[Client], steps: int) -> None:
    """Wait until each client has done so many steps, or has failed."""
    deadline = time.monotonic() + 60
    while any(client.steps < steps and client.is_alive() for client in clients):
        assert time.monotonic() < deadline, [client.steps for client in clients]
        time.sleep(0.005)


@pytest.mark.timeout(300)
def test_killed_under_the_load_of_many_clients(scratch: Path) -> None:
    create_image(scratch / "t0.vmdk", SIZE)
    model: dict[int, set[bytes]] = {}
    for life in range(4 * ROUNDS):
        with serving(scratch / "t0.vmdk", scratch) as served:
            clients = [Client(scratch / "s", n, life * 100 + n, model) for n in range(CLIENTS)]
            for client in clients:
                client.start()
            until(clients, 40)
            served.control("snapshot", overlay=str(scratch / f"t{life + 1}.vmdk"))
            until(clients, 80)
            served.kill()
            for client in clients:
                client.join()
            assert [client.failure for client in clients] == [None] * CLIENTS
    with serving(scratch / "t0.vmdk", scratch) as served:
        top = Path(served.control("status")["top"])
    seen = read(top)
    wrong = [block for block, known in model.items() if seen[block * BLOCK : (block + 1) * BLOCK] not in known]
    assert not wrong
    assert len(model) > 1000
    for image in scratch.glob("t*.vmdk"):
        assert_clean(image)


def test_each_client_sees_what_another_has_written(scratch: Path) -> None:
    import nbd

    create_image(scratch / "a.vmdk", SIZE)
    with serving(scratch / "a.vmdk", scratch):
        one, two = nbd.NBD(), nbd.NBD()
        one.connect_unix(str(scratch / "s"))
        two.connect_unix(str(scratch / "s"))
        for number in range(1, 9):
            at = number * 100_000
            assert bytes(two.pread(100_000, at)) == bytes(100_000)
            one.pwrite(bytes([number]) * 100_000, at)
            assert bytes(two.pread(100_000, at)) == bytes([number]) * 100_000
            two.zero(50_000, at)
            assert bytes(one.pread(100_000, at)) == bytes(50_000) + bytes([number]) * 50_000
        one.shutdown()
        two.shutdown()


def step(handle: object, chance: random.Random, model: bytearray) -> None:
    offset = chance.randrange(SIZE)
    length = min(SIZE - offset, chance.choice([1, 511, 512, 4096, 65536, 100_000, 1_300_000]))
    kind = chance.random()
    if kind < 0.5:
        data = chance.randbytes(64) * (length // 64 + 1)
        handle.pwrite(data[:length], offset)  # type: ignore[attr-defined]
        model[offset : offset + length] = data[:length]
    elif kind < 0.65:
        handle.zero(length, offset, chance.choice([0, 2]))  # type: ignore[attr-defined]
        model[offset : offset + length] = bytes(length)
    elif kind < 0.95:
        assert bytes(handle.pread(length, offset)) == model[offset : offset + length]  # type: ignore[attr-defined]
    else:
        handle.flush()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse", "monolithicFlat"])
@pytest.mark.timeout(300)
def test_any_history_equals_a_model(scratch: Path, kind: str) -> None:
    import nbd

    chance = random.Random(kind)
    create_image(scratch / "t0.vmdk", SIZE, kind=kind)
    model, frozen = bytearray(SIZE), {}
    for life in range(4 * ROUNDS):
        with serving(scratch / "t0.vmdk", scratch) as served:
            handle = nbd.NBD()
            handle.connect_unix(str(scratch / "s"))
            for number in range(60):
                step(handle, chance, model)
                if number == 30 and life % 2:
                    top = Path(served.control("status")["top"])
                    served.control("snapshot", overlay=str(scratch / f"t{life}.vmdk"))
                    frozen[top] = bytes(model)
            if life % 3:
                served.kill()
            else:
                handle.shutdown()
    with serving(scratch / "t0.vmdk", scratch) as served:
        top = Path(served.control("status")["top"])
    assert read(top) == model
    for path, expected in frozen.items():
        assert read(path) == expected
        assert_clean(path)
    assert_clean(top)
