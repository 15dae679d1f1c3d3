"""MLPs that hand SwiGLU to their down-projection, and packed experts' two products.

Imported from hook bodies only: it needs torch and megatron-core.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from dsplugins.plugins.precision.fp8.experts import ExpertsUp, SwigluDown
from dsplugins.plugins.precision.fp8.rule import Choice, rule_for
from dsplugins.plugins.precision.fp8.swiglu import SwigluInput


class Fp8MLP(MLP):
    """Core's MLP with SwiGLU inside `linear_fc2`, which keeps its input in FP8 and not its output."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        """[..., H] -> [..., H]; `per_token_scale` [...] multiplies the activation. `others`: what core's
        layer gives to any MLP for the sake of those with experts (a padding mask).
        """
        inner, _ = self.linear_fc1(hidden_states)
        output, _ = self.linear_fc2(SwigluInput(inner, per_token_scale))
        return output, None


class Fp8SharedExpertMLP(SharedExpertMLP, Fp8MLP):
    """Core's shared experts on `Fp8MLP`: their `forward` calls the next class's."""


class Fp8GroupedProducts:
    """The two products of packed experts; see `contracts.GroupedProducts`."""

    def __init__(self, choice: Choice) -> None:
        up, down = (rule_for(name, True, choice) for name in ("fc1", "fc2"))
        assert up is not None and down is not None
        self.rules = up, down
        self.watches = {"linear_fc1": up.watch, "linear_fc2": down.watch}

    def up(self, tokens: torch.Tensor, weight: torch.Tensor, splits: torch.Tensor) -> torch.Tensor:
        """tokens [T, H] times weight [E, 2I, H] transposed: [T, 2I]."""
        return ExpertsUp.apply(tokens, weight, splits.tolist(), self.rules[0].now())

    def down(
        self, inner: torch.Tensor, probs: torch.Tensor, weight: torch.Tensor, splits: torch.Tensor
    ) -> torch.Tensor:
        """SwiGLU of inner [T, 2I] times probs [T], times weight [E, H, I] transposed: [T, H]."""
        return SwigluDown.apply(inner, probs, weight, splits.tolist(), self.rules[1].now())
