"""JSON into the frozen values of `farebox.values`, by their fields.

A `Credits` named `balance` is read from the exact twin `balance_decimal`. What a later Farebox adds is passed over;
what is missing takes its default, and without one the answer is not Farebox's.
"""

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from datetime import datetime
from decimal import Decimal
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from farebox.credits import Credits

T = TypeVar("T")

Read = Callable[[Any], Any]


def reader(kind: type[T]) -> Callable[[Any], T]:
    """What makes a *kind* of JSON that was decoded. It raises ValueError, TypeError or KeyError for anything else."""
    hashable: Any = kind
    read: Callable[[Any], T] = _reader(hashable)
    return read


@cache
def _reader(kind: Any) -> Read:
    if is_dataclass(kind) and isinstance(kind, type):
        return _object_reader(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (each for each in arguments if each is not types.NoneType)
        read = _reader(inner)
        return lambda value: None if value is None else read(value)
    if origin is tuple:
        read = _reader(arguments[0])
        return lambda value: tuple(map(read, value))
    return SCALARS.get(kind, lambda value: value)


def _object_reader(kind: Any) -> Read:
    hints = get_type_hints(kind)
    plan: list[tuple[str, str, Read, bool]] = []
    for field in fields(kind):
        hint = hints[field.name]
        wire = f"{field.name}_decimal" if hint in (Credits, Credits | None) else field.name
        needed = field.default is MISSING and field.default_factory is MISSING
        plan.append((field.name, wire, _reader(hint), needed))

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"{kind.__name__} is an object")
        found = {name: parse(value[wire]) for name, wire, parse, needed in plan if needed or wire in value}
        return kind(**found)

    return read


def _is(kind: type[T]) -> Callable[[Any], T]:
    def read(value: Any) -> T:
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TypeError(f"{kind.__name__} is expected")
        return value

    return read


def _number(value: Any) -> Decimal:
    """A quantity. The shortest digits of the double are those that were sent."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError("a number is expected")
    return Decimal(str(value))


def _amount(value: Any) -> Credits:
    return Credits(_is(str)(value))


def _time(value: Any) -> datetime:
    return datetime.fromisoformat(_is(str)(value))


SCALARS: Mapping[Any, Read] = {
    str: _is(str),
    int: _is(int),
    bool: _is(bool),
    Decimal: _number,
    Credits: _amount,
    datetime: _time,
}
