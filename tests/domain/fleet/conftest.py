"""Ansible with the collection of the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.domain.fleet.playbooks import Ansible


@pytest.fixture
def ansible(scratch: Path) -> Ansible:
    return Ansible(scratch / "ansible")
