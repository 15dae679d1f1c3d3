"""Recipe values -> dataclasses, with every fault reported: unknown keys, wrong types, ranges."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dsplugins.contracts import Problem, Range
from dsplugins.schedules import Schedule


class Misfit(ValueError):
    """A value that does not fit its type; the message continues `KEY=VALUE `."""


def build(cls: Any, values: Mapping[str, Any], prefix: str, who: str) -> tuple[Any, list[Problem]]:
    """(an instance of dataclass `cls`, []) or (None, all problems); `prefix`: dotted key of `values`."""
    if not isinstance(values, Mapping):
        return None, [Problem(f"{prefix}={values!r} is not a mapping", prefix, "write KEY: VALUE below it")]
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {field.name: field for field in fields(cls)}
    problems = [unknown(key, known, prefix, who) for key in values if key not in known]
    built: dict[str, Any] = {}
    for name, field in known.items():
        key = f"{prefix}.{name}"
        if name in values:
            try:
                built[name] = convert(hints[name], values[name])
            except ValueError as error:
                said = f"{key}={values[name]!r} {error}" if isinstance(error, Misfit) else f"{key}: {error}"
                problems.append(Problem(said, key, _first_line(cls, name)))
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(Problem(f"{key} is missing", key, _first_line(cls, name)))
    return (None, problems) if problems else (cls(**built), [])


def unknown(key: Any, known: Any, prefix: str, who: str) -> Problem:
    """The problem of a key that nobody knows, with the nearest right name."""
    near = difflib.get_close_matches(str(key), list(known), n=1)
    remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"[:400]
    return Problem(f"{prefix}.{key} is not an option of {who}", f"{prefix}.{key}", remedy)


def convert(hint: Any, value: Any) -> Any:
    """`value` as `hint`. Raises Misfit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        converted = convert(arguments[0], value)
        for bound in arguments[1:]:
            if isinstance(bound, Range) and converted is not None:
                _within(bound, converted)
        return converted
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _either(arguments, value)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool) != any(isinstance(a, bool) for a in arguments):
            raise Misfit(f"is not one of {', '.join(map(str, arguments))}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise Misfit("is not a list")
        return origin(convert(arguments[0], item) for item in value)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise Misfit("is not a mapping")
        return {k: convert(arguments[1], v) for k, v in value.items()}
    return _scalar(hint, value)


def _scalar(hint: Any, value: Any) -> Any:
    if hint is Schedule:
        return Schedule.parse(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise Misfit(f"is not {words.get(hint, getattr(hint, '__name__', str(hint)))}")


def _either(arguments: tuple[Any, ...], value: Any) -> Any:
    if value is None:
        if type(None) in arguments:
            return None
        raise Misfit("is empty")
    faults = []
    for hint in arguments:
        if hint is type(None):
            continue
        try:
            return convert(hint, value)
        except ValueError as error:
            faults.append(error)
    raise faults[0]


def _within(bound: Range, value: Any) -> None:
    numbers: tuple[float, ...] = (value,) if isinstance(value, int | float) else ()
    if isinstance(value, Schedule):
        numbers = (value.lowest, value.highest)
    for number in numbers:
        low = bound.minimum is not None and number < bound.minimum
        high = bound.maximum is not None and number > bound.maximum
        if low or high:
            ends = ["" if end is None else f"{end:g}" for end in (bound.minimum, bound.maximum)]
            raise Misfit(f"is out of range ({' to '.join(ends).strip()})")


def _first_line(cls: type, name: str) -> str:
    return field_docs(cls).get(name, "").split("\n")[0]


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the docstring below it, read from the source of a dataclass."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    docs, body = {}, tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
    for this, following in zip(body, body[1:], strict=False):
        if (
            isinstance(this, ast.AnnAssign)
            and isinstance(this.target, ast.Name)
            and isinstance(following, ast.Expr)
        ):
            value = following.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs[this.target.id] = inspect.cleandoc(value.value)
    return docs


def check_megatron(cls: type, values: Mapping[str, Any], prefix: str) -> list[Problem]:
    """Unknown fields and plainly wrong scalars among fields of a megatron-core dataclass."""
    known = {field.name: field for field in fields(cls)}
    problems = []
    for name, value in values.items():
        key = f"{prefix}.{name}"
        if name not in known:
            problems.append(unknown(name, known, prefix, f"megatron-core's {cls.__name__}"))
            continue
        wanted = _scalars(known[name].type)
        if wanted and not _fits(wanted, value):
            said = f"{key}={value!r} is not {' or '.join(sorted(w.__name__ for w in wanted))}"
            problems.append(Problem(said, key, f"see megatron-core's {cls.__name__}.{name}"))
    return problems


def _scalars(hint: Any) -> set[type]:
    """The scalar types of an annotation; empty when it holds anything else, and then nothing is checked."""
    if isinstance(hint, str):
        return set()
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return set(parts) if all(part in (int, float, bool, str, type(None)) for part in parts) else set()


def _fits(wanted: set[type], value: Any) -> bool:
    if isinstance(value, bool):
        return bool in wanted
    return isinstance(value, tuple(wanted)) or (float in wanted and isinstance(value, int))
