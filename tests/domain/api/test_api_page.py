"""Do the examples of docs/api.md run, and print what the page says?"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from tests.domain.lab import Lab

PAGE = Path(__file__).resolve().parents[3] / "docs" / "api.md"

pytestmark = pytest.mark.needs("libvirt", "qemu-system-x86_64")


def blocks() -> list[tuple[str, str | None]]:
    """Return each example with what it prints, if the page says so."""
    found = re.findall(r"^```(python|text)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    pairs: list[tuple[str, str | None]] = []
    for kind, text in found:
        if kind == "python":
            pairs.append((text, None))
        else:
            assert pairs[-1][1] is None
            pairs[-1] = (pairs[-1][0], text)
    return pairs


def test_the_examples_run(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    domain = lab.define(lab.disk("disk")).name()
    names: dict[str, object] = {"URI": lab.uri, "DOMAIN": domain, "__name__": "api_page"}
    examples = blocks()
    assert len(examples) >= 8
    for code, printed in examples:
        if "import logging\n" in code:
            compile(code, str(PAGE), "exec")  # the level would stay for other tests
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(PAGE), "exec"), names)
        assert out.getvalue() == (printed or ""), code
