"""Does a Linux that writes all the while keep its disk through snapshots and deletes inside the server of it?

VMDK_SERVED_CYCLES=10 makes that fifty snapshots and forty deletes; every day it is one cycle, of five and four. The
figures are shown by --log-cli-level=INFO.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qemu_vmdk_snap import check_image, create_image, open_chain
from qemu_vmdk_snap.harness import LinuxGuest, boot_linux, missing_stamps
from tests.support.qemu import qemu_content, qemu_img
from tests.support.served import Served, serving

MIB = 1 << 20
SIZE = 16 * MIB
UNIT = 64 << 10
AREA = 2 * MIB
AREAS, TEMPLATES = 7, 4  # with no common divisor: an area gets another content at each pass
STAMPS, SECTORS = 15 * MIB, 512
_log = logging.getLogger(__name__)
CYCLES = int(os.environ.get("VMDK_SERVED_CYCLES", "1"))

# Pass after pass over the areas, each a request of 64 KiB after the other, past the guest's cache.
LOAD = f"""
for t in $(seq 0 {TEMPLATES - 1}); do seq "$((t + 1))000000" 9999999 | head -c {AREA} >/run/template$t; done
cat >/run/passes <<'END'
n=0
while [ ! -e /run/enough ]; do
    n=$((n + 1))
    dd if=/run/template$((n % {TEMPLATES})) of=/dev/vda bs={UNIT} seek=$((n % {AREAS} * {AREA // UNIT})) \\
        oflag=direct conv=notrunc 2>/run/why || {{ echo "guest: pass $n failed: $(cat /run/why)" >/dev/ttyS0; exit 1; }}
    echo "guest: pass $n" >/dev/ttyS0
done
echo $n >/run/done
END
sh /run/passes </dev/null >/dev/null 2>&1 & echo $! >/run/passes.pid
"""
END_LOAD = "touch /run/enough; while kill -0 $(cat /run/passes.pid) 2>/dev/null; do usleep 10000; done; cat /run/done"
MOST_UNTOLD = 8
"""How many passes can have been made of which is not told yet: the serial line is slower than the disk."""

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "apt-get"),
    pytest.mark.usefixtures("linux_is_made"),
    pytest.mark.timeout(300 + 600 * CYCLES),
]


class Told(NamedTuple):
    """What the guest has told to be done."""

    passes: int
    stamps: int


class Frozen(NamedTuple):
    """A frozen link, and what was told of before and after it was frozen."""

    path: Path
    before: Told
    after: Told
    sha256: str


def told(guest: LinuxGuest) -> Told:
    stamps = guest.stamps()
    text = (guest.machine.folder / "serial.log").read_bytes()
    failed = re.search(rb"guest: pass \d+ failed.*", text)
    assert failed is None, failed
    passes = re.findall(rb"guest: pass (\d+)\r?\n", text)
    return Told(int(passes[-1]) if passes else 0, stamps)


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def wait_for_load(guest: LinuxGuest, passes: int = 1, stamps: int = 1) -> None:
    """Return when the guest has told of so much more."""
    seen = told(guest)
    wait_for(lambda: told(guest).passes >= seen.passes + passes and told(guest).stamps >= seen.stamps + stamps)


@functools.cache
def template(number: int) -> bytes:
    first = (number + 1) * 1_000_000
    return b"".join(b"%d\n" % i for i in range(first, first + AREA // 8))


def after_passes(count: int) -> bytes:
    """Return the areas of the disk after so many passes."""
    last = {n % AREAS: template(n % TEMPLATES) for n in range(max(1, count - AREAS + 1), count + 1)}
    return b"".join(last.get(area, bytes(AREA)) for area in range(AREAS))


def is_of_one_instant(data: bytes, before: int, after: int) -> bool:
    """Tell whether the areas are those of one moment between two numbers of passes that were told of.

    They have what was done by then, and nothing else.
    """
    for done in range(before, after + MOST_UNTOLD):
        expected = bytearray(after_passes(done))
        start, new = (done + 1) % AREAS * AREA, template((done + 1) % TEMPLATES)
        for at in range(0, AREA, UNIT):
            if data[start + at : start + at + UNIT] != new[at : at + UNIT]:
                break
            expected[start + at : start + at + UNIT] = new[at : at + UNIT]
        if data[: len(expected)] == expected:
            return True
    return False


def assert_of_one_instant(data: bytes, before: Told, after: Told) -> None:
    """Check passes and stamps of a frozen disk: it has all that was told before, and what it has more is in order."""
    assert is_of_one_instant(data, before.passes, after.passes), f"not of one moment: {before} to {after}"
    stretch = data[STAMPS : STAMPS + SECTORS * 512]
    seen = max((int(number) for number in re.findall(rb"stamp (\d+) ", stretch)), default=0)
    assert seen >= before.stamps
    assert missing_stamps(stretch, seen, STAMPS // 512) == []


def content(path: Path) -> bytes:
    with open_chain(path) as chain:
        return chain.read_at(0, chain.capacity)


def frozen_by(served: Served, guest: LinuxGuest, overlay: Path) -> tuple[Frozen, float]:
    """Take a snapshot while the guest writes, and return what was frozen and for how long the guest was held."""
    before = told(guest)
    report = served.control("snapshot", overlay=str(overlay))
    after = told(guest)
    path = Path(report["frozen"])
    data = content(path)
    assert_of_one_instant(data, before, after)
    return Frozen(path, before, after, hashlib.sha256(data).hexdigest()), float(report["pause_seconds"])


def merged(served: Served) -> int:
    """Wait for the merge, and return the bytes that it copied."""
    wait_for(lambda: served.control("status")["merge"]["state"] != "running")
    merge = served.control("status")["merge"]
    assert merge["state"] == "done", merge
    return int(merge["copied"])


def test_a_linux_writes_through_snapshots_and_deletes(scratch: Path) -> None:
    chance = random.Random(CYCLES)
    top = scratch / "t0.vmdk"
    create_image(top, SIZE)
    drive = f"file.driver=nbd,file.server.type=unix,file.server.path={scratch}/s"
    links: list[Frozen] = []
    pauses: list[float] = []
    copied = deleted = 0
    started = time.monotonic()
    with serving(top, scratch) as served:
        with boot_linux(top, image_format="raw", writable=True, drive=drive, log_dir=scratch / "log") as guest:
            guest.check(LOAD)
            guest.start_load(offset=STAMPS, sectors=SECTORS)
            for number in range(1, 5 * CYCLES + 1):
                wait_for_load(guest, passes=min(CYCLES, 5))
                top = scratch / f"t{number}.vmdk"
                link, pause = frozen_by(served, guest, top)
                links.append(link)
                pauses.append(pause)
                if number % 5:
                    gone = links.pop(chance.randrange(len(links)))
                    served.control("merge", delete=str(gone.path))
                    copied, deleted = copied + merged(served), deleted + 1
                    assert not gone.path.exists()
            wait_for_load(guest)
            passes = int(guest.check(END_LOAD))
            end = Told(passes, guest.stop_load())
            guest.power_off()
        status = served.control("status")
        assert status["chain"] == [str(path) for path in (top, *(link.path for link in reversed(links)))]
        assert not status["statistics"]["failures"]
    counts = status["statistics"]
    _log.info("%d snapshots, %d deletes in %.0f seconds", len(pauses), deleted, time.monotonic() - started)
    _log.info("%s; %s; %.0f MiB merged", end, counts, copied / MIB)
    _log.info("pauses: %s ms", [round(pause * 1000, 2) for pause in sorted(pauses)])
    assert len(links) == CYCLES
    assert_right_offline(top, links, end)
    assert_right_inside(top, end)


def assert_right_offline(top: Path, links: list[Frozen], end: Told) -> None:
    """Check every image that is left, and compare what engine and QEMU read with what was written."""
    report = check_image(top, whole_chain=True)
    assert not report.findings, [str(finding) for finding in report.findings]
    for link in links:
        data = content(link.path)
        assert hashlib.sha256(data).hexdigest() == link.sha256
        assert data == qemu_content(link.path)
        assert_of_one_instant(data, link.before, link.after)
    data = content(top)
    assert data[: AREAS * AREA] == after_passes(end.passes)
    assert_of_one_instant(data, end, end)
    for path in (top, *(link.path for link in links)):
        assert "No errors" in qemu_img("check", "-f", "vmdk", path)
    raw = top.with_suffix(".raw")
    raw.write_bytes(data)
    qemu_img("compare", "-f", "vmdk", "-F", "raw", top, raw)


def assert_right_inside(top: Path, end: Told) -> None:
    """Boot afresh on the chain, by QEMU's own vmdk driver, and let the guest look."""
    with boot_linux(top) as guest:
        seen = guest.check(f"dd if=/dev/vda bs={MIB} count={AREAS * AREA // MIB} 2>/dev/null | sha256sum").split()[0]
        assert seen == hashlib.sha256(after_passes(end.passes)).hexdigest()
        assert missing_stamps(guest.read(STAMPS, SECTORS * 512), end.stamps, STAMPS // 512) == []
        guest.power_off()
