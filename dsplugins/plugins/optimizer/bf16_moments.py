"""AdamW that keeps both moments in BF16."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


class Bf16MomentsAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with `exp_avg` and `exp_avg_sq` in BF16 between steps.

    A step widens both moments to FP32, does AdamW's arithmetic there, updates the (FP32) parameter
    from the FP32 moments, and rounds the moments to nearest BF16. Rounding is not stochastic: with
    decay rates up to 1 - 2**-8 a moment always moves (V3: 0.9 and 0.95), so the error stays a
    relative 2**-9 a step. Source: arXiv 2412.19437, section 3.3.3.

    Temporary memory: FP32 copies of one parameter's moments at a time.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. A closure is refused."""
        if closure is not None:
            raise ValueError("Bf16MomentsAdamW takes no closure")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: torch.Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            for key in MOMENTS:
                state[key] = torch.zeros_like(param, dtype=torch.bfloat16)
        state["step"] += 1
        step = state["step"].item()
        beta1, beta2 = group["betas"]
        gradient = param.grad.float()  # type: ignore[union-attr]
        first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        denominator = (second.sqrt_() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments stay BF16 (torch would widen them to the parameter's type).

        Raises `ValueError` when the saved moments are of another type: rounding them is a change of
        the run that nobody asked for.
        """
        for index, state in state_dict["state"].items():
            for key in MOMENTS:
                if key in state and state[key].dtype != torch.bfloat16:
                    raise ValueError(
                        f"{key} of parameter {index} was saved as {state[key].dtype}, this run keeps BF16 "
                        "moments: set plugins.adamw.moments as in the run that saved it"
                    )
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key in MOMENTS:
                if key in state:
                    state[key] = state[key].to(torch.bfloat16)  # exact: these were BF16 before
