"""What several crash tests start from."""

from __future__ import annotations

import os

import pytest

from qemu_vmdk_snap.storage.journal import grainlog
from tests.crash.killed.test_killed_operations import SIZE
from tests.support.tree import Tree, line


@pytest.fixture
def not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: the test itself decides what the disk loses."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


@pytest.fixture
def no_server_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for no logs of killed servers: those of other tests may have been for files with the same inodes."""
    monkeypatch.setattr(grainlog, "folders", list)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A chain of three, and a fourth image beside the third."""
    folder = tmp_path_factory.mktemp("chains") / "origin"
    folder.mkdir()
    tree = Tree(folder, SIZE)
    line(tree, 3)
    tree.scribble(tree.overlay("image-2", grain=16384))
    return tree
