"""Core's SequentialMLP of experts of another class than core's own."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.nn.functional import pad

from dsplugins.plugins.experts.cpu_products import rounded


class SequentialExperts(SequentialMLP):
    """As core's, but each expert is an `mlp`. Core names its own class where it makes them."""

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: MLPSubmodules,
        mlp: type[MLP],
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(0, config, submodules, pg_collection, name)
        self.num_local_experts = num_local_experts
        for index in range(num_local_experts):
            expert = mlp(
                self.config,
                submodules,
                ffn_hidden_size=self.config.moe_ffn_hidden_size,
                is_expert=True,
                tp_group=self.tp_group,
                name=f"{name}.local_experts.{index}" if name is not None else None,
            )
            self.local_experts.append(expert)


class FewShapesMLP(MLP):
    """An expert of BF16 on a CPU: core's, with rows of zeros up to one of few sizes (see `cpu_products`)."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **others: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [T, H], scales [T] -> [T, H]."""
        rows = hidden_states.shape[0]
        more = rounded(rows) - rows
        if not more or hidden_states.device.type != "cpu":
            return super().forward(hidden_states, per_token_scale, **others)
        if per_token_scale is not None:
            per_token_scale = pad(per_token_scale, (0, more))
        output, bias = super().forward(pad(hidden_states, (0, 0, 0, more)), per_token_scale, **others)
        return output[:rows], bias
