"""The documented schemas of what the commands print, for tests that hold the output to them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "json.schema.json"


@cache
def document() -> dict[str, Any]:
    """Return the document, which is checked to be a schema itself."""
    value: dict[str, Any] = json.loads(DOCUMENT.read_text())
    jsonschema.Draft202012Validator.check_schema(value)
    return value


def check(name: str, output: str) -> Any:  # noqa: ANN401 - whatever JSON it is
    """Return what the output of the command `name` ("image info", or "error") says, if it is as documented."""
    answer = json.loads(output)
    schema = {"$ref": f"#/$defs/{name}", "$defs": document()["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(answer)
    return answer
