"""What the standard library and NumPy offer, without what it costs to import them where a command never uses it.

`dataclass` is `dataclasses.dataclass` to type checkers and readers. At run time its methods are made when a class is
first used, and `dataclasses` (with `inspect`, `ast` and more, a third of the start of a short command) is imported by
those alone who ask for its functions: `dataclasses.replace`, `fields` and `asdict` work as ever.

`NamedTuple`, `Protocol`, `Final` and the rest are those of `typing` to type checkers. At run time a name that is only
ever part of an annotation stands for nothing, a protocol is an empty class, and a named tuple gets its constructor when
it is first made: `typing` compiles regular expressions, and builds and evaluates the source of each named tuple.

`numpy` is the module, imported when the first of its names is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

TYPE_CHECKING = False  # what type checkers take for true, without the import

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
    from dataclasses import field as field
    from dataclasses import replace as replace
    from types import ModuleType
    from typing import IO as IO
    from typing import Annotated as Annotated
    from typing import Any as Any
    from typing import ClassVar as ClassVar
    from typing import Final as Final
    from typing import Literal as Literal
    from typing import NamedTuple as NamedTuple
    from typing import NewType as NewType
    from typing import NoReturn as NoReturn
    from typing import Protocol as Protocol
    from typing import Self as Self
    from typing import cast as cast
    from typing import overload as overload
    from typing import runtime_checkable as runtime_checkable

    import numpy as numpy
else:
    import collections

    IO = Any = ClassVar = Final = Literal = NoReturn = Self = None  # of annotations, which are text

    class Annotated:
        """A type with what else is to be known of it, as `__metadata__`."""

        def __class_getitem__(cls, inside: tuple[object, ...]) -> Annotated:
            made = cls()
            made.__metadata__ = inside[1:]
            return made

    def NewType(name: str, of: type) -> Callable[[object], object]:
        """Return what gives a value back as it is."""
        return lambda value: value

    def cast(to: object, value: object) -> object:
        """Return `value`."""
        return value

    def overload(function: object) -> None:
        """Take one of the signatures of the function that follows."""

    class _Checkable(type):
        """The class of protocols: `isinstance` asks for the names that a checkable one has."""

        __asked__: tuple[str, ...] | None = None

        def __init__(cls, name: str, bases: tuple[type, ...], body: dict[str, object]) -> None:
            super().__init__(name, bases, body)
            cls._is_protocol = not bases or Protocol in bases

        def __instancecheck__(cls, one: object) -> bool:
            names = cls.__dict__.get("__asked__")
            return super().__instancecheck__(one) if names is None else all(hasattr(one, name) for name in names)

    class Protocol(metaclass=_Checkable):
        """What a class has that is not derived from it."""

        __slots__ = ()

    def runtime_checkable(cls: type) -> type:
        """Let `isinstance` ask whether an object has all methods of the protocol."""
        names = [name for one in cls.__mro__[:-2] for name in (*one.__dict__, *one.__annotations__)]
        cls.__asked__ = tuple(name for name in names if not name.startswith("_"))
        return cls

    class _NamedTupleType(type):
        """Makes the class of a named tuple of one with annotations."""

        def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, object]) -> type:
            names = tuple(body.get("__annotations__", ()))
            defaults = {one: body.pop(one) for one in names if one in body}
            getters = {one: collections._tuplegetter(at, None) for at, one in enumerate(names)}
            own = {"__slots__": (), "_fields": names, "_field_defaults": defaults, "__match_args__": names, "_made": 0}
            return type(name, (tuple,), _NAMED_TUPLE | own | getters | body)

    class _NamedTuple:
        def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
            return (_NamedTupleBase,)

    def _first_new(cls: type, /, *args: object, **named: object) -> object:
        """Make one of the first: compiling a constructor pays where it is called more often than that."""
        owner = next(one for one in cls.__mro__ if "_fields" in one.__dict__)
        owner._made += 1
        if owner._made <= _FEW and len(args) == len(owner._fields) and not named:
            return tuple.__new__(cls, args)
        scope = {f"_{name}": value for name, value in owner._field_defaults.items()} | {"_new": tuple.__new__}
        takes = [f"{name}=_{name}" if name in owner._field_defaults else name for name in owner._fields]
        inside = ", ".join([*owner._fields, ""])
        exec(f"def __new__(_cls, {', '.join(takes)}):\n    return _new(_cls, ({inside}))", scope)
        scope["__new__"].__qualname__ = f"{owner.__qualname__}.__new__"
        owner.__new__ = staticmethod(scope["__new__"])
        return scope["__new__"](cls, *args, **named)

    def _make(cls: type, values: object) -> object:
        """Make one of the values of another sequence."""
        return cls(*values)

    def _named_replace(self: object, /, **changes: object) -> object:
        """Return the same with some fields changed."""
        made = type(self)(*[changes.pop(name, value) for name, value in zip(self._fields, self, strict=True)])
        if changes:
            raise ValueError(f"Got unexpected field names: {list(changes)!r}")
        return made

    def _as_dict(self: object) -> dict[str, object]:
        """Return the values by the names of their fields."""
        return dict(zip(self._fields, self, strict=True))

    def _named_repr(self: object) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
        return f"{type(self).__name__}({inside})"

    _NAMED_TUPLE = {
        "__new__": _first_new,
        "_make": classmethod(_make),
        "_replace": _named_replace,
        "_asdict": _as_dict,
        "__repr__": _named_repr,
        "__getnewargs__": lambda self: tuple(self),
    }
    _NamedTupleBase = type.__new__(_NamedTupleType, "NamedTuple", (), {})
    NamedTuple = _NamedTuple()

    _MISSING = object()
    _FEW = 16
    """How many records of a class are made before a constructor is compiled for it."""

    class _Factory:
        """The default of a field that is made anew for each record."""

        def __init__(self, make: Callable[[], object], counts: bool) -> None:
            self.make, self.counts = make, counts

    def field(
        *,
        default: object = _MISSING,
        default_factory: Callable[[], object] | None = None,
        compare: bool = True,
        repr: bool = True,
    ) -> _Factory:
        """Return the default of a field, the same for all or made for each record; False leaves it out there."""
        return _Factory(default_factory or (lambda: default), compare and repr)

    def replace(record: object, /, **changes: object) -> object:
        """Return a copy of `record` with some fields changed."""
        kept = {name: getattr(record, name) for name in type(record).__record_fields__ if name not in changes}
        return type(record)(**kept, **changes)

    class _Fields:
        """What `dataclasses` looks for in a class of its own; made for those who ask."""

        def __get__(self, instance: object, owner: type) -> dict[str, object]:
            import dataclasses

            hints: dict[str, object] = {}
            for base in reversed(owner.__mro__[:-1]):
                hints |= base.__annotations__
            fields = [(name, hints[name], _told(owner, name, dataclasses)) for name in owner.__record_fields__]
            owner.__dataclass_fields__ = made = dataclasses.make_dataclass(owner.__name__, fields).__dataclass_fields__
            return made

    def _told(owner: type, name: str, dataclasses: ModuleType) -> object:
        default = owner.__record_defaults__.get(name, _MISSING)
        if default is _MISSING:
            return dataclasses.field()
        if isinstance(default, _Factory):
            return dataclasses.field(default_factory=default.make)
        return dataclasses.field(default=default)

    def dataclass(cls: type | None = None, /, *, frozen: bool = False, slots: bool = False) -> object:
        """Make a class whose annotated names are its fields a record; see `dataclasses.dataclass`."""
        if cls is None:
            return lambda one: _record(one, frozen, slots)
        return _record(cls, frozen, slots)

    def _record(cls: type, frozen: bool, slots: bool) -> type:
        own = [name for name, hint in cls.__annotations__.items() if "ClassVar" not in str(hint)]
        inherited: dict[str, None] = {}
        defaults: dict[str, object] = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= dict.fromkeys(base.__dict__.get("__record_fields__", ()))
            defaults |= base.__dict__.get("__record_defaults__", {})
        names = tuple(inherited | dict.fromkeys(own))
        defaults |= {name: cls.__dict__[name] for name in own if name in cls.__dict__}
        body = dict(cls.__dict__)
        for name in own:
            if slots or isinstance(body.get(name), _Factory):
                body.pop(name, None)
        added: dict[str, object] = {
            "__record_fields__": names,
            "__record_defaults__": defaults,
            "__dataclass_fields__": _Fields(),
            "__match_args__": names,
            "__init__": _first_init(frozen),
            "__repr__": _repr,
            "__eq__": _equal,
            "__hash__": _hash if frozen else None,
        }
        if frozen:
            added |= {"__setattr__": _refuse, "__delattr__": _refuse}
        body = {name: value for name, value in added.items() if name not in cls.__dict__ or name == "__hash__"} | body
        if "__hash__" in cls.__dict__ and cls.__dict__["__hash__"] is not None:
            body["__hash__"] = cls.__dict__["__hash__"]
        else:
            body["__hash__"] = added["__hash__"]
        if slots:
            body["__slots__"] = tuple(name for name in own if name not in inherited)
            body.pop("__dict__", None)
            body.pop("__weakref__", None)
            if frozen:  # what pickle does by itself would be refused
                body |= {"__getstate__": _state, "__setstate__": _set_state}
            made = type(cls)(cls.__name__, cls.__bases__, body)
            made.__qualname__ = cls.__qualname__
            return made
        for name, value in body.items():
            if name in added and cls.__dict__.get(name, _MISSING) is not value:
                setattr(cls, name, value)
        for name in own:
            if isinstance(cls.__dict__.get(name), _Factory):
                delattr(cls, name)
        return cls

    def _first_init(frozen: bool) -> Callable[..., None]:
        made_so_far = 0

        def __init__(self: object, *args: object, **named: object) -> None:
            nonlocal made_so_far
            owner = next(one for one in type(self).__mro__ if one.__dict__.get("__init__") is __init__)
            made_so_far += 1
            if made_so_far <= _FEW and _plainly_set(self, owner, args, named):
                return
            owner.__init__ = made = _make_init(owner, frozen)
            made(self, *args, **named)

        return __init__

    def _plainly_set(self: object, owner: type, args: tuple[object, ...], named: dict[str, object]) -> bool:
        """Set the fields where each has a value or a default; return False where not."""
        names, defaults = owner.__record_fields__, owner.__record_defaults__
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or not given.keys().isdisjoint(named) or not named.keys() <= set(names):
            return False
        values = defaults | given | named
        if len(values) != len(names):
            return False
        for name in names:
            value = values[name]
            object.__setattr__(self, name, value.make() if isinstance(value, _Factory) else value)
        if hasattr(owner, "__post_init__"):
            self.__post_init__()
        return True

    def _make_init(cls: type, frozen: bool) -> Callable[..., None]:
        names, defaults = cls.__record_fields__, cls.__record_defaults__
        scope: dict[str, object] = {"_set": object.__setattr__, "_missing": _MISSING}
        takes, does = [], []
        for name in names:
            value = name
            if name in defaults:
                default = defaults[name]
                scope[f"_{name}"] = default.make if isinstance(default, _Factory) else default
                made_anew = isinstance(default, _Factory)
                takes.append(f"{name}=_missing" if made_anew else f"{name}=_{name}")
                value = f"_{name}() if {name} is _missing else {name}" if made_anew else name
            else:
                takes.append(name)
            does.append(f"    _set(self, {name!r}, {value})" if frozen else f"    self.{name} = {value}")
        if hasattr(cls, "__post_init__"):
            does.append("    self.__post_init__()")
        exec("\n".join([f"def __init__(self, {', '.join(takes)}):", *(does or ["    pass"])]), scope)
        init = scope["__init__"]
        init.__qualname__ = f"{cls.__qualname__}.__init__"
        return init

    def _counting(cls: type) -> list[str]:
        """Return the fields by which records are told apart, and that are shown."""
        defaults = cls.__record_defaults__
        return [name for name in cls.__record_fields__ if getattr(defaults.get(name), "counts", True) is True]

    def _values(self: object) -> tuple[object, ...]:
        return tuple([getattr(self, name) for name in _counting(type(self))])

    def _repr(self: object) -> str:
        inside = ", ".join(f"{name}={getattr(self, name)!r}" for name in _counting(type(self)))
        return f"{type(self).__qualname__}({inside})"

    def _equal(self: object, other: object) -> bool:
        return _values(self) == _values(other) if type(other) is type(self) else NotImplemented

    def _hash(self: object) -> int:
        return hash(_values(self))

    def _refuse(self: object, name: str, *value: object) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot {'assign to' if value else 'delete'} field {name!r}")

    def _state(self: object) -> list[object]:
        return [getattr(self, name) for name in type(self).__record_fields__]

    def _set_state(self: object, state: list[object]) -> None:
        for name, value in zip(type(self).__record_fields__, state, strict=True):
            object.__setattr__(self, name, value)

    class _Numpy:
        """Stands for the module until the first of its names is used, and keeps each that was."""

        def __getattr__(self, name: str) -> object:
            value = getattr(importlib.import_module("numpy"), name)
            setattr(self, name, value)
            return value

    numpy = _Numpy()
