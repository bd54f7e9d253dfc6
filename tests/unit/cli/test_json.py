"""Is the JSON of every command what docs/json.schema.json says?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qemu_vmdk_snap import create_image, create_overlay, errors, open_chain
from qemu_vmdk_snap.cli import exit_status
from qemu_vmdk_snap.cli.commands import COMMANDS, TOP_LEVEL
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.cli.ui import Ui
from qemu_vmdk_snap.domain.delete.prune import Decision, PruneReport
from qemu_vmdk_snap.domain.delete.run import DeleteReport
from tests.support.schemas import DOCUMENT, check, document

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with base.vmdk, top.vmdk on it with data, a copy of base (other.vmdk), and disk.raw."""
    monkeypatch.chdir(tmp_path)
    create_image("base.vmdk", 4 * MIB, durable=False)
    with open_chain("base.vmdk", writable=True) as image:
        image.write_at(0, b"b" * 70000)
    Path("other.vmdk").write_bytes(Path("base.vmdk").read_bytes())
    create_overlay("top.vmdk", "base.vmdk", durable=False)
    with open_chain("top.vmdk", writable=True) as image:
        image.write_at(MIB, b"t" * 70000)
    Path("disk.raw").write_bytes(bytes(2 * MIB))
    return tmp_path


IMAGE_COMMANDS = [
    "image create new.vmdk 1M",
    "image create -q new.vmdk 1M",
    "image create -b top.vmdk new.vmdk",
    "image info top.vmdk",
    "image info --backing-chain top.vmdk",
    "image info -f raw disk.raw",
    "image check top.vmdk",
    "image check -r all top.vmdk",
    "image map top.vmdk",
    "image map -f raw disk.raw",
    "image compare top.vmdk base.vmdk",
    "image compare -s base.vmdk other.vmdk",
    "image compare -F raw base.vmdk disk.raw",
    "image convert top.vmdk new.vmdk",
    "image commit top.vmdk",
    "image commit -d top.vmdk",
    "image rebase -b other.vmdk top.vmdk",
    "image rebase -b  top.vmdk",
    "image resize top.vmdk +1M",
    "image measure top.vmdk",
    "image measure --size 1M",
    "image compact top.vmdk",
    "image diff base.vmdk top.vmdk",
    "image diff -d delta.vmdk base.vmdk top.vmdk",
    "image remove base.vmdk",
    "recover .",
    "completion fish",
    "manual man",
    "hook install --dir {tmp}/hooks --policies {tmp}/policies",
    "hook status --dir {tmp}/hooks --policies {tmp}/policies",
    "hook uninstall --dir {tmp}/hooks",
]


@pytest.mark.parametrize("line", IMAGE_COMMANDS)
def test_the_answer_is_as_documented(line: str, chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.format(tmp=chain).split(" ")
    name = next(name for name in document()["$defs"] if f"{line} ".startswith(f"{name} "))
    assert main([*words, "--output=json"]) in (0, 1)
    check(name, capsys.readouterr().out)


def test_apply_is_as_documented(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "diff", "-d", "delta.vmdk", "base.vmdk", "top.vmdk"]) == 0
    capsys.readouterr()
    assert main(["image", "apply", "delta.vmdk", "other.vmdk", "--output=json"]) == 0
    check("image apply", capsys.readouterr().out)


def test_every_command_has_a_schema() -> None:
    commands = {f"{group} {name}" for group, table in COMMANDS.items() for name in table} | set(TOP_LEVEL)
    assert commands <= set(document()["$defs"])


def keys(schema: object) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(keys, schema))
    if not isinstance(schema, dict):
        return set()
    return set(schema.get("properties", {})) | set().union(*map(keys, schema.values()))


def test_what_failed_of_several_is_in_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.DomainError("web", "its snapshot 's1' has memory")
    failed = (("s1", error),)
    check("snapshot delete", json.dumps(DeleteReport("web", (), None, failed=failed).as_dict()))
    report = PruneReport("web", (Decision("s1", 1, ()),), (), None, failed=failed)
    ui = Ui(json_output=True)
    ui.json(report.as_dict())
    ui.error(error, error, 69)  # the status of the command; its answer stays one JSON value
    printed = capsys.readouterr()
    assert check("snapshot prune", printed.out)["failed"] == [{"snapshot": "s1", "reason": str(error)}]
    assert printed.err == f"qemu-vmdk-snap: {error}\n"


def test_keys_are_lower_case_with_dashes() -> None:
    assert {key for key in keys(document()["$defs"]) if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key)} == set()


def test_the_map_names_the_files(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "map", "top.vmdk", "--output=json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    found = [(row["depth"], Path(row.get("filename", "-")).name) for row in rows]
    assert found == [(1, "base.vmdk"), (1, "-"), (0, "top.vmdk"), (1, "-")]


def test_cids_are_alike(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for words in (["create", "-b", "top.vmdk", "new.vmdk"], ["info", "new.vmdk"], ["diff", "top.vmdk", "new.vmdk"]):
        assert main(["image", *words, "--output=json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        data = answer.get("format-specific", {}).get("data", {})
        found.append((answer.get("cid") or data.get("cid") or answer["top-cid"], data.get("parent-cid")))
    assert len({cid for cid, _ in found}) == 1
    assert all(isinstance(cid, int) for cid in (found[0][0], found[1][1]))  # as in qemu-img's


@pytest.mark.parametrize(
    ("line", "status", "code", "about"),
    [
        ("image info nothing.vmdk", 74, "system", {"path": "nothing.vmdk", "errno": 2}),
        ("image info disk.raw", 65, "format", {"path": "disk.raw", "offset": 0, "field": "magic"}),
        ("image compare nothing.vmdk top.vmdk", 2, "system", {"path": "nothing.vmdk"}),
        ("image check nothing.vmdk", 1, "system", {"path": "nothing.vmdk"}),
        ("image info -f qcow2 top.vmdk", 63, "unsupported", {"path": "top.vmdk"}),
        ("image resize top.vmdk 1M", 64, "invalid-request", {}),
        ("image remove top.vmdk extra", 64, "usage", {}),
        ("image nothing", 64, "usage", {}),
        ("nothing", 64, "usage", {}),
        ("image commit held.vmdk", 75, "locked", {"path": "held.vmdk"}),
    ],
)
def test_an_error_is_an_object_and_still_a_line(
    line: str, status: int, code: str, about: dict[str, object], chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_overlay("held.vmdk", "base.vmdk", durable=False)
    with open_chain("held.vmdk", writable=True):
        try:
            found = main([*line.split(), "--output=json"])
        except SystemExit as stop:
            found = int(str(stop.code))
    printed = capsys.readouterr()
    error = check("error", printed.out)["error"]
    assert (found, error["exit-status"], error["code"]) == (status, status, code)
    assert printed.err.count("\n") == 1
    assert error["message"] in printed.err
    for key, value in about.items():
        assert (Path(str(error[key])).name if key == "path" else error[key]) == value


def test_a_stream_that_has_begun_gets_no_object(chain: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["image", "convert", "--output=json", "-O", "raw", "nothing.vmdk", "-"]) == 74
    assert capfdbinary.readouterr().out == b""


def test_no_json_without_asking(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "info", "nothing.vmdk"]) == 74
    assert capsys.readouterr().out == ""


def test_codes_are_documented_and_frozen() -> None:
    ours = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.VmdkSnapError)]
    codes = {cls.code for cls in ours} | {"system", "usage", "cancelled"}
    assert codes == set(document()["$defs"]["error"]["properties"]["error"]["properties"]["code"]["enum"])
    rows = re.findall(r"^\| `([a-z-]+)` \|.*\| ([\d, ]+) \|$", (DOCUMENT.parent / "json.md").read_text(), re.MULTILINE)
    statuses = {code: {int(one) for one in text.split(", ")} for code, text in rows}
    assert set(statuses) == codes
    for cls in ours:
        assert exit_status.status_of(cls.__new__(cls)) in statuses[cls.code], cls
