"""Binary records declared once: field order, width and rules are in the annotation, for reading and writing."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from pathlib import Path

from qemu_vmdk_snap.errors import FormatError
from qemu_vmdk_snap.light import Annotated, Any, NamedTuple, Self, dataclass


@dataclass(frozen=True, slots=True)
class Wire:
    """How a field is stored: a `struct` code, little-endian."""

    code: str


class Must(NamedTuple):
    """A rule for one field, and its text for error messages."""

    holds: Callable[[Any], bool]
    rule: str


class Column(NamedTuple):
    """One field of a record: its name, its place in bytes, its storage and its rules."""

    name: str
    offset: int
    wire: Wire
    rules: tuple[Must, ...]


U8 = Annotated[int, Wire("B")]
U16 = Annotated[int, Wire("H")]
U32 = Annotated[int, Wire("I")]
U64 = Annotated[int, Wire("Q")]


def power_of_two(value: int) -> bool:
    """Return whether `value` is 1, 2, 4, 8 and so on."""
    return value > 0 and value & (value - 1) == 0


class OnDisk:
    """Base of the frozen dataclasses whose fields are `Annotated[..., Wire(code), Must(...), ...]`."""

    __slots__ = ()

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        """Return the fields in their order on disk."""
        return _columns(cls)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are

    @classmethod
    def layout(cls) -> struct.Struct:
        """Return the packed little-endian layout of the whole record."""
        return _layout(cls)  # type: ignore[arg-type]

    @classmethod
    def parse(cls, raw: bytes, *, path: Path, base: int = 0) -> Self:
        """Return the record in `raw`, which was read from `path` at byte `base`.

        Raises:
            FormatError: `raw` has the wrong length or a field breaks its own rule.
        """
        layout = cls.layout()
        if len(raw) != layout.size:
            raise FormatError(path, base, cls.__name__, len(raw), f"must be {layout.size} bytes long")
        record = cls(*layout.unpack(raw))
        record.validate(path=path, base=base)
        return record

    def validate(self, *, path: Path, base: int = 0) -> None:
        """Check every field rule; raises FormatError for the first that is broken."""
        for name, offset, _wire, rules in self.columns():
            for must in rules:
                value = getattr(self, name)
                if not must.holds(value):
                    raise FormatError(path, base + offset, name, value, must.rule)

    def serialise(self) -> bytes:
        """Return the bytes of the record; `parse` reads them back."""
        return self.layout().pack(*(getattr(self, column.name) for column in self.columns()))

    @classmethod
    def offset_of(cls, field: str) -> int:
        """Return the byte offset of `field` in the record."""
        return next(column.offset for column in cls.columns() if column.name == field)


@functools.cache  # one entry a record class
def _columns(cls: type[OnDisk]) -> tuple[Column, ...]:
    columns, offset = [], 0
    # The annotations themselves: a module with records does not import them as text from __future__.
    for name, hint in cls.__annotations__.items():
        marks = _marks(hint)
        wire = next(mark for mark in marks if isinstance(mark, Wire))
        rules = tuple(mark for mark in marks if isinstance(mark, Must))
        columns.append(Column(name, offset, wire, rules))
        offset += struct.calcsize("<" + wire.code)
    return tuple(columns)


def _marks(hint: object) -> tuple[object, ...]:
    return tuple(getattr(hint, "__metadata__", ()))


@functools.cache
def _layout(cls: type[OnDisk]) -> struct.Struct:
    return struct.Struct("<" + "".join(column.wire.code for column in cls.columns()))
