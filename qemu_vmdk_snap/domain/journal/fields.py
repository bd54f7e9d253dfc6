"""JSON to the dataclasses of a record: each field must have the type of its annotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qemu_vmdk_snap.light import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing import TypeVar

    from _typeshed import DataclassInstance

    Made = TypeVar("Made", bound=DataclassInstance)


def read(made: type[Made], record: object, *, parts: Mapping[str, type[DataclassInstance]]) -> Made:
    """Return an instance of the dataclass `made`; `parts` are the dataclasses that its annotations name.

    Raises:
        TypeError, ValueError: a field is missing, not known, or of another type; the message names it.
    """
    from dataclasses import MISSING, fields  # only where there is a record

    if not isinstance(record, dict):
        raise TypeError("a part of it is not an object")
    known = {field.name: field for field in fields(made)}
    for name in record:
        if name not in known:
            raise ValueError(f"the field {str(name)[:40]!r} is not known")
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in record:
            try:
                values[name] = _value(str(field.type), record[name], parts)
            except TypeError as error:
                raise TypeError(f"the field {name!r} is of another type: {error}") from error
        elif field.default is MISSING:
            raise ValueError(f"the field {name!r} is missing")
    return made(**values)


def check_xml(text: str) -> None:
    """Accept XML that can be parsed, and an empty text.

    Raises:
        ValueError: it is not XML.
    """
    import xml.etree.ElementTree as ET

    try:
        if text:
            ET.fromstring(text)
    except ET.ParseError as error:
        raise ValueError(f"its XML cannot be parsed: {error}") from error


def _value(kind: str, value: object, parts: Mapping[str, type[DataclassInstance]]) -> object:
    if kind.endswith(" | None"):
        return None if value is None else _value(kind.removesuffix(" | None"), value, parts)
    if kind in parts:
        return read(parts[kind], value, parts=parts)
    if kind.startswith("tuple["):
        return _tuple(kind.removeprefix("tuple[").removesuffix("]"), value, parts)
    return _PLAIN[kind](value)


def _tuple(inner: str, value: object, parts: Mapping[str, type[DataclassInstance]]) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    if inner.endswith(", ..."):
        return tuple(_value(inner.removesuffix(", ..."), one, parts) for one in value)
    kinds = inner.split(", ")
    if len(value) != len(kinds):
        raise TypeError(f"not a list of {len(kinds)}")
    return tuple(_value(kind, one, parts) for kind, one in zip(kinds, value, strict=True))


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError("not a text")
    value.encode()  # half of a surrogate pair is not text either: UnicodeEncodeError is a ValueError
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("not true or false")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("not a number")
    return value


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return value


_PLAIN: Final[dict[str, Callable[[object], object]]] = {
    "str": _text,
    "bool": _truth,
    "int": _number,
    "dict[str, Any]": _object,
}
