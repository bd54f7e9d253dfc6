"""The check names every planted fault by file, byte and value, and finds nothing in an image that is whole."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import ImageOptions, create_image, create_overlay, open_chain
from qemu_vmdk_snap.chain.resolver import confined
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.errors import FormatError, LockBusy
from qemu_vmdk_snap.ops.check.check import CheckReport, check_image
from qemu_vmdk_snap.ops.check.findings import LISTED, Severity
from qemu_vmdk_snap.ops.copy.convert import convert
from qemu_vmdk_snap.ops.progress import Progress
from qemu_vmdk_snap.vmdk.runs import COMPRESSED
from qemu_vmdk_snap.vmdk.sparse.header import SparseExtentHeader

MIB = 1 << 20
GRAIN = 65536
SIZE = 64 * MIB  # two grain tables


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.vmdk"
    create_image(path, SIZE, durable=False)
    with open_chain(path, writable=True) as chain:
        for grain in (0, 1, 2, 600):
            chain.write_at(grain * GRAIN, bytes([grain % 251 + 1]) * GRAIN)
    return path


def check(path: Path, *, whole_chain: bool = False) -> CheckReport:
    return check_image(path, resolver=confined(), whole_chain=whole_chain)


def header_of(path: Path) -> SparseExtentHeader:
    return SparseExtentHeader.parse(path.read_bytes()[:512], path=path)


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def entry_at(path: Path, grain: int, *, redundant: bool = False) -> int:
    """Return the byte of the file where the entry of `grain` is."""
    header = header_of(path)
    gd = (header.rgd_offset if redundant else header.gd_offset) * 512
    table, index = divmod(grain, header.gtes_per_gt)
    gde = struct.unpack_from("<I", path.read_bytes(), gd + 4 * table)[0]
    return int(gde) * 512 + 4 * index


def set_entry(path: Path, grain: int, sector: int) -> int:
    for redundant in (True, False):
        put(path, entry_at(path, grain, redundant=redundant), struct.pack("<I", sector))
    return entry_at(path, grain)


def get_entry(path: Path, grain: int) -> int:
    return int(struct.unpack_from("<I", path.read_bytes(), entry_at(path, grain))[0])


def texts(report: CheckReport) -> list[str]:
    return [str(finding) for finding in report.findings]


def test_whole_image(image: Path) -> None:
    report = check(image)
    assert (report.corruptions, report.leaks, report.findings) == (0, 0, ())
    assert (report.total, report.allocated, report.fragmented, report.depth) == (1024, 4, 0, 1)
    assert report.end == image.stat().st_size


def test_entry_beyond_the_end(image: Path) -> None:
    at = set_entry(image, 5, 1 << 24)
    report = check(image)
    rule = f"must place grain 5 inside the file of {image.stat().st_size} bytes"
    assert texts(report) == [f"{image}: byte {at:#x}: grain table entry = 16777216: {rule}"]
    assert report.corruptions == 1


def test_a_file_that_was_cut_short(image: Path) -> None:
    """As by a copy that broke off. (QEMU's check looks where grains begin, and its driver reads zeros for the rest.)"""
    size = image.stat().st_size - 1000
    os.truncate(image, size)
    report = check(image)
    assert report.corruptions == 1
    assert texts(report)[0].endswith(f"inside the file of {size} bytes, whole")


def test_a_last_grain_may_end_with_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "short.vmdk"
    create_image(path, (1 << 20) + 1024, durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(1 << 20, b"x" * 1024)
    os.truncate(path, path.stat().st_size - 65536 + 1024)
    assert texts(check(path)) == []
    os.truncate(path, path.stat().st_size - 512)
    assert check(path).corruptions == 1


@pytest.mark.parametrize("sector", [1, 21, 26])
def test_entry_into_the_metadata(image: Path, sector: int) -> None:
    at = set_entry(image, 5, sector)
    report = check(image)
    expected = f"{image}: byte {at:#x}: grain table entry = {sector}: must place grain 5 outside the metadata"
    assert texts(report) == [expected]


@pytest.mark.parametrize("shift", [0, 64])
def test_shared_grain(image: Path, shift: int) -> None:
    shared = get_entry(image, 1) + shift
    at = set_entry(image, 5, shared)
    report = check(image)
    rule = "must not share the place of grain 5 in the file with another entry"
    assert f"{image}: byte {at:#x}: shared grain table entry = {shared}: {rule}" in texts(report)
    named = {finding.offset for finding in report.findings}
    assert entry_at(image, 1) in named
    assert report.corruptions == (1 if shift == 0 else 2)  # half a grain on, it lies over two others


def test_copies_that_differ(image: Path) -> None:
    at = entry_at(image, 600, redundant=True)
    good = get_entry(image, 600)
    put(image, at, struct.pack("<I", get_entry(image, 1)))
    report = check(image)
    rule = f"must equal the primary entry {good} of grain 600"
    expected = f"{image}: byte {at:#x}: redundant grain table entry = {get_entry(image, 1)}: {rule}"
    assert texts(report) == [expected]
    assert (report.corruptions, report.leaks) == (1, 0)


@pytest.mark.parametrize("redundant", [False, True], ids=["primary", "redundant"])
def test_an_entry_that_one_copy_lacks_is_a_note(
    image: Path, redundant: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a power cut between the two copies leaves it: by QEMU or by our engine."""
    at = entry_at(image, 600, redundant=redundant)
    good = get_entry(image, 600)
    put(image, at, bytes(4))
    report = check(image)
    name, other = ("redundant grain table entry", "primary") if redundant else ("grain table entry", "redundant")
    why = "a writer was interrupted between the two copies, and the next one adds it"
    rule = f"must equal the {other} entry {good} of grain 600: {why}"
    assert texts(report) == [f"{image}: byte {at:#x}: {name} = 0: {rule}"]
    assert (report.corruptions, report.leaks, report.repairable, report.allocated) == (0, 0, 1, 4)
    assert main(["image", "check", "-q", str(image)]) == 0
    capsys.readouterr()
    assert main(["image", "check", "-r", "all", str(image)]) == 0
    assert "    0 corruptions\n    1 values that an interrupted writer left" in capsys.readouterr().out
    assert check(image).findings == ()
    assert get_entry(image, 600) == good


def test_a_primary_table_of_zeros_is_a_note(image: Path) -> None:
    whole = image.read_bytes()
    put(image, entry_at(image, 0), bytes(2048))
    report = check(image)
    assert (report.corruptions, report.leaks, report.repairable, report.allocated) == (0, 0, 3, 4)
    assert main(["image", "check", "-q", "-r", "all", str(image)]) == 0
    assert image.read_bytes() == whole


@pytest.mark.parametrize(("field", "at"), [("gd_offset", 56), ("rgd_offset", 48)])
def test_a_directory_outside_the_file_leaves_the_other_to_look_at(
    image: Path, field: str, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    put(image, at, struct.pack("<Q", 1 << 40))
    report = check(image)
    first = texts(report)[0]
    assert f"byte {at:#x}: {field} = {1 << 40}: must leave 1 sectors inside the file" in first
    assert (report.corruptions, report.allocated) == (1, 4)
    assert main(["image", "check", str(image)]) == 2
    assert main(["image", "check", "-r", "all", str(image)]) == 0
    assert check(image).findings == ()
    put(image, 48, struct.pack("<QQ", 1 << 40, 1 << 40))
    before = image.read_bytes()
    assert main(["image", "check", "-r", "all", str(image)]) == 1
    assert image.read_bytes() == before
    assert f"gd_offset = {1 << 40}" in capsys.readouterr().err


def test_directory_entry_zero(image: Path) -> None:
    header = header_of(image)
    put(image, header.gd_offset * 512 + 4, bytes(4))
    put(image, header.rgd_offset * 512 + 4, bytes(4))
    report = check(image)
    rule = "must name a grain table: QEMU overwrites the header when it writes through an entry of 0"
    at = header.gd_offset * 512 + 4
    assert f"{image}: byte {at:#x}: grain directory entry 1 = 0: {rule}" in texts(report)
    assert (report.corruptions, report.leaks) == (2, 1)  # in both directories; grain 600 is lost


def test_directory_entry_beyond_the_end(image: Path) -> None:
    header = header_of(image)
    at = header.gd_offset * 512
    put(image, at, struct.pack("<I", 0xFFFF_FFF0))
    report = check(image)
    rule = f"must place the grain table inside the file of {image.stat().st_size} bytes"
    assert f"{image}: byte {at:#x}: grain directory entry 0 = 4294967280: {rule}" in texts(report)


def test_two_directory_entries_with_one_table(image: Path) -> None:
    header = header_of(image)
    raw = image.read_bytes()
    gd = header.gd_offset * 512
    put(image, gd + 4, raw[gd : gd + 4])
    fields = [finding.field for finding in check(image).findings]
    assert "grain table" in fields


def test_leak_is_no_corruption(image: Path) -> None:
    sector = get_entry(image, 600)
    set_entry(image, 600, 0)
    report = check(image)
    assert (report.corruptions, report.leaks, report.allocated) == (0, 1, 3)
    assert texts(report) == [f"{image}: byte {sector * 512:#x}: grain = {sector}: must be named by a grain table entry"]
    assert main(["image", "check", "-q", str(image)]) == 3


def test_unclean_shutdown(image: Path) -> None:
    put(image, 72, b"\1")
    assert texts(check(image)) == [
        f"{image}: byte 0x48: unclean_shutdown = 1: must be 0: a writer did not close the image"
    ]


def test_newline_test(image: Path) -> None:
    put(image, 73, b"\n \n\n")
    report = check(image)
    rule = "must be b'\\n \\r\\n': the file was damaged by a text-mode transfer"
    assert texts(report) == [f"{image}: byte 0x49: newline_probe = b'\\n \\n\\n': {rule}"]
    assert report.allocated == 4, "the tables are looked at all the same"


def test_header_against_descriptor(image: Path) -> None:
    raw = image.read_bytes()
    at = raw.index(b"131072 SPARSE")
    put(image, at, b"131071 SPARSE")
    report = check(image)
    rule = "must be the 131071 sectors that the descriptor gives the extent"
    assert texts(report) == [f"{image}: byte 0xc: capacity = 131072: {rule}"]


def test_long_content_id_out_of_step_is_not_worth_a_line(image: Path) -> None:
    raw = image.read_bytes()
    at = raw.index(b"\nCID=") + 5
    put(image, at, b"0badcafe")
    assert check(image).findings == ()


@pytest.fixture
def overlay(image: Path) -> Path:
    path = image.with_name("overlay.vmdk")
    create_overlay(path, image, durable=False)
    return path


def test_parent_written_after_the_overlay(image: Path, overlay: Path) -> None:
    before = header_of(overlay)
    assert before.capacity * 512 == SIZE
    assert check(overlay).depth == 2
    with open_chain(image, writable=True) as chain:
        chain.write_at(0, b"x")
        cid = chain.links[0].cid
    report = check(overlay)
    assert report.corruptions == 1
    [finding] = report.findings
    assert finding.path == overlay
    assert finding.field == "parentCID"
    rule = f"must be the CID {cid:08x} of {image}: the parent was modified after the overlay was made"
    assert finding.rule == f"{rule} (`image check -r all --relink-cids` trusts it as it is)"


def test_parent_that_is_gone(image: Path, overlay: Path) -> None:
    image.unlink()
    report = check(overlay)
    [finding] = report.findings
    assert (finding.field, finding.value) == ("parentFileNameHint", "disk.vmdk")
    assert finding.rule == "must name an image that may be opened: its parent 'disk.vmdk' does not exist"


def test_loop(image: Path, overlay: Path) -> None:
    raw = image.read_bytes()
    cid = overlay.read_bytes()
    at = cid.index(b"\nCID=") + 5
    own = raw.index(b"parentCID=") + 10
    put(image, own, cid[at : at + 8])
    kind = raw.index(b'createType="monolithicSparse"\n')
    put(image, kind, b'createType="x"\nparentFileNameHint="overlay.vmdk"\n'.ljust(29, b"\n"))
    report = check(overlay)
    assert "must not lead to a link of the chain again" in [finding.rule for finding in report.findings]


def test_capacities_that_differ(image: Path, tmp_path: Path) -> None:
    larger = tmp_path / "larger.vmdk"
    create_overlay(larger, image, size=SIZE + GRAIN, durable=False)
    report = check(larger)
    assert [(finding.severity, finding.field) for finding in report.findings] == [(Severity.NOTE, "capacity")]
    raw = larger.read_bytes()
    put(larger, raw.index(b"131200 SPARSE"), b"131000 SPARSE")
    put(larger, 12, struct.pack("<Q", 131000))
    found = check(larger).findings
    assert [(finding.severity, finding.field) for finding in found] == [(Severity.ERROR, "capacity")]
    assert main(["image", "check", "-q", str(larger)]) == 1


def test_tables_of_a_parent_only_when_asked(image: Path, overlay: Path) -> None:
    set_entry(image, 5, 1 << 24)
    assert check(overlay).corruptions == 0
    report = check(overlay, whole_chain=True)
    assert report.corruptions == 1
    assert report.findings[0].path == image


def test_compressed_grains(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "stream.vmdk"
    with open_chain(image) as chain:
        convert(chain, path, options=ImageOptions(subformat="streamOptimized"), durable=False)
    report = check(path)
    assert (report.findings, report.allocated, report.compressed) == ((), 4, 4)
    with open_chain(path) as chain:
        first, second = (row.file_offset for row in chain.rows() if row.kind == COMPRESSED and row.offset <= GRAIN)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<Q", raw, first, 77)
    raw[second + 20 : second + 24] = b"\xff" * 4
    path.write_bytes(raw)
    report = check(path)
    rule = "must be sector 0, whose grain table entry leads here"
    assert f"{path}: byte {first:#x}: sector of the compressed grain = 77: {rule}" in texts(report)
    assert report.corruptions == 2


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """Return the extent of a COWD disk with two grains stored, sectors 0 and 1."""
    path = tmp_path / "delta.vmdk"
    create_image(path, SIZE, options=ImageOptions(subformat="vmfsSparse"), durable=False)
    with open_chain(path, writable=True) as chain:
        chain.write_at(0, b"x" * 1024)
    report = check(path)
    assert (report.findings, report.allocated) == ((), 2)
    return tmp_path / "delta-delta.vmdk"


def cowd_entry(extent: Path, grain: int) -> tuple[int, int]:
    """Return where the entry of a grain of the first table is, and what it says."""
    raw = extent.read_bytes()
    at = struct.unpack_from("<I", raw, 4 * 512)[0] * 512 + 4 * grain
    return at, struct.unpack_from("<I", raw, at)[0]


def test_a_cowd_grain_with_two_entries(delta: Path) -> None:
    _, shared = cowd_entry(delta, 0)
    at, _ = cowd_entry(delta, 10)
    put(delta, at, struct.pack("<I", shared))
    rule = "must not share the place of grain 10 in the file with another entry"
    report = check(delta.with_name("delta.vmdk"))
    assert f"{delta}: byte {at:#x}: shared grain table entry = {shared}: {rule}" in texts(report)
    assert (report.corruptions, report.leaks) == (1, 0)


@pytest.mark.parametrize(
    ("sector", "where"), [(1, "outside the metadata"), (5, "outside the metadata"), (1 << 24, None)]
)
def test_a_cowd_entry_that_leads_nowhere(delta: Path, sector: int, where: str | None) -> None:
    at, _ = cowd_entry(delta, 10)
    put(delta, at, struct.pack("<I", sector))
    rule = f"must place grain 10 {where or f'inside the file of {delta.stat().st_size} bytes'}"
    report = check(delta.with_name("delta.vmdk"))
    assert texts(report) == [f"{delta}: byte {at:#x}: grain table entry = {sector}: {rule}"]


def test_a_cowd_grain_that_nothing_names(delta: Path) -> None:
    at, sector = cowd_entry(delta, 1)
    put(delta, at, bytes(4))
    with delta.open("ab") as file:
        file.write(bytes(1 << 20))  # ESXi makes the file longer ahead of its need: nothing is lost there
    report = check(delta.with_name("delta.vmdk"))
    rule = "must be named by a grain table entry"
    assert texts(report) == [f"{delta}: byte {sector * 512:#x}: grain = {sector}: {rule}"]
    assert (report.corruptions, report.leaks) == (0, 1)


def test_a_cowd_table_that_is_not_there_yet(delta: Path) -> None:
    put(delta, 4 * 512 + 4, bytes(4))
    report = check(delta.with_name("delta.vmdk"))
    assert report.corruptions == 0


def test_many_findings_are_counted_and_a_few_listed(image: Path) -> None:
    for grain in range(100, 100 + 2 * LISTED):
        set_entry(image, grain, 1 << 24)
    report = check(image)
    assert report.corruptions == 2 * LISTED
    assert len(report.findings) == LISTED


def test_what_is_no_vmdk(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(4096))
    with pytest.raises(FormatError) as caught:
        check(path)
    assert str(caught.value) == (
        f"{path}: byte 0x0: magic = b'\\x00\\x00\\x00\\x00': must be b'KDMV', or the text '# Disk DescriptorFile'"
    )
    assert main(["image", "check", str(path)]) == 1


def test_nothing_is_written_and_writers_are_refused(image: Path) -> None:
    put(image, 72, b"\1")
    before = image.read_bytes()
    check(image)
    assert image.read_bytes() == before
    with open_chain(image, writable=True), pytest.raises(LockBusy):
        check(image)


def test_progress_reaches_the_end_and_can_cancel(image: Path) -> None:
    steps: list[Progress] = []
    check_image(image, resolver=confined(), on_progress=steps.append)
    assert steps[-1] == Progress("check", SIZE, SIZE)

    class Cancelled(Exception):
        pass

    def cancel(_: Progress) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        check_image(image, resolver=confined(), on_progress=cancel)
    with open_chain(image, writable=True):
        pass  # the locks went with the check


@pytest.mark.parametrize(
    ("break_it", "status"),
    [(lambda path: None, 0), (lambda path: put(path, 72, b"\1"), 2)],
    ids=["whole", "broken"],
)
def test_json(image: Path, capsys: pytest.CaptureFixture[str], break_it: Callable[[Path], None], status: int) -> None:
    break_it(image)
    assert main(["image", "check", "--output=json", str(image)]) == status
    answer = json.loads(capsys.readouterr().out)
    assert answer["filename"] == str(image)
    assert answer["format"] == "vmdk"
    assert answer["check-errors"] == 0
    assert answer["image-end-offset"] == image.stat().st_size
    assert answer.get("corruptions", 0) == len(answer["findings"]) == (1 if status else 0)
