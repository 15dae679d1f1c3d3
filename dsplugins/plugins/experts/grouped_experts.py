"""The module of `grouped`."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import grouped_mm


class GroupedExperts(MegatronModule):
    """This rank's routed experts as two packed weights and two grouped products (report, 2.1.2).

    Parameters: `weight1` [E, 2I, H], gate rows first; `weight2` [E, H, I].
    """

    def __init__(
        self, num_local_experts: int, config: Any, pg_collection: Any = None, name: str | None = None
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.dp_group = pg_collection.ep, pg_collection.expt_dp
        inner, hidden = config.moe_ffn_hidden_size, config.hidden_size
        self.weight1 = self._parameter((num_local_experts, 2 * inner, hidden), config.init_method)
        self.weight2 = self._parameter((num_local_experts, hidden, inner), config.output_layer_init_method)

    def _parameter(self, shape: tuple[int, ...], initialise: Any) -> torch.nn.Parameter:
        config = self.config
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            for expert in parameter.data:
                initialise(expert)
        # The marks that core's own expert linears carry: not summed over data parallel but over expert data
        # parallel, and never a copy of another tensor-parallel rank's.
        parameter.allreduce = not config.expert_model_parallel_size > 1  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=1, stride=1)
        return parameter

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Output [T, H] of tokens [T, H] sorted by expert; counts [E_local]; probs [T]."""
        tokens = permuted_local_hidden_states
        if tokens.shape[0] == 0:
            # Every weight takes part, so that every rank has a gradient to reduce.
            return tokens + 0.0 * (self.weight1.sum() + self.weight2.sum()), None
        ends = tokens_per_expert.to(device=tokens.device).cumsum(0).to(torch.int32)
        gate, up = grouped_mm(tokens, self.weight1.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        inner = self.config.activation_func(gate) * up
        inner = (inner * permuted_probs.unsqueeze(-1)).to(tokens.dtype)
        return grouped_mm(inner, self.weight2.transpose(1, 2), offs=ends), None

    def backward_dw(self) -> None:
        """Nothing is delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The keys and global shapes of core's SequentialMLP; each tensor is a view of the packed weight."""
        total = self.ep_group.size() * self.num_local_experts
        first = self.ep_group.rank() * self.num_local_experts
        sharded: ShardedStateDict = {}
        for index in range(self.num_local_experts):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + index, total))
            for layer, weight in (("linear_fc1", self.weight1), ("linear_fc2", self.weight2)):
                tensor = ShardedTensor.from_rank_offsets(
                    f"{prefix}experts.{layer}.weight",
                    weight.data[index],
                    *offsets,
                    replica_id=(0, 0, self.dp_group.rank()),
                    prepend_axis_num=len(offsets),
                )
                key = f"{prefix}local_experts.{index}.{layer}.weight"
                sharded[key] = (
                    apply_swiglu_sharded_factory(tensor, offsets) if layer == "linear_fc1" else tensor
                )
        return sharded
