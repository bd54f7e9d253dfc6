"""Playbooks that run the collection as it lies in the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

COLLECTION = Path(__file__).parents[3] / "ansible"


class Ansible:
    """Runs playbooks with the collection, a folder of its own as home, and whichever ansible-core is on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        place = folder / "collections" / "ansible_collections" / "qemu_vmdk_snap"
        place.mkdir(parents=True)
        shutil.copytree(COLLECTION, place / "vmdk", symlinks=False)
        self.environment = {
            **os.environ,
            "HOME": str(folder),
            "ANSIBLE_COLLECTIONS_PATH": str(folder / "collections"),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_RETRY_FILES_ENABLED": "false",
            "ANSIBLE_NOCOLOR": "true",
            "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_HOST_KEY_CHECKING": "false",
            "ANSIBLE_TIMEOUT": "100",  # for a connection; ten seconds are few on a busy machine
            "LC_ALL": "C.UTF-8",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def run(self, *words: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run one of ansible's commands."""
        return subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=check, timeout=280
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
