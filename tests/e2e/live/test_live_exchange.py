"""The chain below a guest that writes is exchanged: the guest, and all that is frozen, read what they read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from qemu_vmdk_snap import (
    CidMismatch,
    CorruptChain,
    DomainError,
    LockBusy,
    VmdkSnapError,
    confined,
    open_chain,
    open_link,
    open_posix,
    rebase,
    resize,
)
from qemu_vmdk_snap.domain.connect import open_connection
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.qemu import exchange as module
from qemu_vmdk_snap.domain.qemu.exchange import (
    Exchange,
    can_exchange,
    check_exchanges,
    close_unused,
    exchange,
    is_exchanged,
)
from qemu_vmdk_snap.domain.qemu.graph import BlockGraph, node_name
from qemu_vmdk_snap.domain.qemu.monitor import Monitor
from tests.domain.lab import contents
from tests.domain.libvirtd import Daemon
from tests.e2e.live.live_chain import ChainGuest, both, content, content_by_qemu, sums
from tests.e2e.live.live_guest import Writer
from tests.e2e.live.test_live import fail_at
from tests.e2e.live.test_live_options import THROTTLE, Case

if TYPE_CHECKING:
    import libvirt

pytestmark = [pytest.mark.needs("libvirt", "qemu-system-x86_64", "qemu-img"), pytest.mark.timeout(300)]


@pytest.fixture
def guest(embed: libvirt.virConnect, scratch: Path, request: pytest.FixtureRequest) -> Iterator[ChainGuest]:
    guest = ChainGuest(embed, scratch, disks=getattr(request, "param", 1))
    yield guest
    guest.close()


def chain_in_qemu(guest: ChainGuest, target: str) -> list[str]:
    monitor = guest.monitor
    return list(monitor.graph().chain(monitor.tops()[target].node))


def opened(guest: ChainGuest) -> dict[str, object]:
    """Return how each node is opened, but for what QEMU displays as its file."""
    graph = guest.monitor.graph()
    return {
        name: (node.driver, node.read_only, node.direct, node.no_flush, node.detect_zeroes)
        for name, node in graph.nodes.items()
    }


def passed(guest: ChainGuest) -> int:
    """Return how many descriptors QEMU keeps of those that it was passed."""
    return sum(len(fdset["fds"]) for fdset in guest.monitor.execute("query-fdsets"))


def watch_options(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the list that gets what each node is reopened with from now on."""
    real = Monitor.execute
    given: list[dict[str, Any]] = []

    def watched(self: Monitor, command: str, /, *, files: Sequence[int] = (), **arguments: object) -> object:
        if command == "blockdev-reopen":
            given.extend(cast(list[dict[str, Any]], arguments["options"]))
        return real(self, command, files=files, **arguments)

    monkeypatch.setattr(Monitor, "execute", watched)
    return given


def check_exchanged(guest: ChainGuest, exchanges: Sequence[Exchange]) -> None:
    """Exchange, and check what QEMU has then, while the guest goes on writing or not."""
    before = opened(guest)
    chains = {one.target: chain_in_qemu(guest, one.target) for one in exchanges}
    removed = set()
    for one in exchanges:
        names = guest.monitor.graph().node_of(one.upper), one.below and guest.monitor.graph().node_of(one.below)
        chain = chains[one.target]
        at = chain.index(str(names[0])) + 1
        end = chain.index(str(names[1])) if names[1] else len(chain)
        removed |= set(chain[at:end])
        chains[one.target] = [*chain[:at], *map(node_name, one.images), *chain[end:]]
    check_exchanges(guest.monitor, exchanges)
    assert opened(guest) == before  # it has only looked
    report = exchange(guest.monitor, exchanges)
    assert (report.left, report.reopened > 0) == ((), True)
    assert removed < set(report.closed)
    assert len(report.closed) == 2 * len(removed)
    assert all(is_exchanged(guest.monitor, one) for one in exchanges)
    assert {target: chain_in_qemu(guest, target) for target in chains} == chains
    paused = not guest.monitor.execute("query-status")["running"]
    assert passed(guest) == 0 or paused
    after = opened(guest)
    new = [node_name(image) for one in exchanges for image in one.images]
    assert set(after) == set(before) - set(report.closed) | {*new, *(f"{name}-file" for name in new)}
    assert {name: after[name] for name in set(after) & set(before)} == {
        name: before[name] for name in set(after) & set(before)
    }


def check_all(guest: ChainGuest, frozen: dict[Path, tuple[int, int]]) -> None:
    """Check the guest's disk, all that was frozen and is still there, and that it starts again."""
    tops = [files[0] for files in guest.disks.values()]
    shown = guest.guest_sees()
    assert shown == sums(tops[0])
    assert all(here == there for here, there in frozen.values())
    assert both([path for path in frozen if path.exists()]) == {
        path: told for path, told in frozen.items() if path.exists()
    }
    guest.domain.destroy()
    for top in tops:
        assert content(top) == content_by_qemu(top)
    guest.probe.close()
    guest.start()
    assert guest.guest_sees() == shown
    guest.probe.pattern(77, 0x200000, 4096)
    create_snapshot(guest.conn, guest.name, "afterwards")
    guest.probe.pattern(78, 0x200000, 4096)


RANGES: dict[str, list[tuple[int, int | None, int | None]]] = {
    "middle": [(3, 1, None)],
    "the one below the top": [(5, 3, None)],
    "deeper": [(4, 1, None)],
    "base": [(2, None, None)],
    "everything": [(5, None, None)],
    "two ranges": [(5, 3, None), (2, None, None)],
    "two images": [(5, None, 1)],
}
"""(link above, link below, last link of the lower image), each counted from the base of a chain of six."""


@pytest.mark.parametrize("which", RANGES)
def test_links_are_exchanged_while_the_guest_writes(guest: ChainGuest, which: str) -> None:
    with Writer(guest.probe) as writer:
        for name in ("live1", "live2"):  # libvirt has opened the lower four, and we the upper two
            create_snapshot(guest.conn, guest.name, name)
            writer.wait(1)
        frozen = dict(both(guest.disks["sda"][1:]))
        exchanges = [guest.exchange("sda", upper, below, cut=cut) for upper, below, cut in RANGES[which]]
        writer.wait(1)
        check_exchanged(guest, exchanges)
        writer.wait(2)
        guest.adopt(exchanges)
        assert all(guest.monitor.graph().node_of(path) is not None for path in guest.disks["sda"])
        writer.wait(1)
    check_all(guest, frozen)


CASES = (
    Case(cache="none", iothread=True, driver="io='native' discard='unmap' detect_zeroes='unmap'", extra=THROTTLE),
    Case(cache="none", driver="copy_on_read='on' discard='unmap' detect_zeroes='on'"),
    Case(cache="unsafe", driver="detect_zeroes='on'", iothread=True),
    Case("sata", "directsync"),
    Case("ide", "writethrough", driver="copy_on_read='on'"),
    Case("virtio-scsi", "writeback", iothread=True, driver="io='io_uring'"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_and_filters_stay(
    embed: libvirt.virConnect, scratch: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    given = watch_options(monkeypatch)
    guest = ChainGuest(
        embed, scratch, links=3, text=case.xml(f"opts-{scratch.name}", scratch / "a.vmdk", scratch / "serial")
    )
    (target,) = guest.disks
    try:
        with Writer(guest.probe) as writer:
            create_snapshot(embed, guest.name, "live")
            frozen = dict(both(guest.disks[target][1:]))
            writer.wait(1)
            # Below the active overlay, and below a frozen one.
            for upper, below in ((3, 1), (2, None)) if case.bus == "virtio" else ((3, 0),):
                exchanges = [guest.exchange(target, upper, below)]
                check_exchanged(guest, exchanges)
                writer.wait(2)
                guest.adopt(exchanges)
        # QEMU does not say of a node whether it discards.
        assert {one["discard"] for one in given} == {"unmap" if "discard='unmap'" in case.driver else "ignore"}
        check_all(guest, frozen)
    finally:
        guest.close()


def test_the_newest_goes_once_it_is_frozen(guest: ChainGuest) -> None:
    frozen: dict[Path, tuple[int, int]] = {}
    with Writer(guest.probe) as writer:
        for number in range(2):
            create_snapshot(guest.conn, guest.name, f"new{number}")
            writer.wait(1)
            depth = len(guest.disks["sda"])
            frozen = dict(both(guest.disks["sda"][1:]))
            one = guest.exchange("sda", depth - 1, depth - 4)
            check_exchanged(guest, [one])
            guest.adopt([one])
            writer.wait(1)
            assert len(guest.disks["sda"]) == depth - 1
    check_all(guest, frozen)


@pytest.mark.parametrize("guest", [2], indirect=True)
def test_two_disks_in_one_call(guest: ChainGuest) -> None:
    """The second one is never written by this guest, nor was its top since it was opened."""
    with Writer(guest.probe) as writer:
        frozen = dict(both([path for files in guest.disks.values() for path in files[1:]]))
        exchanges = [guest.exchange("sda", 3, 1), guest.exchange("vdb", 2, None)]
        check_exchanged(guest, exchanges)
        writer.wait(2)
        guest.adopt(exchanges)
    check_all(guest, frozen)


@pytest.mark.parametrize("guest", [2], indirect=True)
def test_a_refused_disk_leaves_the_others(guest: ChainGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU itself refuses the second one: a node that is not there."""
    real = module._options
    exchanges = [guest.exchange("sda", 3, 1), guest.exchange("vdb", 2, None)]

    def spoilt(graph: BlockGraph, step: module._Step, backing: str) -> dict[str, object]:
        return {**real(graph, step, backing), **({"backing": "no-such-node"} if step.exchange.target == "vdb" else {})}

    before = opened(guest), chain_in_qemu(guest, "sda")
    with monkeypatch.context() as broken:
        broken.setattr(module, "_options", spoilt)
        with pytest.raises(DomainError, match=r"QEMU refuses blockdev-reopen: .*no-such-node"):
            exchange(guest.monitor, exchanges)
    assert (opened(guest), chain_in_qemu(guest, "sda")) == before
    check_exchanged(guest, exchanges)


@pytest.mark.parametrize("written", [False, True], ids=["never written", "written"])
def test_a_paused_guest(guest: ChainGuest, written: bool) -> None:
    if written:
        guest.probe.pattern(1, 0x200000, 65536)
    frozen = dict(both(guest.disks["sda"][1:]))
    guest.domain.suspend()
    one = guest.exchange("sda", 3, 1)
    check_exchanged(guest, [one])
    guest.adopt([one])
    guest.domain.resume()
    create_snapshot(guest.conn, guest.name, "resumed")
    assert passed(guest) == 0
    check_all(guest, frozen)


def test_many_in_a_row(guest: ChainGuest) -> None:
    with Writer(guest.probe) as writer:
        for number in range(200 if os.environ.get("VMDK_LIVE_EACH") else 6):
            create_snapshot(guest.conn, guest.name, f"row{number}")
            depth = len(guest.disks["sda"])
            upper = 2 + number % (depth - 2)
            below = upper - 3 if upper > 2 else None
            one = guest.exchange("sda", upper, below)
            check_exchanged(guest, [one])
            guest.adopt([one])
            writer.wait(1)
    frozen = dict(both(guest.disks["sda"][1:]))
    check_all(guest, frozen)


# Refusals: before anything is changed. They all are of one guest, which they leave as it is.


@pytest.fixture(scope="module")
def standing(embed: libvirt.virConnect, scratch_root: Path) -> Iterator[ChainGuest]:
    folder = Path(tempfile.mkdtemp(dir=scratch_root))
    guest = ChainGuest(embed, folder)
    yield guest
    guest.close()
    shutil.rmtree(folder)


def spoil_cid(guest: ChainGuest, one: Exchange) -> Exchange:
    link = open_link(one.images[0], opener=open_posix, writable=True, resolver=confined())
    link.write_descriptor(link.descriptor.with_values({"CID": "12345678"}))
    link.close()
    return one


def move_parent(guest: ChainGuest, one: Exchange) -> Exchange:
    other = guest.folder / "other.vmdk"
    other.write_bytes(one.below.read_bytes() if one.below else b"")
    rebase(one.images[0], other)  # the CID fits
    return one


def give_parent(guest: ChainGuest, one: Exchange) -> Exchange:
    return one._replace(below=None)


def grow(guest: ChainGuest, one: Exchange) -> Exchange:
    resize(one.images[0], 20 << 20)
    return one


def keep_old(guest: ChainGuest, one: Exchange) -> Exchange:
    """Not merged: the link above the removed ones is offered itself, under another name."""
    copy = guest.folder / "copy.vmdk"
    copy.write_bytes(guest.disks["sda"][1].read_bytes())
    return one._replace(images=(copy,))


def in_use(guest: ChainGuest, one: Exchange) -> Exchange:
    return one._replace(images=(guest.disks["sda"][1],))


def swapped(guest: ChainGuest, one: Exchange) -> Exchange:
    assert one.below is not None
    return one._replace(upper=one.below, below=one.upper)


REFUSALS: dict[str, tuple[Callable[[ChainGuest, Exchange], Exchange], type[VmdkSnapError], str]] = {
    "CID": (
        spoil_cid,
        CidMismatch,
        r"a-000003.vmdk: parentCID = .*, but the CID of its parent .*m\d+.vmdk is 12345678",
    ),
    "parent": (move_parent, CorruptChain, r"m\d+.vmdk: is backed by .*/other.vmdk, not by .*/a-000001.vmdk$"),
    "no base": (give_parent, CorruptChain, r"m\d+.vmdk: is backed by a.vmdk, and is to be a base$"),
    "size": (grow, CorruptChain, r"m\d+.vmdk: has 20971520 bytes, but .*a-000002.vmdk, whose place .* has 10485760$"),
    "not merged": (keep_old, CidMismatch, r"copy.vmdk: parentCID = .*, but the CID of its parent .*/a.vmdk is "),
    "in use": (in_use, DomainError, r"disk sda: the guest uses .*a-000002.vmdk already$"),
    "nothing between": (swapped, DomainError, r"disk sda: no link is between .*a.vmdk and .*a-000003.vmdk$"),
    "no such disk": (lambda _, one: one._replace(target="vdz"), DomainError, r"the running guest has no disk vdz$"),
    "not in the chain": (
        lambda _, one: one._replace(upper=one.images[0]),
        DomainError,
        r"disk sda: .*/m\d+.vmdk is not in the chain that the running guest uses$",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refused_before_anything(standing: ChainGuest, kind: str) -> None:
    guest = standing
    change, error, text = REFUSALS[kind]
    below = 1 if kind == "parent" else 0
    one = change(guest, guest.exchange("sda", 3, below))
    before = opened(guest), contents(guest.folder)
    for attempt in (check_exchanges, exchange):
        with pytest.raises(error, match=text) as caught:
            attempt(guest.monitor, [one])
        assert "\n" not in str(caught.value)
    assert (opened(guest), contents(guest.folder)) == before
    guest.probe.pattern(1, 0x200000, 65536)
    assert guest.guest_sees() == sums(guest.disks["sda"][0])


def test_a_block_job_refuses(guest: ChainGuest) -> None:
    monitor = guest.monitor
    one = guest.exchange("sda", 3, 1)
    monitor.execute("blockdev-add", driver="null-co", node_name="sink", size=guest.probe.size())
    node = monitor.tops()["sda"].node
    monitor.execute("blockdev-backup", job_id="copying", device=node, target="sink", sync="full", speed=4096)
    before = opened(guest)
    with pytest.raises(DomainError, match=r"disk sda: the block job 'copying' works on it"):
        exchange(monitor, [one])
    assert opened(guest) == before
    monitor.execute("block-job-cancel", device="copying", force=True)


def test_an_image_that_is_being_written_refuses(standing: ChainGuest) -> None:
    one = standing.exchange("sda", 3, 1)
    before = opened(standing)
    writer = open_chain(one.images[0], writable=True)
    with pytest.raises(LockBusy, match=r"m\d+.vmdk: failed to get the '.*' lock"):
        exchange(standing.monitor, [one])
    writer.close()
    assert opened(standing) == before


def test_failed_writes_refuse(guest: ChainGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Monitor.execute
    one = guest.exchange("sda", 3, 1)

    def counted(self: Monitor, command: str, /, *, files: Sequence[int] = (), **arguments: object) -> object:
        answer = real(self, command, files=files, **arguments)
        if command == "query-blockstats":
            answer[0]["stats"]["failed_wr_operations"] = 1
        return answer

    with monkeypatch.context() as failing:
        failing.setattr(Monitor, "execute", counted)
        with pytest.raises(DomainError, match="disk sda: writes of the guest have failed"):
            exchange(guest.monitor, [one])


def test_a_file_that_took_the_place_of_another_refuses(guest: ChainGuest) -> None:
    """What QEMU reads is no longer what the path names: the images were merged from something else."""
    for name in ("live1", "live2"):
        create_snapshot(guest.conn, guest.name, name)
    one = guest.exchange("sda", 5, 2)
    opened_by_us = guest.disks["sda"][1]
    copy = guest.folder / "copy"
    copy.write_bytes(opened_by_us.read_bytes())
    copy.replace(opened_by_us)
    with pytest.raises(DomainError, match=r"disk sda: QEMU has another chain below .*a-000005.vmdk than its files: "):
        exchange(guest.monitor, [one])


def test_exchanges_that_need_each_other_refuse(guest: ChainGuest) -> None:
    pair = [guest.exchange("sda", 3, 1), guest.exchange("sda", 2, 0)]
    with pytest.raises(DomainError, match=r"disk sda: another exchange of the same call needs .* too$"):
        exchange(guest.monitor, pair)


# Faults and deaths in the middle.

FAULTS = {
    "first descriptor": ("add-fd", 1, False),
    "first file node": ("blockdev-add", 1, False),
    "last format node": ("blockdev-add", 4, False),
    "reopen": ("blockdev-reopen", 1, False),
}


@pytest.mark.parametrize("guest", [2], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_the_old_chains(guest: ChainGuest, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    command, at, after = FAULTS[fault]
    exchanges = [guest.exchange("sda", 3, 1), guest.exchange("vdb", 2, None)]
    before = opened(guest), [chain_in_qemu(guest, target) for target in ("sda", "vdb")]
    with monkeypatch.context() as broken:
        fail_at(broken, command, at, after=after)
        with pytest.raises(DomainError, match="so says the test"):
            exchange(guest.monitor, exchanges)
    assert (opened(guest), [chain_in_qemu(guest, target) for target in ("sda", "vdb")]) == before
    assert passed(guest) == 0
    assert not any(is_exchanged(guest.monitor, one) for one in exchanges)
    check_exchanged(guest, exchanges)


def test_a_lost_answer_is_looked_up(guest: ChainGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    one = guest.exchange("sda", 3, 1)
    with monkeypatch.context() as broken:
        fail_at(broken, "blockdev-reopen", 1, after=True)
        report = exchange(guest.monitor, [one])
    assert (len(report.closed), is_exchanged(guest.monitor, one)) == (2, True)


def test_a_graph_that_differs_is_put_back(guest: ChainGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU does not repeat an option that is left out: the frozen overlay becomes writable, and that is seen."""
    real = module._options
    create_snapshot(guest.conn, guest.name, "live")
    one = guest.exchange("sda", 3, 1)
    before = opened(guest), chain_in_qemu(guest, "sda")
    calls: list[int] = []

    def forgetful(graph: BlockGraph, step: module._Step, backing: str) -> dict[str, object]:
        calls.append(1)
        given = real(graph, step, backing)
        return given if len(calls) == 1 else {name: value for name, value in given.items() if name != "read-only"}

    with monkeypatch.context() as broken:
        broken.setattr(module, "_options", forgetful)
        with pytest.raises(DomainError, match="QEMU has another block graph after the"):
            exchange(guest.monitor, [one])
    assert (opened(guest), chain_in_qemu(guest, "sda")) == before
    check_exchanged(guest, [one])


DEATHS = {
    "descriptor passed": ("add-fd", 1, False),
    "file node added": ("blockdev-add", 1, False),
    "added": ("blockdev-add", 2, False),
    "reopened": ("blockdev-reopen", 1, True),
    "half closed": ("blockdev-del", 1, True),
}


@pytest.mark.parametrize("moment", DEATHS)
def test_a_death_is_settled_by_the_same_again(guest: ChainGuest, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    command, at, done = DEATHS[moment]
    real = Monitor.execute
    one = guest.exchange("sda", 3, 1)
    removed = guest.disks["sda"][1]
    nodes = len(opened(guest))
    seen = 0

    def dies(self: Monitor, name: str, /, *, files: Sequence[int] = (), **arguments: object) -> object:
        nonlocal seen
        if seen == at:
            raise KeyboardInterrupt  # nothing is taken back
        answer = real(self, name, files=files, **arguments)
        seen += name == command
        return answer

    with Writer(guest.probe) as writer:
        with monkeypatch.context() as dying:
            dying.setattr(Monitor, "execute", dies)
            with pytest.raises(KeyboardInterrupt):
                exchange(guest.monitor, [one])
        writer.wait(1)
        assert is_exchanged(guest.monitor, one) is done
        report = exchange(guest.monitor, [one])
        assert bool(report.closed) is not done
        closed = close_unused(guest.monitor, [removed])
        assert bool(closed) is done
        assert close_unused(guest.monitor, [*guest.disks["sda"]]) == ()  # what is in use stays
        writer.wait(1)
    assert len(opened(guest)) == nodes
    assert passed(guest) == 0
    guest.adopt([one])
    assert guest.guest_sees() == sums(guest.disks["sda"][0])


def test_what_cannot_be_closed_is_named(guest: ChainGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    one = guest.exchange("sda", 3, 1)
    with monkeypatch.context() as broken:
        fail_at(broken, "blockdev-del", 1)
        report = exchange(guest.monitor, [one])
    assert (report.closed, len(report.left)) == ((), 1)
    assert len(close_unused(guest.monitor, [guest.disks["sda"][1]])) == 2


def test_an_older_qemu_cannot(guest: ChainGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_exchange(guest.monitor)
    monkeypatch.setattr(Monitor, "execute", lambda *_: {"qemu": {"major": 6, "minor": 0, "micro": 9}})
    assert not can_exchange(guest.monitor)


@pytest.mark.needs("libvirtd", "virsh")
def test_a_daemon_that_dies_between_exchanges(daemon: Daemon, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt does not know the nodes that it finds then, and leaves the guest alone."""
    monkeypatch.setenv("QEMU_VMDK_SNAP_STATE", str(scratch / "state"))
    guest = ChainGuest(open_connection(daemon.uri), scratch)
    frozen: dict[Path, tuple[int, int]] = {}
    try:
        with Writer(guest.probe) as writer:
            for number in range(2):
                create_snapshot(guest.conn, guest.name, f"live{number}")
                frozen = dict(both(guest.disks["sda"][1:]))
                one = guest.exchange("sda", 4, 2)
                check_exchanged(guest, [one])
                guest.adopt([one])
                daemon.restart()
                guest.conn = open_connection(daemon.uri)
                guest.domain = guest.conn.lookupByName(guest.name)
                writer.wait(1)
        check_all(guest, frozen)
    finally:
        guest.close()
        guest.conn.close()
