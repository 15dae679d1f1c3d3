"""What training costs, by arithmetic: operations of a token, days, GPU-hours, money (report, table 1).

Counted as published figures are: two operations a multiply-add, backward twice forward, nothing for what is
computed again, MTP or the embedding's lookup; with and without the half that a causal mask leaves out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsplugins.contracts import Plan

PASSES = 3
"""Forward, and twice as much backward: for inputs and for weights."""


@dataclass(frozen=True)
class TokenWork:
    """What training on one token takes, on average over a sequence."""

    weights: int
    """That a token is multiplied with: activated ones, the head's, none of the embedding."""
    pairs: int
    """Multiply-adds of one query with one key and its value, over heads and layers."""
    sequence: int

    @property
    def causal(self) -> float:
        """Operations where a query meets the keys up to its own."""
        return 2.0 * PASSES * (self.weights + self.pairs * (self.sequence + 1) / 2)

    @property
    def unmasked(self) -> float:
        """Operations where each query meets all keys of its sequence."""
        return 2.0 * PASSES * (self.weights + self.pairs * self.sequence)


@dataclass(frozen=True)
class Bill:
    """So many tokens, at so many a second on each of so many processes."""

    tokens: int
    rate: float
    processes: int

    @property
    def seconds(self) -> float:
        """From the first step to the last."""
        return self.tokens / (self.rate * self.processes)

    @property
    def hours(self) -> float:
        """Of all processes together: GPU-hours, where each has one."""
        return self.tokens / self.rate / 3600

    def price(self, of_an_hour: float) -> float:
        """In the currency of `of_an_hour`, which is a process's."""
        return self.hours * of_an_hour


def tokens_of(plan: Plan) -> int:
    """That a run trains on: whole steps, so the last may go beyond `train.tokens`."""
    train, taken, steps = plan.train, 0, 0
    multiple = train.multiple(train.micro_batch * plan.layout.data)
    while not train.over(steps, taken):
        step = train.global_batch.at_multiple(steps, taken, multiple) * plan.data.seq_length
        if train.global_batch.settled(steps, taken):
            return taken + step * _steps_left(plan, steps, taken, step)
        taken, steps = taken + step, steps + 1
    return taken


def _steps_left(plan: Plan, steps: int, taken: int, step: int) -> int:
    train = plan.train
    if train.steps is not None:
        return train.steps - steps
    assert train.tokens is not None, "plan.prepare refuses a run without an end"
    return math.ceil((train.tokens - taken) / step)


__all__ = ["Bill", "TokenWork", "tokens_of"]
