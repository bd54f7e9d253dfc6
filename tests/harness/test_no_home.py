"""Do guests and the in-process libvirt find a place for their files where the user has no home that can be written?"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qemu_vmdk_snap import PluginError, create_image
from qemu_vmdk_snap.domain.connect import prepare_embed_root
from qemu_vmdk_snap.domain.hooks.unneeded import drivers
from qemu_vmdk_snap.errors import InvalidRequest
from qemu_vmdk_snap.harness.accelerator import cache_folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the temporary files be in a folder of the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return folder / f"qemu-vmdk-snap-{os.geteuid()}"


def no_such_user(uid: int) -> None:
    raise KeyError(uid)


def test_the_cache_is_where_the_user_keeps_such_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "qemu-vmdk-snap"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "qemu-vmdk-snap"
    assert cache_folder().is_dir()


def test_without_a_home_it_is_a_private_folder(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc")
    assert cache_folder() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    assert cache_folder() == temporary


def test_one_that_others_can_change_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc")
    temporary.mkdir()
    temporary.chmod(0o777)
    with pytest.raises(PluginError, match=r"^cache: .* is not a folder of this user's own: set XDG_CACHE_HOME"):
        cache_folder()
    temporary.rmdir()
    temporary.symlink_to("/tmp")
    with pytest.raises(PluginError, match="is not a folder of this user's own"):
        cache_folder()


def test_libvirt_in_the_process_gets_a_cache_below_its_root(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(scratch / "usual"))
    prepare_embed_root(scratch / "root")
    assert os.environ["XDG_CACHE_HOME"] == str(scratch / "usual")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/proc")
    prepare_embed_root(scratch / "root")
    assert os.environ["XDG_CACHE_HOME"] == str(scratch / "root" / "cache")
    monkeypatch.delenv("XDG_CACHE_HOME")


def test_a_hook_that_cannot_know_where_libvirts_files_are_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("HOME")
    with pytest.raises(InvalidRequest, match="this user has no home: set HOME, or XDG_CONFIG_HOME"):
        drivers()


@pytest.mark.needs("qemu-system-x86_64")
def test_a_guest_boots_for_a_user_whose_home_cannot_be_written(tmp_path: Path) -> None:
    image = tmp_path / "disk.vmdk"
    create_image(image, 1 << 20)
    environment = {**os.environ, "HOME": "/proc", "TMPDIR": str(tmp_path)}
    environment.pop("XDG_CACHE_HOME", None)
    words = [sys.executable, "-m", "qemu_vmdk_snap", "guest", "boot", str(image), "size"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "size: 0000000000000800" in done.stdout
