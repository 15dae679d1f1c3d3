"""Core's SequentialMLP of experts of another class than core's own."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP


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
