"""The rules for all tests, seen at work: a pytest of its own on a small folder with a copy of tests/conftest.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[2] / "conftest.py"

NEEDS = """
import pytest

@pytest.mark.needs("no-such-tool")
def test_missing(): pass

@pytest.mark.needs("sh")
def test_there(): pass
"""


def run_pytest(folder: Path, tests: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = needs\naddopts = --import-mode=importlib\n")
    for name, text in tests.items():
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copy(CONFTEST, folder / "tests")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *options, "tests"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "QEMU_VMDK_SNAP_TEST_PATIENCE": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_a_quick_run_leaves_out_what_takes_long(tmp_path: Path) -> None:
    tests = {"unit/test_a.py": "def test_a(): pass", "crash/test_b.py": "def test_b(): pass"}
    done = run_pytest(tmp_path, tests, "--quick")
    assert "1 passed, 1 deselected" in done.stdout
    assert "2 passed" in run_pytest(tmp_path, tests).stdout


def test_the_quick_selection_names_tests_that_exist_of_every_folder() -> None:
    text = CONFTEST.read_text()
    names = re.findall(r'"(.+)",\n', text[text.index("QUICK: Final") : text.index("What `--quick` runs")])
    assert len(names) > 5
    for name in names:
        file, _, test = name.partition("::")
        assert (CONFTEST.parent / file).exists()
        assert test.partition("[")[0] in (CONFTEST.parent / file).read_text() if test else True
    folders = {path.name for path in CONFTEST.parent.iterdir() if path.is_dir() and any(path.rglob("test_*.py"))}
    assert {name.partition("/")[0] for name in names} == folders


def test_a_missing_tool_skips_with_its_reason(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, {"unit/test_needs.py": NEEDS})
    assert done.returncode == 0, done.stdout
    assert "no-such-tool is not installed" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout


@pytest.mark.parametrize("tools", ["all", "qemu-img,no-such-tool"])
def test_a_required_tool_that_is_missing_fails(tmp_path: Path, tools: str) -> None:
    done = run_pytest(tmp_path, {"unit/test_needs.py": NEEDS}, f"--require={tools}")
    assert done.returncode == 1
    assert "required: no-such-tool is not installed" in done.stdout
    assert "1 passed, 1 error" in done.stdout


def test_quick_folders_run_first(tmp_path: Path) -> None:
    folders = ("domain", "e2e", "oracle", "property", "unit")
    done = run_pytest(tmp_path, {f"{name}/test_{name}.py": f"def test_{name}(): pass\n" for name in folders})
    ran = [line.rsplit("test_", 1)[1] for line in done.stdout.splitlines() if line.startswith("PASSED")]
    assert ran == ["unit", "property", "oracle", "domain", "e2e"]


def test_a_process_left_running_is_killed_and_fails_the_run(tmp_path: Path) -> None:
    leak = "import subprocess\ndef test_leak(): print('left', subprocess.Popen(['setsid', 'sleep', '300']).pid)\n"
    done = run_pytest(tmp_path, {"unit/test_leak.py": leak})
    assert done.returncode == 1
    assert "processes left running, now killed" in done.stdout
    assert "1 passed, 1 error" in done.stdout
    pid = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("left "))
    deadline = time.monotonic() + 60
    while "sleep" in _command_of(pid):  # SIGKILL was sent; the end comes when the kernel gets to it
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
