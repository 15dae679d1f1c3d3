"""Which tensors of one linear have power-of-two scales, and what is kept of its input for backward.

Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

import torch

from dsplugins.numerics.watch import Watch
from dsplugins.plugins.precision.fp8.backends import Deferred

if TYPE_CHECKING:
    from dsplugins.plugins.precision.fp8.arithmetic import Arithmetic

Scales = Literal["report", "power_of_two"]
Name = Literal["fprop", "dgrad", "wgrad"]
"""A product of a linear in the report's words: output, gradient of the input, gradient of the weight."""
ALL: tuple[Name, ...] = ("fprop", "dgrad", "wgrad")

KEPT_HIGH = ("mtp_eh_proj",)
"""Linears (core's `tp_comm_buffer_name`) that stay in BF16, as in the checkpoints that DeepSeek published."""


@dataclass(frozen=True)
class Choice:
    """What the options of `fp8_v3` say of all linears."""

    backend: str = "reference"
    scales: Scales = "report"
    products: tuple[Name, ...] = ALL
    keep_weights: bool = False


@dataclass(frozen=True)
class Rule:
    """Of one linear: what computes, and how.

    A flag goes for both directions of a tensor's tiles, along channels and along tokens.
    """

    arithmetic: Arithmetic = field(compare=False)
    """What quantises and multiplies."""
    input: bool = False
    """Power-of-two scales for the input."""
    gradient: bool = False
    """Power-of-two scales for the gradient of the output."""
    weight: bool = False
    """Power-of-two scales for the weight."""
    keeps: Literal["e4m3", "e5m6", "nothing"] = "e4m3"
    """Format in which the input is kept for the weight gradient."""
    products: tuple[Name, ...] = ALL
    """Those that take FP8 operands; the others take what they would be made of."""
    keep_weights: bool = False
    """Whether a weight's codes serve all micro-batches of a step."""
    watch: Watch = field(default_factory=Watch, compare=False)
    """Sees what is quantised by this rule."""

    def now(self) -> Rule:
        """This rule, or `forward_only` while autograd is off: in evaluation, and before recomputation."""
        return self if torch.is_grad_enabled() else self.forward_only

    @cached_property
    def forward_only(self) -> Rule:
        """The same where no backward follows: nothing is kept, and nobody watches what comes again."""
        return replace(self, keeps="nothing", watch=Watch())


def rule_for(linear: str, routed: bool, choice: Choice) -> Rule | None:
    """The rule of a linear, by core's `tp_comm_buffer_name` and whether it is a routed expert's.

    The report has power-of-two scales in three places (arXiv 2412.19437, 3.3.3): the input of the linear
    after attention, the input of the experts' up-projection, which was dispatched, and the gradient before
    the experts' down-projection. `power_of_two` has them everywhere, as V3.1. None: the linear stays in BF16.
    """
    if linear in KEPT_HIGH:
        return None
    everywhere = choice.scales == "power_of_two"
    return Rule(
        cast("Arithmetic", Deferred(choice.backend)),
        input=everywhere or linear == "proj" or (routed and linear == "fc1"),
        gradient=everywhere or (routed and linear == "fc2"),
        weight=everywhere,
        keeps="e5m6" if linear == "proj" else "e4m3",
        products=choice.products,
        keep_weights=choice.keep_weights,
    )
