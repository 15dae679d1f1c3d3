"""The fused AdamW of NVIDIA's apex, with a counter for each parameter. Importing it needs apex."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from apex.optimizers import FusedAdam


class ApexAdamW(FusedAdam):
    """apex's kernel over all tensors at once. It counts steps in the group; here, as with torch's AdamW, each
    parameter's state has the counter, so that checkpoints are the same with either.

    apex's own constructor looks at the parameters and puts options into their groups. Here groups are filled
    later, and replaced when a checkpoint is read: a step makes both good again.
    """

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        super().__init__(params, adam_w_mode=True, **settings)

    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient. Those of a group have made as many steps."""
        self.param_groups_master = [{"params": [None] * len(group["params"])} for group in self.param_groups]
        for group in self.param_groups:
            group.setdefault("bias_correction", True)
            if counters := self._counters(group):
                group["step"] = int(counters[0])
        loss = super().step(closure)
        for group in self.param_groups:
            done = group.pop("step", None)
            for counter in self._counters(group):
                counter.fill_(done)
        return loss

    def _counters(self, group: dict[str, Any]) -> list[torch.Tensor]:
        return [self.state[param]["step"] for param in group["params"] if param.grad is not None]


__all__ = ["ApexAdamW"]
