"""Are qemu-img's habits kept: its order of words, its targets, its options, and its names?"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, create_overlay, open_chain
from qemu_vmdk_snap.cli.main import main
from tests.support.qemu import content, qemu_content, qemu_img, qemu_io

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

MIB = 1 << 20


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def raw(here: Path) -> Path:
    path = here / "disk.raw"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
        file.seek(MIB)
        file.write(b"a" * 70_000)
        file.seek(3 * MIB)
        file.write(bytes(300_000) + b"z" * 512)
    return path


def image(*words: str | Path) -> int:
    try:
        return main(["image", *map(str, words)])
    except SystemExit as stop:
        return int(str(stop.code))


def status(*words: str | Path) -> int:
    return subprocess.run(["qemu-img", *map(str, words)], capture_output=True, check=False).returncode


@pytest.mark.parametrize(
    "words",
    [
        ["create", "-q", "x.vmdk", "-f", "vmdk", "1M"],
        ["create", "x.vmdk", "1M", "-qf", "vmdk"],
        ["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "x.vmdk", "-F", "vmdk", "2M"],
        ["info", "base.vmdk", "-U", "--output=json"],
        ["commit", "over.vmdk", "-q", "-fvmdk", "-b", "base.vmdk"],
        ["convert", "base.vmdk", "-O", "raw", "y.raw", "-S", "0x1000"],
        ["create", "-q", "-fvmdk", "--", "x.vmdk", "1M"],
        ["convert", "-O", "raw", "base.vmdk", "base.vmdk", "y.raw"],
    ],
)
def test_words_in_any_order(here: Path, words: list[str]) -> None:
    """Each is taken by both."""
    for run in (status, image):
        create_image(here / "base.vmdk", MIB)
        create_overlay(here / "over.vmdk", here / "base.vmdk")
        assert run(*words) == 0
        for path in here.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info", "a.vmdk", "--colour", "red"], "image info: no option '--colour'"),
        (["info", "-Z", "red", "a.vmdk"], "image info: no option '-Z'"),
        (["info", "-UqZ", "a.vmdk"], "image info: no option '-Z' (in '-UqZ')"),
        (["create", "a.vmdk", "-b"], "image create: option '-b' needs a value"),
        (["info", "--force-share=yes", "a.vmdk"], "image info: option '--force-share' takes no value"),
        (["convert", "-t", "fast", "a", "b"], "argument -t/--cache: invalid choice: 'fast'"),
        (["convert", "-m", "17", "a", "b"], "argument -m/--coroutines: '17' must be from 1 to 16"),
        (["convert", "-S", "1000", "a", "b"], "argument -S/--sparse-size: '1000' must be a multiple of 512"),
        (["convert", "-r", "0", "a", "b"], "must be more than 0 bytes a second"),
        (["convert", "-C", "-S", "4k", "a", "b"], "-C: cannot go with -S"),
        (["convert", "--target-is-zero", "a", "b"], "--target-is-zero: needs -n"),
        (["convert", "-n", "-o", "subformat=vmfs", "a", "b"], "-o: has no effect with -n"),
        (["convert", "-B", "c", "a", "a", "b"], "-B: makes no sense with several images"),
        (["convert", "a"], "image convert: needs an image and the name of the new one"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert image(*words) == 64
    assert said in capsys.readouterr().err
    assert status(*words) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "-O", "qcow2", "a.vmdk", "b"], "(qemu-img convert -O qcow2 makes it)"),
        (["convert", "-l", "one", "a.vmdk", "b"], "no internal snapshots"),
        (["convert", "-s", "one", "a.vmdk", "b"], "no internal snapshots"),
        (["convert", "-c", "-o", "subformat=vmfs", "a.vmdk", "b"], "only streamOptimized images are compressed"),
        (["convert", "-o", "preallocation=full", "a.vmdk", "b"], "only raw images have it"),
        (["rebase", "-U", "-b", "", "a.vmdk"], "-U: an image that another process may be writing is not changed"),
        (["resize", "--preallocation=full", "a.vmdk", "2M"], "is never allocated before use"),
        (["convert", "a.vmdk", "nbd:unix:/b"], "'nbd' is taken for a protocol"),
        (["create", "nbd:b", "1M"], "a file of this name is ./nbd:b"),
        (["create", "odd:b", "1M"], "'odd' is taken for a protocol"),
        (["info", "json:{}"], "'json' is taken for a protocol"),
        (["create", "-b", "nbd:a.vmdk", "b"], "'nbd' is taken for a protocol"),
        (["check", "-f", "raw", "a.vmdk"], "format 'raw' is not supported here"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    here: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    create_image(here / "a.vmdk", MIB)
    before = (here / "a.vmdk").read_bytes()
    assert image(*words) == 63
    assert said in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["a.vmdk"]
    assert (here / "a.vmdk").read_bytes() == before


def test_file_before_a_name_and_a_colon_in_one(here: Path) -> None:
    assert image("create", "-q", "file:a.vmdk", "1M") == 0
    assert image("create", "-q", "-b", "file:a.vmdk", "./odd:b.vmdk") == 0
    assert image("info", "odd:b.vmdk") == 0  # it is there
    assert sorted(path.name for path in here.iterdir()) == ["a.vmdk", "odd:b.vmdk"]
    assert b'Hint="a.vmdk"' in (here / "odd:b.vmdk").read_bytes()
    assert status("info", "./odd:b.vmdk") == 0


def test_an_empty_file_is_taken_and_no_other(here: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, words in enumerate((["-f", "raw"], ["-f", "raw", "-O", "raw"], ["-B", "base.vmdk", "-f", "raw"])):
        target = here / f"t{number}"
        create_image(here / "base.vmdk", 4 * MIB) if number == 2 else None
        target.touch(0o600)
        assert image("convert", *words, raw, target) == 0
        assert target.stat().st_mode & 0o777 == 0o600
        assert (target.read_bytes() if "-O" in words else content(target)) == raw.read_bytes()
        before = target.read_bytes()
        assert image("convert", *words, raw, target) == 74
        assert "File exists (nothing is overwritten; -n writes into" in capsys.readouterr().err
        assert target.read_bytes() == before
    (here / "one").touch()
    (here / "link").symlink_to("one")
    assert image("create", here / "link", "1M") == 74
    (here / "two").hardlink_to(here / "one")
    assert image("create", here / "two", "1M") == 74
    (here / "flat.vmdk").touch()
    (here / "d.vmdk").write_text(
        '# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 8 FLAT "flat.vmdk" 0\n'
    )
    capsys.readouterr()
    assert image("create", here / "flat.vmdk", "1M") == 68
    assert "names it as an extent of its own" in capsys.readouterr().err
    assert not any((here / name).stat().st_size for name in ("one", "flat.vmdk"))


def test_into_an_image_that_is_there(here: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, over = here / "t.vmdk", here / "over.vmdk"
    create_image(target, 5 * MIB)
    qemu_io(target, "write -P 9 0 5M")
    with open_chain(target) as chain:
        cid = chain.links[0].cid
    assert image("convert", "-n", "-f", "raw", raw, target) == 0
    assert content(target) == raw.read_bytes() + b"\x09" * MIB == qemu_content(target)
    with open_chain(target) as chain:
        assert chain.links[0].cid != cid
    assert image("check", target) == 0
    create_overlay(over, target)
    before = target.read_bytes()
    assert image("convert", "-n", "-f", "raw", raw, target) == 68  # the overlay would read something else
    assert target.read_bytes() == before
    assert image("convert", "-n", "-f", "raw", raw, over) == 0
    assert content(over) == raw.read_bytes() + b"\x09" * MIB
    small = here / "small.vmdk"
    create_image(small, 3 * MIB)
    assert image("convert", "-n", "-f", "raw", raw, small) == 64
    assert "its 3145728 bytes cannot take the 4194304 of the input" in capsys.readouterr().err
    with open_chain(small, writable=True):
        assert image("convert", "-n", "-f", "raw", raw, small) == 75
    assert image("convert", "-n", "-f", "raw", raw, here / "missing.vmdk") == 74
    plain = here / "plain"
    plain.write_bytes(b"x" * 5 * MIB)
    assert image("convert", "-n", "-f", "raw", "-O", "raw", raw, plain) == 0
    assert plain.read_bytes() == raw.read_bytes() + b"x" * MIB


@pytest.mark.needs("losetup", "mkfs.ext4")
def test_onto_a_block_device(here: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backing = here / "backing"
    backing.write_bytes(b"x" * 5 * MIB)
    made = subprocess.run(["losetup", "-f", "--show", str(backing)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        assert image("convert", "-f", "raw", "-O", "raw", raw, device) == 74
        assert image("convert", "-n", "-f", "raw", "-O", "raw", raw, device) == 63
        assert "(--allow-devices)" in capsys.readouterr().err
        holder = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount or a volume group has it
        assert image("convert", "-n", "--allow-devices", "-f", "raw", "-O", "raw", raw, device) == 74
        assert "busy" in capsys.readouterr().err
        os.close(holder)
        assert image("convert", "-n", "--allow-devices", "-f", "raw", "-O", "raw", raw, device) == 0
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
    assert backing.read_bytes() == raw.read_bytes() + b"x" * MIB


def test_zeros_are_left_out_and_several_disks_joined(here: Path, raw: Path) -> None:
    assert image("convert", "-f", "raw", "-O", "raw", raw, raw, "ours.raw") == 0
    qemu_img("convert", "-f", "raw", "-O", "raw", raw, raw, "theirs.raw")
    assert Path("ours.raw").read_bytes() == Path("theirs.raw").read_bytes()
    assert abs(Path("ours.raw").stat().st_blocks - Path("theirs.raw").stat().st_blocks) <= 16
    assert image("convert", "-S", "0", "-f", "raw", "-O", "raw", raw, "all.raw") == 0
    assert image("convert", "-c", "-f", "raw", raw, "stream.vmdk") == 0
    assert content(Path("stream.vmdk")) == raw.read_bytes()
    assert b"streamOptimized" in Path("stream.vmdk").read_bytes()[:1024]
    assert image("convert", "-f", "raw", "-O", "raw", "-o", "preallocation=falloc", raw, "set.raw") == 0
    assert Path("set.raw").stat().st_blocks * 512 >= 4 * MIB
    assert Path("set.raw").read_bytes() == raw.read_bytes()


def test_a_name_that_says_something_else_is_warned_of(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert image("convert", "-f", "raw", raw, "copy.raw") == 0
    assert "copy.raw: becomes a vmdk image, whatever its name says" in capsys.readouterr().err
    assert image("convert", "-f", "raw", "-O", "vmdk", raw, "copy2.raw") == 0
    assert capsys.readouterr().err == ""


def test_measured_is_what_is_made(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--size", "1G"], ["-f", "raw", str(raw)]):
        capsys.readouterr()
        assert image("measure", "-O", "raw", *words) == 0
        assert capsys.readouterr().out == qemu_img("measure", "-O", "raw", *words)
    for kind in ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfsSparse"):
        assert image("measure", "-f", "raw", "-o", f"subformat={kind}", raw) == 0
        required = int(capsys.readouterr().out.split()[2])
        assert image("convert", "-S", "0", "-f", "raw", "-o", f"subformat={kind}", raw, "disk.vmdk") == 0
        made = list(Path().glob("disk*.vmdk"))
        assert sum(path.stat().st_size for path in made) == required
        for path in made:
            path.unlink()


def test_shrunk_where_the_end_is_empty(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "a.vmdk"
    create_image(path, 64 << 30)
    qemu_io(path, "write -P 5 1M 1M")
    assert image("resize", path, "-60G") == 64
    assert "(--shrink, where the end is empty)" in capsys.readouterr().err
    assert image("resize", path, "--shrink", "1536k") == 64
    assert "something is stored at 1572864" in capsys.readouterr().err
    create_overlay(here / "over.vmdk", path)
    assert image("resize", "--shrink", path, "4G") == 68
    assert image("resize", "--shrink", here / "over.vmdk", "1M") == 64
    assert "its parent stores data at 1048576" in capsys.readouterr().err
    (here / "over.vmdk").unlink()
    assert image("resize", "-q", "--shrink", path, "-62G") == 0
    for size in (2 << 30, 8 << 30):
        assert image("check", "-q", path) == 0
        assert "No errors" in qemu_img("check", path)
        assert f"({size} bytes)" in qemu_img("info", path)
        with open_chain(path) as chain:
            assert chain.read_at(MIB, MIB) == b"\x05" * MIB
            assert [run.length for run in chain.map() if run.path] == [MIB]
        assert image("resize", "-q", path, "8G") == 0


def test_an_overlay_gets_a_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_image(here / "base.vmdk", MIB)
    (here / "sub").mkdir()
    assert image("create", "-b", "base.vmdk") == 0
    name = capsys.readouterr().out.strip()
    assert len(name) == 36 + len(".vmdk")
    assert "backing file: base.vmdk" in qemu_img("info", name)
    os.chdir(here / "sub")
    assert image("create", "-q", "-b", "../base.vmdk", "--output=json") == 0
    assert len([path for path in here.iterdir() if path.suffix == ".vmdk"]) == 3


def test_names_are_as_long_as_a_file_system_takes_them(here: Path) -> None:
    name = "盘" * 76 + "d.vmdk"  # 234 bytes
    assert image("create", "-q", name, "1M") == 0
    assert image("create", "-q", "-b", name, "多" * 80 + ".vmdk") == 0
    assert image("convert", name, "远" * 80 + ".vmdk") == 0
    assert len(list(here.iterdir())) == 3


NIL = "00000000-0000-0000-0000-000000000000"


def test_what_cannot_be_read_is_salvaged_as_zeros(
    here: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = MIB + 4096, MIB + 4608
    inode, reads, into = raw.stat().st_ino, os.pread, os.preadv

    def fail(fd: int, length: int, offset: int) -> None:
        hit = offset < last and first < offset + length
        if os.fstat(fd).st_ino == inode and hit:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def pread(fd: int, length: int, offset: int) -> bytes:
        fail(fd, length, offset)
        return reads(fd, length, offset)

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        fail(fd, sum(map(len, views)), offset)
        return into(fd, views, offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "preadv", preadv)
    assert image("convert", "--salvage", "-f", "raw", raw, "copy.vmdk") == 0
    assert capsys.readouterr().err.count(f"512 bytes at {first} cannot be read") == 1
    whole = bytearray(raw.read_bytes())
    assert bytes(whole[first:last]) == b"a" * 512
    whole[first:last] = bytes(512)
    assert qemu_content(here / "copy.vmdk") == bytes(whole)


def test_a_raw_image_is_named_for_a_comparison(here: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert image("compare", "-f", "raw", raw, raw) == 2
    assert "-F raw the second)" in capsys.readouterr().err
    assert image("compare", "-f", "raw", "-F", "raw", raw, raw) == 0


def catches(pid: int, number: int) -> bool:
    """Return whether the process has a handler of that signal; see proc_pid_status(5)."""
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


def test_progress_reaches_its_end_and_is_told_when_asked_for(here: Path, raw: Path) -> None:
    words = [sys.executable, "-m", "qemu_vmdk_snap", "image", "convert", "-f", "raw", str(raw)]
    done = subprocess.run([*words, "-p", "copy.vmdk"], capture_output=True, text=True, check=True, cwd=here)
    assert done.stderr.endswith("(100.00/100%) convert \n")
    raw.write_bytes(os.urandom(4 * MIB))
    process = subprocess.Popen([*words, "-r", "1M", "slow.vmdk"], stderr=subprocess.PIPE, text=True, cwd=here)
    while not catches(process.pid, signal.SIGUSR1):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate()
    assert process.returncode == 0
    assert re.fullmatch(r"    \(\d{1,2}\.\d\d/100%\)( convert )?\n", said)


def test_the_uuids_of_virtualbox_are_in_step(here: Path) -> None:
    base, over, top = here / "base.vmdk", here / "over.vmdk", here / "top.vmdk"
    create_image(base, MIB)

    def seen(path: Path, key: str) -> str | None:
        with open_chain(path, lock=False) as chain:
            return chain.links[0].descriptor.get(f"ddb.uuid.{key}")

    def in_step(child: Path, parent: Path) -> None:
        assert seen(child, "parent") == seen(parent, "image") is not None
        assert seen(child, "parentmodification") == seen(parent, "modification") is not None

    first = seen(base, "modification")
    assert first != seen(base, "image") is not None
    assert seen(base, "parent") == seen(base, "parentmodification") == NIL
    create_overlay(over, base)
    create_overlay(top, over)
    in_step(over, base)
    in_step(top, over)
    assert image("commit", "-q", over) == 0
    assert seen(base, "modification") != first
    in_step(over, base)
    assert image("rebase", "-b", base.name, top) == 0
    in_step(top, base)
    assert image("rebase", "-b", "", top) == 0
    assert seen(top, "parent") == seen(top, "parentmodification") == NIL
    assert status("check", top) == 0
    assert image("convert", "-q", str(top), "copy.vmdk") == 0
    assert seen(here / "copy.vmdk", "image") not in (None, seen(top, "image"))


def test_a_base_without_the_uuids_of_virtualbox_is_left_as_it_is(here: Path) -> None:
    base, over = here / "base.vmdk", here / "over.vmdk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", base, "1M"], check=True)
    before = base.read_bytes()
    create_overlay(over, base)
    assert base.read_bytes() == before
    assert b"ddb.uuid." not in over.read_bytes()


def test_comments_make_room_in_a_full_descriptor(here: Path) -> None:
    base, over = here / ("b" * 100 + ".vmdk"), here / "over.vmdk"
    create_image(base, MIB)
    create_overlay(over, base, hint="b")
    raw = over.read_bytes()
    end = raw.index(b"\0", 512)
    full = raw[512:end] + b"# filler\n" * ((20 * 512 - (end - 512)) // 9)
    over.write_bytes(raw[:512] + full + raw[512 + len(full) :])
    assert image("rebase", "-u", "-b", base.name, over) == 0
    with open_chain(over) as chain:
        assert chain.depth == 2
        assert chain.links[0].descriptor.get("ddb.adapterType") == "ide"
    assert base.name in qemu_img("info", over)


def test_a_stream_followed_by_zeros(here: Path, raw: Path) -> None:
    assert image("convert", "-c", "-f", "raw", raw, "s.vmdk") == 0
    for more in (1000, 100_000, 8 * MIB):
        with Path("s.vmdk").open("ab") as file:
            file.truncate(Path("s.vmdk").stat().st_size + more)
        assert content(Path("s.vmdk")) == raw.read_bytes()
        assert image("check", "-q", "s.vmdk") == 0
