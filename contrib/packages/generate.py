"""Write what a wheel carries besides the package and nobody keeps: manual pages, and completion for three shells.

The build backend calls this (`[tool.hatch.build.targets.wheel.hooks.custom]` in pyproject.toml) before it collects the
files. The result is in build/share, which git ignores.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SCRIPTS = {
    "bash": "bash-completion/completions/qemu-vmdk-snap",
    "zsh": "zsh/site-functions/_qemu-vmdk-snap",
    "fish": "fish/vendor_completions.d/qemu-vmdk-snap.fish",
}
"""Shell -> its script, in share/."""


class Generate(BuildHookInterface):
    """The hook."""

    def initialize(self, version: str, build_data: dict[str, object]) -> None:
        """Write the files anew."""
        root = Path(self.root)
        share = root / "build" / "share"
        shutil.rmtree(share, ignore_errors=True)
        _run(root, "manual", str(share / "man" / "man1"))
        for shell, name in SCRIPTS.items():
            path = share / name
            path.parent.mkdir(parents=True)
            path.write_text(_run(root, "completion", shell))


def _run(root: Path, *words: str) -> str:
    """Return what the program prints that is built from `root`; nothing but the package and argcomplete is needed."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from qemu_vmdk_snap.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-B", "-c", code, str(root), *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
