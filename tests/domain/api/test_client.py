"""Does the example of a client program do what it says?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from qemu_vmdk_snap.domain import list_snapshots
from tests.domain.lab import Lab

CLIENT = Path(__file__).resolve().parents[3] / "examples" / "client" / "nightly.py"

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


def test_a_night_and_the_same_night_again(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("nightly", CLIENT)
    assert spec is not None
    assert spec.loader is not None
    nightly = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nightly)
    domain = lab.define(lab.disk("a")).name()
    assert nightly.main(lab.uri) == 0
    (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (answer["domain"], answer["damaged"], answer["deleted"]) == (domain, [], [])
    assert [one.name for one in list_snapshots(lab.conn, domain)] == [answer["snapshot"]["snapshot"]]
    assert nightly.main(lab.uri) == 0
    assert json.loads(capsys.readouterr().out) == {"domain": domain, "changed": False}
