"""A plugin's `Options` as rows: name, type in words, default, docstring."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dsplugins.contracts import Range
from dsplugins.schedules import Schedule
from dsplugins.typed import field_docs


def options(cls: type) -> list[dict[str, Any]]:
    """Each field of an `Options` dataclass: `name`, `type`, `needed`, `default`, `about`."""
    docs = field_docs(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    return [
        {
            "name": field.name,
            "type": words(hints[field.name]),
            "needed": field.default is MISSING and field.default_factory is MISSING,
            "default": _default(field),
            "about": docs.get(field.name, ""),
        }
        for field in fields(cls)
    ]


def words(hint: Any) -> str:
    """A type hint in the words of a recipe's writer: `number, 0.0 to 1.0`, `fp32 | bf16`, `list of text`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return ", ".join([words(arguments[0]), *(_bounds(a) for a in arguments[1:] if isinstance(a, Range))])
    if origin in (Union, types.UnionType):
        return " | ".join(words(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (tuple, list):
        return f"list of {words(arguments[0])}"
    plain = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    plain |= {type(None): "null", Schedule: "number or schedule"}
    return plain.get(hint, getattr(hint, "__name__", str(hint)))


def _bounds(bound: Range) -> str:
    if bound.minimum is None:
        return f"at most {bound.maximum}"
    return f"at least {bound.minimum}" if bound.maximum is None else f"{bound.minimum} to {bound.maximum}"


def _default(field: Field[Any]) -> Any:
    """The default as a recipe would write it; None where the option must be given."""
    value = field.default
    if value is MISSING and field.default_factory is not MISSING:
        value = field.default_factory()
    if value is MISSING:
        return None
    return value.to_raw() if isinstance(value, Schedule) else value
