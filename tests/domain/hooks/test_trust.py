"""What the daemon runs as root, or a drop-in is, others must not be able to change: on no part of the way."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_vmdk_snap import InvalidRequest
from qemu_vmdk_snap.cli.main import main
from qemu_vmdk_snap.domain.dropins import dropin
from qemu_vmdk_snap.domain.dropins.trust import Distrust, distrust, distrust_tree
from qemu_vmdk_snap.domain.hooks import install as hooks
from qemu_vmdk_snap.errors import PluginError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
NOBODY = 12345


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder with a package of ours, which the hook is installed from."""
    root = tmp_path / "lib" / "site"
    (root / "qemu_vmdk_snap" / "domain").mkdir(parents=True)
    (root / "qemu_vmdk_snap" / "domain" / "a.py").write_text("")
    monkeypatch.setattr(hooks, "_root", lambda: root)
    return root


def give_away(path: Path) -> Distrust:
    os.chown(path, NOBODY, NOBODY)
    return Distrust(path, f"belongs to user {NOBODY}")


def open_up(path: Path) -> Distrust:
    path.chmod(0o777)
    return Distrust(path, "may be written by others than its owner")


def share(path: Path) -> Distrust:
    path.chmod(0o775)
    os.chown(path, -1, NOBODY)
    return Distrust(path, "may be written by others than its owner")


CHANGES = [pytest.param(give_away, marks=as_root), open_up, pytest.param(share, marks=as_root)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["..", ".", "qemu_vmdk_snap", "qemu_vmdk_snap/domain", "qemu_vmdk_snap/domain/a.py"])
def test_a_package_that_others_could_change_is_not_installed(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], Distrust],
    where: str,
) -> None:
    folders = ["--dir", str(tmp_path / "qemu.d"), "--policies", str(tmp_path / "domains")]
    assert main(["hook", "install", *folders]) == 0
    assert main(["hook", "status", *folders]) == 0
    assert main(["hook", "uninstall", *folders[:2]]) == 0
    (tmp_path / "domains").rmdir()
    capsys.readouterr()
    place, reason = change((root / where).resolve())
    assert main(["hook", "install", *folders]) == 64
    told = f"qemu-vmdk-snap: {place}: {reason}, and libvirt would run it as root: nothing was installed\n"
    assert capsys.readouterr() == ("", told)
    assert not (tmp_path / "qemu.d").exists()
    assert not (tmp_path / "domains").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_the_folders_of_the_hook_and_of_its_policies(
    root: Path, tmp_path: Path, change: Callable[[Path], Distrust]
) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    place, reason = change(etc)
    for folders in ((etc / "qemu.d", tmp_path / "p"), (tmp_path / "q", etc / "deep" / "domains")):
        with pytest.raises(InvalidRequest, match=f"^{place}: {reason}, and libvirt would run it as root"):
            hooks.install(*folders, {})
    assert list(etc.iterdir()) == []


def test_the_interpreter(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    hooks.install(tmp_path / "q", tmp_path / "p", {})
    assert hooks.status(tmp_path / "q").problem is None
    (tmp_path / "bin").chmod(0o777)
    with pytest.raises(InvalidRequest, match=f"^{tmp_path}/bin: may be written by others"):
        hooks.install(tmp_path / "q", tmp_path / "p", {})
    problem = f"runs {tmp_path}/bin, which may be written by others than its owner, and the daemon runs it as root"
    assert hooks.status(tmp_path / "q").problem == problem


@pytest.mark.parametrize("change", CHANGES)
def test_status_reports_a_package_that_others_could_change_by_now(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], Distrust]
) -> None:
    folders = ["--dir", str(tmp_path / "qemu.d"), "--policies", str(tmp_path / "domains")]
    assert main(["hook", "install", *folders]) == 0
    place, reason = change(root / "qemu_vmdk_snap" / "domain" / "a.py")
    capsys.readouterr()
    assert main(["hook", "status", *folders]) == 1
    assert f"runs {place}, which {reason}, and the daemon runs it as root" in capsys.readouterr().out


def test_status_reports_a_package_that_is_gone(root: Path, tmp_path: Path) -> None:
    hooks.install(tmp_path / "q", tmp_path / "p", {})
    shutil.rmtree(root)
    assert hooks.status(tmp_path / "q").problem == f"needs {root}: No such file or directory: install it again"


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_above_the_drop_ins(tmp_path: Path, change: Callable[[Path], Distrust]) -> None:
    folder = tmp_path / "etc" / "hooks.d"
    folder.mkdir(parents=True)
    (folder / "10-a").write_text("#!/bin/sh\n")
    (folder / "10-a").chmod(0o755)
    environ = {dropin.FOLDER_VARIABLE: str(folder)}
    assert dropin.executables(environ) == [folder / "10-a"]
    place, reason = change(tmp_path / "etc")
    with pytest.raises(PluginError, match=f"^{place}: {reason}: it is not run, and nothing was done"):
        dropin.executables(environ)


def test_links_are_followed_to_their_ends(tmp_path: Path) -> None:
    real, via = tmp_path / "real" / "sub", tmp_path / "via"
    real.mkdir(parents=True)
    via.mkdir()
    (real / "file").write_text("")
    (via / "two").symlink_to("../real")
    (tmp_path / "one").symlink_to(via / "two" / "sub")
    assert distrust(tmp_path / "one" / "file") is None
    for place in (via, tmp_path / "real", real, real / "file"):
        mode = place.stat().st_mode & 0o777
        place.chmod(0o777)
        found = distrust(tmp_path / "one" / "file")
        assert found is not None
        assert found.place.samefile(place)
        place.chmod(mode)
    (tmp_path / "round").symlink_to("round")
    for path in (tmp_path / "round", tmp_path / "nothing"):
        with pytest.raises(OSError, match=str(path)):
            distrust(path)


def test_a_folder_like_tmp_is_good_on_the_way_and_not_at_its_end(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "ours").mkdir(parents=True)
    shared.chmod(0o1777)
    assert distrust(shared / "ours") is None
    assert distrust_tree(shared / "ours") is None
    assert distrust(shared) == Distrust(shared, "may be written by others than its owner")
    (shared / "ours" / "all").mkdir(mode=0o777)
    (shared / "ours" / "all").chmod(0o1777)
    assert distrust_tree(shared / "ours") == Distrust(
        shared / "ours" / "all", "may be written by others than its owner"
    )


@as_root
def test_a_link_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to("real")
    os.chown(tmp_path / "link", NOBODY, NOBODY, follow_symlinks=False)
    assert distrust(tmp_path / "link") == Distrust(tmp_path / "link", f"belongs to user {NOBODY}")
    assert distrust(tmp_path / "link", [NOBODY]) is None
