"""The command that a hook starts after a stop, called by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.create.run import create_snapshot
from qemu_vmdk_snap.domain.hooks import after_stop as hooks_after
from qemu_vmdk_snap.domain.registry import list_snapshots
from tests.domain.lab import Lab
from tests.support.schemas import check

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


@pytest.fixture
def policy(lab: Lab, tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(f'snapshot-after-stop = true\nkeep-last = 1\nconnect = "{lab.uri}"\n')
    return path


def test_a_shut_off_domain_gets_its_snapshot_and_loses_the_oldest(
    lab: Lab, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domain = lab.define(lab.disk()).name()
    create_snapshot(lab.conn, domain, "mine")
    taken: list[str] = []
    for number in range(3):
        assert main(["hook", "after-stop", domain, "--policy", str(policy), "--output=json"]) == 0
        answer = check("hook after-stop", capsys.readouterr().out)
        assert answer["deleted"] == taken[-1:]
        assert answer["snapshot"].startswith("stop-")
        taken.append(answer["snapshot"])
        names = [info.name for info in list_snapshots(lab.conn, domain)]
        assert names == ["mine", taken[-1]], f"after {number}"
    assert len(set(taken)) == 3


def test_one_that_runs_is_not_snapshotted(lab: Lab, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domain = lab.define(lab.disk())
    domain.create()
    run = domain.ID()
    assert hooks_after.wait_until_off(domain, run, 0.2) == "it still runs after 0.2 s"
    assert hooks_after.wait_until_off(domain, run + 1, 5) == "it was started again already"
    assert main(["hook", "after-stop", domain.name(), "--policy", str(policy), "--wait", "0.2"]) == 0
    assert capsys.readouterr().out == "no snapshot after its stop: it still runs after 0.2 s\n"
    assert domain.snapshotNum() == 0
    domain.destroy()
    assert hooks_after.wait_until_off(domain, run, 0.2) is None


def test_what_fails_is_an_error_of_its_class(
    lab: Lab, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["hook", "after-stop", "nobody", "--policy", str(policy)]) == 69
    assert main(["hook", "after-stop", "nobody", "--policy", str(tmp_path / "none.toml")]) == 74
    policy.write_text("snapshot-after-stop = 1")
    assert main(["hook", "after-stop", "nobody", "--policy", str(policy)]) == 64
    assert "snapshot-after-stop = 1 must be true or false" in capsys.readouterr().err
