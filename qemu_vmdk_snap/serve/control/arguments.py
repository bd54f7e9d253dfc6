"""Arguments of commands on the control socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qemu_vmdk_snap.errors import InvalidRequest

Arguments = dict[str, Any]


def path_argument(arguments: Arguments, name: str) -> Path:
    """Return the absolute path that an argument names.

    Raises:
        InvalidRequest: it is missing, or no absolute path.
    """
    value = arguments.get(name)
    if not isinstance(value, str) or "\0" in value or not Path(value).is_absolute():
        raise InvalidRequest(name, "must be an absolute path")
    return Path(value)
