"""Prometheus' node_exporter reads the metrics of real domains, and serves what the textfile says."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain import create_snapshot
from tests.domain.lab import Lab

ODD = 'the "old" \\ {web}=ü'
NOBODY = 65534


@contextlib.contextmanager
def exporter(folder: Path, log: Path) -> Iterator[str]:
    """Run node_exporter on the textfiles of `folder`, as a user of no rights, and yield its address."""
    command = ["prometheus-node-exporter", "--collector.disable-defaults", "--collector.textfile"]
    command += [f"--collector.textfile.directory={folder}", "--web.listen-address=127.0.0.1:0"]
    with log.open("wb") as out:
        user = NOBODY if os.geteuid() == 0 else None
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, user=user)
    try:
        deadline = time.monotonic() + 60
        while (found := re.search(r'"Listening on" address=(\S+)', log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield found[1]
    finally:
        process.kill()
        process.wait()


def samples(text: str) -> dict[tuple[str, frozenset[str]], float]:
    """Return name and labels of each of our samples with its value."""
    found = {}
    for line in text.splitlines():
        if line.startswith("qemu_vmdk_snap_"):
            name, _, value = line.rpartition(" ")
            metric, _, labels = name.partition("{")
            pairs = re.findall(r'(\w+="(?:[^"\\]|\\.)*")', labels)
            found[metric, frozenset(pairs)] = float(value)
    return found


@pytest.mark.needs("prometheus-node-exporter")
def test_node_exporter_serves_what_the_textfile_says(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    good, broken = lab.define(lab.disk("a")), lab.define(lab.disk("b"))
    good.rename(ODD)
    lab.adopt(ODD)
    for name in (ODD, broken.name()):
        create_snapshot(lab.conn, name, "s1")
    (lab.folder / "b.vmdk").unlink()
    folder = lab.folder / "textfiles"
    folder.mkdir(mode=0o755)
    lab.folder.chmod(0o711)
    file = folder / "qemu_vmdk_snap.prom"
    assert main(["metrics", "-c", lab.uri, "--textfile", str(file), ODD, broken.name()]) == 1
    capsys.readouterr()
    with exporter(folder, lab.folder / "log") as address:
        local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with local.open(f"http://{address}/metrics", timeout=30) as answer:
            scraped = answer.read().decode()
    assert "\nnode_textfile_scrape_error 0\n" in scraped
    written = samples(file.read_text())
    assert samples(scraped) == written
    odd = 'domain="the \\"old\\" \\\\ {web}=ü"'
    assert written["qemu_vmdk_snap_domain_snapshots", frozenset({odd})] == 1
    assert written["qemu_vmdk_snap_domain_readable", frozenset({f'domain="{broken.name()}"'})] == 0
    assert written["qemu_vmdk_snap_last_run_success", frozenset()] == 0
    assert f'node_textfile_mtime_seconds{{file="{file}"}}' in scraped
