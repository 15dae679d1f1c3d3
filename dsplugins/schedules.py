"""A schedule is a list of phases over tokens or steps: one idea for learning rate, global batch,
bias update speed and MTP weight.

    [{until: 2000 steps, from: 0, to: 2.2e-4}, {until: 10T, value: 2.2e-4},
     {until: 14.3T, to: 2.2e-5, shape: cosine}, {value: 2.2e-5}]

A phase holds a constant (`value`) or ramps (`from`, `to`). It ends before `until`, in tokens (`469B`, a
number) or `N steps`; the last phase needs no end. A ramp counts from the end of the phase before it, so
that phase must end in the same unit; the first ramp counts from 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
Unit = Literal["tokens", "steps"]


def parse_tokens(raw: Any) -> int:
    """`14.8T`, `469B`, `1_000_000` or a number, as tokens. Raises ValueError."""
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        return round(raw)
    found = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?\d+)?)\s*([KMBT]?)\s*(?:tokens)?\s*", str(raw))
    if not found:
        raise ValueError(f"{raw!r} is not a number of tokens: write 469B, 14.8T or a number")
    return round(float(found[1].replace("_", "")) * UNITS[found[2]])


def parse_until(raw: Any) -> tuple[int, Unit]:
    """`2000 steps` or a number of tokens, as (count, unit). Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9][0-9_]*)\s*steps?\s*", str(raw))
    return (int(found[1].replace("_", "")), "steps") if found else (parse_tokens(raw), "tokens")


@dataclass(frozen=True)
class Phase:
    """From `first` to `last` while the count goes from `begin` to `until`."""

    first: float
    last: float
    begin: int = 0
    """In `unit`; only a ramp looks at it."""
    until: int | None = None
    unit: Unit = "tokens"
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, count: int) -> float:
        """Value at `count` of its unit."""
        if self.first == self.last or self.until is None:
            return self.last
        done = min(max((count - self.begin) / (self.until - self.begin), 0.0), 1.0)
        if self.shape == "cosine":
            return self.last + (self.first - self.last) * (1 + math.cos(math.pi * done)) / 2
        return self.first + (self.last - self.first) * done


@dataclass(frozen=True)
class Schedule:
    """Phases in order; a pure function of the steps and tokens that lie behind."""

    phases: tuple[Phase, ...]
    raw: Any = None

    @staticmethod
    def constant(value: float) -> Schedule:
        """The same value for ever."""
        return Schedule((Phase(value, value),), value)

    @staticmethod
    def parse(raw: Any) -> Schedule:
        """A number or a list of phases. Raises ValueError saying which phase is wrong and why."""
        if isinstance(raw, Schedule):
            return raw
        if isinstance(raw, int | float) and not isinstance(raw, bool):
            return Schedule.constant(raw)
        if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
            raise ValueError(f"{raw!r} is not a schedule: give a number or a list of phases")
        phases: list[Phase] = []
        for index, item in enumerate(raw):
            try:
                phases.append(_phase(item, phases, index == len(raw) - 1))
            except ValueError as error:
                raise ValueError(f"phase {index + 1}: {error}") from None
        return Schedule(tuple(phases), [dict(item) for item in raw])

    def at(self, steps: int, tokens: int) -> float:
        """Value of the step that has `steps` steps and `tokens` tokens behind it."""
        for phase in self.phases:
            count = steps if phase.unit == "steps" else tokens
            if phase.until is None or count < phase.until:
                return phase.at(count)
        return self.phases[-1].last

    def at_multiple(self, steps: int, tokens: int, multiple: int) -> int:
        """Value rounded down to a multiple of `multiple`, at least one of it."""
        return max(int(self.at(steps, tokens) + 1e-6) // multiple, 1) * multiple

    @property
    def is_constant(self) -> bool:
        """Whether it never changes."""
        return len({value for phase in self.phases for value in (phase.first, phase.last)}) == 1

    def distinct(self, multiple: int) -> list[int]:
        """Every value that `at_multiple` can take, ascending."""
        found: set[int] = set()
        for phase in self.phases:
            low, high = sorted((phase.first, phase.last))
            first, last = (max(int(v + 1e-6) // multiple, 1) for v in (low, high))
            found.update(count * multiple for count in range(first, last + 1))
        return sorted(found)

    def to_raw(self) -> Any:
        """As a recipe writes it."""
        return self.raw

    def __str__(self) -> str:
        if not isinstance(self.raw, list):
            return f"{self.raw:g}"
        return "; ".join(", ".join(f"{k} {v}" for k, v in item.items()) for item in self.raw)


def _phase(item: Any, before: Sequence[Phase], is_last: bool) -> Phase:
    if not isinstance(item, Mapping):
        raise ValueError(f"{item!r} is not a mapping")
    unknown = set(item) - {"until", "from", "to", "value", "shape"}
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(map(str, unknown)))}; known: until, from, to, value, shape")
    if ("value" in item) == ("to" in item):
        raise ValueError("give `value` (constant) or `to` (ramp), one of them")
    until, unit = parse_until(item["until"]) if item.get("until") is not None else (None, "tokens")
    if until is None and not is_last:
        raise ValueError("only the last phase may leave out `until`")
    same = [phase.until for phase in before if phase.unit == unit and phase.until is not None]
    if until is not None and same and until <= same[-1]:
        raise ValueError(f"ends at {until} {unit}, not after the phase before it ({same[-1]})")
    if "value" in item:
        if "from" in item or "shape" in item:
            raise ValueError("a constant has no `from` or `shape`")
        value = _number(item["value"], "value")
        return Phase(value, value, 0, until, unit)  # type: ignore[arg-type]
    return _ramp(item, before, until, unit)  # type: ignore[arg-type]


def _ramp(item: Mapping[str, Any], before: Sequence[Phase], until: int | None, unit: Unit) -> Phase:
    if until is None:
        raise ValueError("a ramp needs `until`")
    if "from" not in item and not before:
        raise ValueError("the first ramp needs `from`")
    if before and before[-1].unit != unit:
        raise ValueError(f"a ramp in {unit} can't follow a phase that ends in {before[-1].unit}: use one unit")
    shape = item.get("shape", "linear")
    if shape not in ("linear", "cosine"):
        raise ValueError(f"shape {shape!r} is neither linear nor cosine")
    begin = (before[-1].until or 0) if before else 0
    first = _number(item["from"], "from") if "from" in item else before[-1].last
    return Phase(first, _number(item["to"], "to"), begin, until, unit, shape)


def _number(raw: Any, name: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise ValueError(f"{name}: {raw!r} is not a number")
    return raw
