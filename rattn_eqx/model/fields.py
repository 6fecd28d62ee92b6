"""The fields of a frozen dataclass, held to the types that they are declared with.

A value comes from a caller, from JSON, or from the command line: all pass here.
"""

import dataclasses
import math
import operator
import types
import typing
from typing import Any, Literal


def settle(config: Any) -> None:
    """Give every field of a frozen dataclass the type that it is declared with, where the value stays the same.

    np.int64(4) is 4, np.float32(0.5) is 0.5 and a list is a tuple. For `__post_init__`.

    Raises:
      ValueError: for a value of another type, and for a number that is not finite or beyond 64 bits; names class, field
        and value.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name = f"{type(config).__name__}: {field.name}"
        object.__setattr__(config, field.name, _settled(name, getattr(config, field.name), hints[field.name]))


def made(kind: type, values: dict[str, Any]) -> Any:
    """A frozen dataclass of values that JSON held; a ValueError that names a field it lacks or does not have."""
    default = lambda field: (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
    fields = {field.name: not default(field) for field in dataclasses.fields(kind)}
    unknown = [name for name in values if name not in fields]
    missing = [name for name, needed in fields.items() if needed and name not in values]
    if unknown or missing:
        raise ValueError(
            f"{kind.__name__}: missing {', '.join(missing) or 'none'}, unknown {', '.join(unknown) or 'none'}"
        )
    return kind(**values)


def _settled(name: str, value: Any, hint: Any) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if value is None and types.NoneType in parts:
        return None
    refusal = ValueError(f"{name} must be {_in_words(hint)}; got {value!r:.80}")
    if hint is bool or hint in (int, float) or (float in parts and int in parts):
        return _number(value, hint, refusal)
    if origin is Literal:
        if not any(type(value) is type(part) and value == part for part in parts):
            raise refusal
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise refusal
        return tuple(_settled(f"{name}[{i}]", part, parts[0]) for i, part in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise refusal
        return {key: _settled(f"{name}[{key!r}]", part, parts[1]) for key, part in value.items()}
    if origin is types.UnionType:
        parts = [part for part in parts if part is not types.NoneType]
        if len(parts) == 1:
            return _settled(name, value, parts[0])
        for part in parts:
            try:
                return _settled(name, value, part)
            except ValueError:
                continue
        raise refusal
    if hasattr(hint, "__dataclass_fields__") and isinstance(value, dict):
        return made(hint, value)
    if not isinstance(value, hint):
        raise refusal
    return value


def _number(value: Any, hint: Any, refusal: ValueError) -> bool | int | float:
    if (type(value).__name__ in ("bool", "bool_")) is not (hint is bool):
        raise refusal
    try:
        number = bool(value) if hint is bool else operator.index(value)
    except TypeError:
        if hint is int or isinstance(value, str | bytes):
            raise refusal from None
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise refusal from None
    if not (math.isfinite(number) if isinstance(number, float) else -(2**63) <= number < 2**63):
        raise refusal
    return number


def _in_words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (tuple, dict):
        return f"a {origin.__name__}, each {_in_words(parts[-1] if origin is dict else parts[0])}"
    if float in parts and int in parts:
        return "a finite number" + (" or nothing" if types.NoneType in parts else "")
    if origin is types.UnionType:
        return " or ".join(map(_in_words, parts))
    names = {int: "an integer of at most 64 bits", float: "a finite number", bool: "true or false", str: "text"}
    names[types.NoneType] = "nothing"
    return names.get(hint, getattr(hint, "__name__", str(hint)))
