"""Schedules: a number, or phases over tokens or steps. One idea for learning rate, batch, gamma and lambda.

A recipe writes a number, or a list of phases:

    [{until: 2000 steps, from: 0, to: 2.2e-4}, {until: 10T, value: 2.2e-4},
     {until: 14.3T, to: 2.2e-5, shape: cosine}, {value: 7.3e-6}]

`until` counts tokens (`469B`, `10T`, a number) or `N steps`, always from the start of training. A phase
holds a `value`, or goes `from` one value `to` another; `from` defaults to where the phase before ended.

The value is a pure function of (steps, tokens), so that a resumed run needs no state. The phase in force
is the first one whose `until` is not reached; at `until` itself the next one is in force. A ramp counts
its progress in the unit of its own `until`, from the `until` of the phase before. Where that one counts
in the other unit there is no such number, so the ramp is refused; the first phase starts at 0, and a
`value` needs no start.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, cast

Unit = Literal["tokens", "steps"]
Shape = Literal["constant", "linear", "cosine"]

_SUFFIXES = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
_COUNT = re.compile(r"(?P<number>\d+(\.\d+)?([eE]\+?\d+)?)\s*(?P<suffix>[KMBT]?)")
_STEPS = re.compile(r"(?P<count>.*?)\s*steps?")
_KEYS = ("until", "from", "to", "value", "shape")
_SLACK = 1e-12
"""Relative: a ramp's float may lie a hair below the multiple that it stands for."""


def parse_tokens(raw: object) -> int:
    """`14.8T` -> 14_800_000_000_000. K, M, B, T are 10^3, 10^6, 10^9, 10^12; a number stands for itself.

    Raises ValueError for anything that is not a whole, non-negative count.
    """
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError(f"{raw!r} is not a count such as 469B, 14.8T or 1000000")
    match = _COUNT.fullmatch(str(raw).strip())
    if match is None:
        raise ValueError(f"{raw!r} is not a count such as 469B, 14.8T or 1000000")
    number = Decimal(match["number"])
    # Before scaling, which overflows; nor should `1e999999999` become an integer of as many digits.
    exact = number.scaleb(_SUFFIXES[match["suffix"]]) if number <= Decimal("1e30") else number
    if exact > Decimal("1e30") or exact != exact.to_integral_value():
        raise ValueError(f"{raw!r} is not a whole number of anything, or too large")
    return int(exact)


def format_tokens(count: int) -> str:
    """14_633_000_000_000 -> `14.633T`; digits where no suffix says it exactly in three decimals."""
    for suffix, power in reversed(_SUFFIXES.items()):
        scaled = Decimal(count).scaleb(-power)
        if scaled >= 1 and scaled == round(scaled, 3):
            return f"{scaled.normalize():f}{suffix}"
    return str(count)


@dataclass(frozen=True)
class Phase:
    """One stretch of a schedule; `Schedule.parse` makes them."""

    start: float
    """Value at `since`."""
    end: float
    """Value that the phase arrives at when `until` is reached; `start` again for a constant."""
    shape: Shape = "constant"
    until: int | None = None
    """Tokens or steps since the start of training at which the phase is over; None: never."""
    unit: Unit = "tokens"
    """What `until` and `since` count."""
    since: int = 0
    """Where a ramp starts, in `unit`. Constants don't look at it."""

    def over(self, steps: int, tokens: int) -> bool:
        """Whether the phase is behind us."""
        return self.until is not None and self._done(steps, tokens) >= self.until

    def at(self, steps: int, tokens: int) -> float:
        """Value while the phase is in force. Never outside of `start` to `end`."""
        if self.shape == "constant" or self.until is None:
            return self.end
        share = (self._done(steps, tokens) - self.since) / (self.until - self.since)
        share = min(max(share, 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        low, high = sorted((self.start, self.end))
        return min(max(self.start + (self.end - self.start) * share, low), high)

    def _done(self, steps: int, tokens: int) -> int:
        return tokens if self.unit == "tokens" else steps

    def to_raw(self) -> dict[str, Any]:
        """The phase as a recipe writes it, with `from` spelled out."""
        raw: dict[str, Any] = {}
        if self.until is not None:
            raw["until"] = format_tokens(self.until) if self.unit == "tokens" else f"{self.until} steps"
        if self.shape == "constant":
            return raw | {"value": _tidy(self.end)}
        raw |= {"from": _tidy(self.start), "to": _tidy(self.end)}
        return raw | ({"shape": "cosine"} if self.shape == "cosine" else {})

    def __str__(self) -> str:
        raw = self.to_raw()
        said = f"{raw['from']} to {raw['to']}" if "to" in raw else f"{raw['value']}"
        said += " (cosine)" if self.shape == "cosine" else ""
        return said + (f" until {raw['until']}" if "until" in raw else "")


@dataclass(frozen=True)
class Schedule:
    """A value that may change in the course of a run. After the last phase its end value holds.

    An option of this type takes a number or phases: `rate: Annotated[Schedule, Range(0.0, 1.0)] =
    Schedule.constant(0.1)` in a plugin's `Options`. `options.rate.at(steps, tokens)` is the value of the
    step that has so much behind it: 0 and 0 for the first, `step.step` and `step.tokens` of `ds_step_end`
    for the next one. A module can't ask, since it knows neither: where megatron-core's configuration has a
    field for the value that is read anew in each step, give the whole schedule to `ds_settings`
    (`{"model.moe_router_bias_update_rate": self.options.rate}`), and read the field of `self.config` in
    `forward`.
    """

    phases: tuple[Phase, ...]

    @classmethod
    def constant(cls, value: float) -> Schedule:
        """The same value always."""
        return cls((Phase(float(value), float(value)),))

    @classmethod
    def parse(cls, raw: object) -> Schedule:
        """A schedule from what a recipe holds: a number or a list of phases. Raises ValueError."""
        if isinstance(raw, Schedule):
            return raw
        if _is_number(raw):
            return cls.constant(cast(float, raw))
        if isinstance(raw, str | bytes) or not isinstance(raw, Sequence):
            hint = "; put the phase into [ ]" if isinstance(raw, Mapping) else ""
            raise ValueError(f"{raw!r} is not a number nor a list of phases{hint}")
        if not raw:
            raise ValueError("a list of phases needs at least one phase")
        faults = [f"phase {i}: {fault}" for i, phase in enumerate(raw, 1) for fault in _form_faults(phase)]
        if faults:
            raise ValueError("; ".join(faults))
        phases = _chain(raw, faults)
        if faults:
            raise ValueError("; ".join(faults))
        return cls(tuple(phases))

    def at(self, steps: int, tokens: int) -> float:
        """Value after `steps` optimizer steps and `tokens` tokens of the whole cluster."""
        now = (phase for phase in self.phases if not phase.over(steps, tokens))
        phase = next(now, None)
        return phase.at(steps, tokens) if phase else self.phases[-1].end

    def at_multiple(self, steps: int, tokens: int, multiple: int) -> int:
        """Value rounded down to a multiple of `multiple`, at least one multiple: a batch size."""
        return multiple * _multiples(self.at(steps, tokens), multiple)

    def distinct(self, multiple: int) -> list[int]:
        """Every value that `at_multiple` can take, sorted. The ends of a ramp count as reached."""
        counts: set[int] = set()
        for phase in self.phases:
            low, high = sorted((phase.start, phase.end))
            counts.update(range(_multiples(low, multiple), _multiples(high, multiple) + 1))
        return [multiple * count for count in sorted(counts)]

    def settled(self, steps: int, tokens: int) -> bool:
        """Whether it no longer changes from here on."""
        *earlier, last = self.phases
        constant = last.start == last.end or last.over(steps, tokens)
        return constant and all(phase.over(steps, tokens) for phase in earlier)

    @property
    def is_constant(self) -> bool:
        """Whether the value never changes."""
        return self.lowest == self.highest

    @property
    def lowest(self) -> float:
        """Smallest value anywhere in it."""
        return min(min(phase.start, phase.end) for phase in self.phases)

    @property
    def highest(self) -> float:
        """Largest value anywhere in it."""
        return max(max(phase.start, phase.end) for phase in self.phases)

    def to_raw(self) -> int | float | list[dict[str, Any]]:
        """The schedule as a recipe writes it; `parse` takes it back to an equal one."""
        first = self.phases[0]
        if len(self.phases) == 1 and first.shape == "constant" and first.until is None:
            return _tidy(first.end)
        return [phase.to_raw() for phase in self.phases]

    def __str__(self) -> str:
        return ", then ".join(map(str, self.phases))


def _multiples(value: float, multiple: int) -> int:
    if multiple < 1:
        raise ValueError(f"a multiple of {multiple} makes no sense: give 1 or more")
    return max(1, math.floor(value / multiple * (1 + _SLACK)))


def _tidy(value: float) -> int | float:
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def _is_number(raw: object) -> bool:
    return isinstance(raw, int | float) and not isinstance(raw, bool) and math.isfinite(raw)


def _form_faults(raw: object) -> Iterator[str]:
    """What is wrong with one phase, whatever stands around it."""
    if not isinstance(raw, Mapping):
        yield f"{raw!r} is not a mapping like {{until: 10T, value: 0.3}}"
        return
    for key in raw:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"a phase has {', '.join(_KEYS)}"
            yield f"{key} is unknown, {hint}"
    for key in ("from", "to", "value"):
        if key in raw and not _is_number(raw[key]):
            yield f"{key}: {raw[key]!r} is not a finite number"
    if "value" in raw and raw.keys() & {"from", "to", "shape"}:
        yield "value holds still, from/to/shape move: give one or the other"
    elif "value" not in raw and "to" not in raw:
        yield "needs value, or to"
    if raw.get("shape", "linear") not in ("linear", "cosine"):
        yield f"shape: {raw['shape']!r} is neither linear nor cosine"
    if "until" in raw:
        yield from _until_faults(raw["until"])
    elif "to" in raw:
        yield "a ramp needs until, to know when it arrives"


def _until_faults(raw: object) -> Iterator[str]:
    try:
        count, _ = _until(raw)
    except ValueError as error:
        yield f"until: {error}; or write N steps"
    else:
        if count < 1:
            yield f"until: {raw!r} is over before it starts"


def _until(raw: object) -> tuple[int, Unit]:
    steps = _STEPS.fullmatch(raw.strip()) if isinstance(raw, str) else None
    return (parse_tokens(steps["count"]), "steps") if steps else (parse_tokens(raw), "tokens")


def _chain(raw: Sequence[Mapping[str, Any]], faults: list[str]) -> list[Phase]:
    """Phases of well-formed mappings; adds to `faults` what is wrong with one after the other."""
    phases: list[Phase] = []
    for number, item in enumerate(raw, 1):
        until: int | None = None
        unit: Unit = "tokens"
        if "until" in item:
            until, unit = _until(item["until"])
        last = phases[-1] if phases else None
        faults += [f"phase {number}: {fault}" for fault in _chain_faults(item, until, unit, phases)]
        end = float(item.get("value", item.get("to")))
        start = float(item.get("from", last.end if last else end)) if "to" in item else end
        shape = cast(Shape, item.get("shape", "linear") if "to" in item else "constant")
        # A constant has no start, so that equal schedules are equal objects.
        since = last.until or 0 if last and "to" in item else 0
        phases.append(Phase(start, end, shape, until, unit, since))
    return phases


def _chain_faults(
    item: Mapping[str, Any], until: int | None, unit: Unit, before: Sequence[Phase]
) -> Iterator[str]:
    last = before[-1] if before else None
    if last is None:
        if "to" in item and "from" not in item:
            yield "the first phase has no value before it: give from"
        return
    if last.until is None:
        yield "never reached: the phase before it has no until"
        return
    if "to" in item and last.unit != unit:
        yield (
            f"a ramp that ends at {unit} can't start where the phase before it ends, which is counted in "
            f"{last.unit}: count both in {unit}, or put a value phase with until in {unit} between them"
        )
    ends = [phase.until for phase in before if phase.until is not None and phase.unit == unit]
    if until is not None and ends and until <= max(ends):
        yield f"until {item['until']} is not after the until of an earlier phase"


__all__ = ["Phase", "Schedule", "Shape", "Unit", "format_tokens", "parse_tokens"]
