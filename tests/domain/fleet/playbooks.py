"""Playbooks that run the collection as it lies in the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import DISTRIBUTIONS

COLLECTION = Path(__file__).parents[3] / "ansible"
CORES = ("current", "distribution")
"""The ansible-core of the virtual environment, and the one of the distribution: 2.14 on Debian 12."""


def chosen_core(otherwise: str) -> str:
    """Return which ansible-core runs a playbook: what VMDK_ANSIBLE says, or the one named."""
    core = os.environ.get("VMDK_ANSIBLE", otherwise)
    assert core in CORES, f"VMDK_ANSIBLE: {core!r} is none of {CORES}"
    return core


class Ansible:
    """Runs playbooks with the collection, and a folder of its own as home.

    `core` is the ansible-core of the virtual environment or the distribution's. `enter` is put before each command.
    Without `collection` it is not there yet.
    """

    def __init__(
        self, folder: Path, core: str = "current", enter: Sequence[str] = (), *, collection: bool = True
    ) -> None:
        self.folder, self.enter = folder, list(enter)
        folder.mkdir(parents=True, exist_ok=True)
        if collection:
            place = folder / "collections" / "ansible_collections" / "qemu_vmdk_snap" / "vmdk"
            shutil.copytree(COLLECTION, place, symlinks=False)
        self.environment = {
            **os.environ,
            "HOME": str(folder),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_RETRY_FILES_ENABLED": "false",
            "ANSIBLE_NOCOLOR": "true",
            "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_HOST_KEY_CHECKING": "false",
            "ANSIBLE_TIMEOUT": "100",  # for a connection; ten seconds are few on a busy machine
            "LC_ALL": "C.UTF-8",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        if collection:
            self.environment["ANSIBLE_COLLECTIONS_PATH"] = str(folder / "collections")
        self._python: list[str] = []
        if core == "distribution":
            prefix = next(path for path in DISTRIBUTIONS if path.exists()).parents[1]
            self.environment["PATH"] = f"{prefix}/bin{os.pathsep}{self.environment['PATH']}"
            # Where it is unpacked the distribution's Python does not find it, and may lack what it imports.
            if str(prefix) != "/usr":
                self._python = [sys.executable]
                self.environment["PYTHONPATH"] = str(prefix / "lib/python3/dist-packages")

    def run(self, *words: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run one of ansible's commands."""
        program = shutil.which(words[0], path=self.environment["PATH"])
        assert program is not None, words
        return subprocess.run(
            [*self.enter, *self._python, program, *words[1:]],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=check,
            timeout=590,
        )

    def play(self, *tasks: dict[str, Any], flags: tuple[str, ...] = (), **variables: object) -> list[dict[str, Any]]:
        """Run the tasks on this machine, one after the other whatever becomes of each, and return their results."""
        kept = [{**task, "register": f"result_{number}", "ignore_errors": True} for number, task in enumerate(tasks)]
        results = ", ".join(f"result_{number}" for number in range(len(tasks)))
        out = self.folder / "results.json"
        out.unlink(missing_ok=True)
        keep = {
            "ansible.builtin.copy": {"content": "{{ [" + results + "] | to_json }}", "dest": str(out)},
            "check_mode": False,
            "diff": False,
        }
        play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": [*kept, keep]}
        book = self.folder / "book.yml"
        book.write_text(json.dumps([{**play, "vars": {"ansible_python_interpreter": "/usr/bin/python3", **variables}}]))
        done = self.run("ansible-playbook", "-i", "localhost,", *flags, str(book))
        assert done.returncode == 0, done.stdout + done.stderr
        found: list[dict[str, Any]] = json.loads(out.read_text())
        return found
