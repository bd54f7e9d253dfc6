"""Do the example project and the guide for it work from the wheel alone, in a folder of their own?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "image-tests"
GUIDE = ROOT / "docs" / "testing-your-images.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("qemu_vmdk_snap", "contrib", "docs", "examples", "guests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.mark.needs("qemu-system-x86_64")
def test_the_example_passes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    blocks = [text for text in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "def test_" in text]
    assert len(blocks) == 4
    for number, block in enumerate(blocks):  # each as it stands: with the imports that it needs
        (project / f"test_guide{number}.py").write_text(block)
    where = (
        "import qemu_vmdk_snap.testing.plugin as plugin\n\n\ndef test_where():\n    assert plugin.__file__.startswith"
    )
    (project / "test_where.py").write_text(f"{where}({str(installed)!r})\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--guest-require", "-q", "--basetemp", "t"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 passed" in done.stdout


def test_the_guide_names_every_option_mark_and_fixture() -> None:
    text = GUIDE.read_text()
    plugin = (ROOT / "qemu_vmdk_snap/testing/plugin.py").read_text()
    for option in set(re.findall(r'addoption\(\s*"(--guest-[a-z-]+)"', plugin)):
        assert f"`{option}" in text, option
    for name in re.findall(r'^    "(vmdk_\w+)": \(', plugin, re.MULTILINE):
        assert name in text, name
    for name in ("vmdk_chain", "vmdk_guest", "vmdk_domain", "vmdk_libvirt"):
        assert f"| `{name}` |" in text


def test_the_guide_has_the_words_of_the_harness() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "qemu_vmdk_snap/harness").rglob("*.py"))
    for words in re.findall(r"^\| `([^`.;]+)", GUIDE.read_text(), re.MULTILINE):
        if words.startswith(("the firmware", "the guest", "QEMU ended")):
            assert words.split(":")[0].strip() in sources, words
