"""Recipe values -> dataclasses, with every fault reported: unknown keys, wrong types, ranges."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dsplugins.contracts import Problem, Range
from dsplugins.schedules import Schedule, parse_tokens

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_UNIONS = (Union, types.UnionType)


class Misfit(ValueError):
    """A value that does not fit its type; the message continues `KEY=VALUE `."""


def build(cls: Any, values: Mapping[str, Any], prefix: str, who: str) -> tuple[Any, list[Problem]]:
    """(an instance of dataclass `cls`, []) or (None, every problem); `prefix` is `values`' dotted key."""
    if not isinstance(values, Mapping):
        return None, [Problem(f"{prefix}={values!r} is not a mapping", prefix, "write KEY: VALUE below it")]
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except (NameError, TypeError) as error:
        said = f"{prefix}: the types of {cls.__name__} can't be read: {error}"
        return None, [Problem(said, prefix, "tell its author: import them at the top of the module")]
    known = {field.name: field for field in fields(cls) if field.init}
    problems = [unknown(key, known, prefix, who) for key in values if key not in known]
    built: dict[str, Any] = {}
    for name, field in known.items():
        key = f"{prefix}.{name}"
        if name in values:
            try:
                built[name] = convert(hints[name], values[name])
            except ValueError as error:
                said = (
                    f"{key}={_show(values[name])} {error}" if isinstance(error, Misfit) else f"{key}: {error}"
                )
                problems.append(Problem(said, key, _remedy(cls, name, values[name])))
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(Problem(f"{key} is missing", key, _wanted(_remedy(cls, name, None))))
    if problems:
        return None, problems
    try:
        return cls(**built), []
    except ValueError as error:
        return None, [Problem(f"{prefix}: {error}", prefix, f"change the options of {who} that it names")]


def unknown(key: Any, known: Iterable[str], prefix: str, who: str) -> Problem:
    """The problem of a key that nobody knows, with the nearest right name."""
    names = sorted(known)
    near = difflib.get_close_matches(str(key), names, n=1)
    remedy = (
        f"known: {', '.join(names)}" if 0 < len(names) <= 15 else "see its reference for the names it has"
    )
    remedy = f"did you mean {near[0]}?" if near else remedy if names else "it has no options: drop it"
    return Problem(f"{prefix}.{key} is not an option of {who}", f"{prefix}.{key}", remedy)


def convert(hint: Any, value: Any) -> Any:
    """`value` as the annotation `hint`. Raises Misfit, or ValueError of a Schedule's own words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        converted = convert(arguments[0], value)
        for bound in arguments[1:]:
            if isinstance(bound, Range):
                _within(bound, converted)
        return converted
    if origin in _UNIONS:
        return _either(arguments, value)
    if origin is Literal:
        if not any(type(value) is type(word) and value == word for word in arguments):
            raise Misfit(f"is not one of {', '.join(map(str, arguments))}")
        return value
    container = _container(origin or hint)
    return container(arguments, value) if container else _scalar(hint, value)


def _container(origin: Any) -> Callable[[tuple[Any, ...], Any], Any] | None:
    if origin in (dict, Mapping):
        return _dict
    if origin in (list, Sequence):
        return lambda arguments, value: list(_items(arguments[:1] or (Any,), value))
    if origin is tuple:
        return _tuple
    return None


def _dict(arguments: tuple[Any, ...], value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Misfit("is not a mapping")
    inner = arguments[1] if arguments else Any
    return {key: _inner(inner, item, key) for key, item in value.items()}


def _tuple(arguments: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not arguments or arguments[-1] is Ellipsis:
        return tuple(_items(arguments[:1] or (Any,), value))
    if isinstance(value, list | tuple) and len(value) != len(arguments):
        raise Misfit(f"has {len(value)} items, not {len(arguments)}")
    return tuple(_items(arguments, value))


def _items(hints: tuple[Any, ...], value: Any) -> Iterable[Any]:
    """Items of a list; one hint stands for all, several stand for one each."""
    if not isinstance(value, list | tuple):
        raise Misfit("is not a list")
    each = hints * len(value) if len(hints) == 1 else hints
    return [_inner(hint, item, index) for index, (hint, item) in enumerate(zip(each, value, strict=True))]


def _inner(hint: Any, item: Any, where: object) -> Any:
    try:
        return convert(hint, item)
    except Misfit as error:
        raise Misfit(f"does not fit: its item {where} {error}") from None


def _scalar(hint: Any, value: Any) -> Any:
    if hint is Any:
        return value
    if hint is Schedule:
        return Schedule.parse(value)
    number = isinstance(value, int | float) and not isinstance(value, bool) and not _too_long(value)
    if hint is float and number and not math.isnan(value):
        return float(value)
    if hint is int and number and float(value).is_integer():
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint in (None, type(None)) and value is None:
        return None
    if is_dataclass(hint):
        made, faults = build(hint, value, "", "it")
        if not faults:
            return made
        raise Misfit("does not fit: " + "; ".join(fault.message.lstrip(".") for fault in faults))
    raise Misfit(f"is not {_WORDS.get(hint, getattr(hint, '__name__', str(hint)))}")


def _too_long(value: float) -> bool:
    """Whether it is an integer of so many digits that no float holds it."""
    return isinstance(value, int) and value.bit_length() > 1000


def _either(arguments: tuple[Any, ...], value: Any) -> Any:
    """The first member that fits; a null fits null only, whatever else would take it."""
    if value is None and type(None) in arguments:
        return None
    faults = []
    for hint in arguments:
        if hint is not type(None):
            try:
                return convert(hint, value)
            except ValueError as error:
                faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    raise Misfit(", and ".join(str(fault) for fault in faults))


def _within(bound: Range, value: Any) -> None:
    if isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            _within(bound, item)
        return
    numbers: tuple[float, ...] = ()
    if isinstance(value, int | float) and not isinstance(value, bool):
        numbers = (value,)
    elif isinstance(value, Schedule):
        numbers = (value.lowest, value.highest)
    for number in numbers:
        low = bound.minimum is not None and number < bound.minimum
        high = bound.maximum is not None and number > bound.maximum
        if low or high:
            raise Misfit(f"is out of range ({_bounds(bound)})")


def _bounds(bound: Range) -> str:
    if bound.maximum is None:
        return f"{bound.minimum:g} or more"
    return (
        f"{bound.maximum:g} or less" if bound.minimum is None else f"{bound.minimum:g} to {bound.maximum:g}"
    )


def _show(value: Any) -> str:
    """A value as a recipe writes it, cut where it is long."""
    words = {None: "null", True: "true", False: "false"}
    said = words[value] if value is None or isinstance(value, bool) else repr(value)
    return said if len(said) <= 80 else said[:77] + "..."


def _remedy(cls: type, name: str, value: Any) -> str:
    """How to write a token count as a number, or else what the field's docstring says."""
    try:
        if isinstance(value, str) and value[-1:] in tuple("KMBT"):
            return f"write it as a number: {parse_tokens(value):.15g}"
    except ValueError:
        pass
    return field_docs(cls).get(name, "").split("\n")[0]


def _wanted(told: str) -> str:
    """What is to be set, after what its docstring says of it."""
    if not told:
        return "set it"
    return f"set it: {told[0].lower() if told[1:2].islower() else told[0]}{told[1:]}"


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the docstring below it, of a dataclass and what it inherits from; {} without source."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
        for this, following in zip(body, body[1:], strict=False):
            text = _text(following)
            if isinstance(this, ast.AnnAssign) and isinstance(this.target, ast.Name) and text is not None:
                docs[this.target.id] = inspect.cleandoc(text)
    return docs


def _text(statement: ast.stmt) -> str | None:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


NULLABLE = ("q_lora_rank",)
"""Fields that megatron-core declares as numbers and reads as "none of it" when null: queries without a latent
(transformer/multi_latent_attention.py)."""


def check_megatron(cls: Any, values: Mapping[str, Any], prefix: str) -> list[Problem]:
    """Unknown fields and plainly wrong values among fields of a megatron-core dataclass.

    Annotations of scalars, `Literal`s and plain classes (an enum, torch.dtype) are checked; a field's own
    default always fits, and null where core reads it; callables and anything else that is not plain take
    any value.
    """
    known = {field.name: field for field in fields(cls) if field.init}
    problems = []
    for name, value in values.items():
        key = f"{prefix}.{name}"
        if name not in known:
            problems.append(unknown(name, known, prefix, f"megatron-core's {cls.__name__}"))
            continue
        hint = known[name].type
        default = known[name].default
        if value is None and name in NULLABLE:
            continue
        if not _fits(hint, value) and not (type(value) is type(default) and value == default):
            said = f"{key}={_show(value)} is not {_named(hint)}"
            problems.append(Problem(said, key, f"see megatron-core's {cls.__name__}.{name}"))
    return problems


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(_fits(member, value) for member in arguments)
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in arguments)
    if origin in (list, tuple):
        return isinstance(value, list | tuple)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float)
    return not isinstance(hint, type) or isinstance(value, hint)


def _named(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return " or ".join(_named(member) for member in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple):
        return "a list"
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}, which a recipe can't write")


__all__ = ["Misfit", "build", "check_megatron", "convert", "field_docs", "unknown"]
