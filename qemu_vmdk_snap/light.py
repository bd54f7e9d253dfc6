"""What the standard library and NumPy offer, without what it costs to import them where a command never uses it.

`dataclass` is `dataclasses.dataclass` to type checkers and readers. At run time its methods are made when a class is
first used, and `dataclasses` (with `inspect`, `ast` and more, a third of the start of a short command) is imported by
those alone who ask for its functions: `dataclasses.replace`, `fields` and `asdict` work as ever.

`numpy` is the module, imported when the first of its names is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
    from dataclasses import field as field
    from dataclasses import replace as replace

    import numpy as numpy
else:
    _MISSING: Final = object()

    class _Factory:
        """The default of a field that is made anew for each record."""

        def __init__(self, make: Callable[[], object], counts: bool) -> None:
            self.make, self.counts = make, counts

    def field(*, default_factory: Callable[[], object], compare: bool = True, repr: bool = True) -> _Factory:
        """Return the default of a field: what `default_factory` makes for each record; False leaves it out there."""
        return _Factory(default_factory, compare and repr)

    def replace(record: Any, /, **changes: object) -> Any:  # noqa: ANN401 - whatever class it is
        """Return a copy of `record` with some fields changed."""
        kept = {name: getattr(record, name) for name in type(record).__record_fields__ if name not in changes}
        return type(record)(**kept, **changes)

    class _Fields:
        """What `dataclasses` looks for in a class of its own; made for those who ask."""

        def __get__(self, instance: object, owner: type) -> dict[str, object]:
            import dataclasses

            fields = [(name, Any, _told(owner, name, dataclasses)) for name in owner.__record_fields__]
            owner.__dataclass_fields__ = made = dataclasses.make_dataclass(owner.__name__, fields).__dataclass_fields__
            return made

    def _told(owner: type, name: str, dataclasses: Any) -> object:  # noqa: ANN401 - the module
        default = owner.__record_defaults__.get(name, _MISSING)
        if default is _MISSING:
            return dataclasses.field()
        if isinstance(default, _Factory):
            return dataclasses.field(default_factory=default.make)
        return dataclasses.field(default=default)

    def dataclass(cls: type | None = None, /, *, frozen: bool = False, slots: bool = False) -> Any:  # noqa: ANN401
        """Make a class whose annotated names are its fields a record; see `dataclasses.dataclass`."""
        if cls is None:
            return lambda one: _record(one, frozen, slots)
        return _record(cls, frozen, slots)

    def _record(cls: type, frozen: bool, slots: bool) -> type:
        own = [name for name, hint in vars(cls).get("__annotations__", {}).items() if "ClassVar" not in str(hint)]
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
        def __init__(self: object, *args: object, **named: object) -> None:
            owner = next(one for one in type(self).__mro__ if one.__dict__.get("__init__") is __init__)
            owner.__init__ = made = _make_init(owner, frozen)
            made(self, *args, **named)

        return __init__

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

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the module has
            value = getattr(importlib.import_module("numpy"), name)
            setattr(self, name, value)
            return value

    numpy = _Numpy()
