"""The module of `grouped`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import grouped_mm

from dsplugins.plugins.experts.cpu_products import FewShapes

if TYPE_CHECKING:
    from dsplugins.contracts import GroupedProducts


class TorchProducts:
    """The products in the format of their operands, through torch's grouped one or `cpu_products`."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def up(self, tokens: torch.Tensor, weight: torch.Tensor, splits: torch.Tensor) -> torch.Tensor:
        """See `contracts.GroupedProducts`."""
        return _product(tokens, weight, splits)

    def down(
        self, inner: torch.Tensor, probs: torch.Tensor, weight: torch.Tensor, splits: torch.Tensor
    ) -> torch.Tensor:
        """See `contracts.GroupedProducts`."""
        active = self._activated(inner, probs.unsqueeze(-1))
        return _product(active, weight, splits)

    def _activated(self, inner: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """SwiGLU times probs: [T, 2I], [T, 1] -> [T, I]; `bias_activation_fusion` takes core's fused one."""
        if self.config.bias_activation_fusion:
            stored = self.config.activation_func_fp8_input_store
            return weighted_bias_swiglu_impl(inner, None, scale, stored)
        gate, up = inner.chunk(2, dim=-1)
        return (self.config.activation_func(gate) * up * scale).to(inner.dtype)


def _product(tokens: torch.Tensor, weight: torch.Tensor, splits: torch.Tensor) -> torch.Tensor:
    """[T, K], [E, N, K] -> [T, N]."""
    if tokens.device.type == "cpu" and tokens.dtype == torch.bfloat16:
        found: torch.Tensor = FewShapes.apply(tokens, weight, splits.tolist())
        return found
    ends = splits.to(device=tokens.device).cumsum(0).to(torch.int32)
    return grouped_mm(tokens, weight.transpose(1, 2), offs=ends)


class GroupedExperts(MegatronModule):
    """This rank's routed experts as two packed weights and two grouped products (report, 2.1.2).

    Parameters: `weight1` [E, 2I, H], gate rows first; `weight2` [E, H, I]; E experts of this rank. Every
    element goes through the operations of core's SequentialMLP in their order, so on CPU outputs and
    gradients have the same bits.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        products: Callable[[], GroupedProducts],
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.products = products()
        self.num_local_experts = num_local_experts
        self.ep_group, self.dp_group = pg_collection.ep, pg_collection.expt_dp
        inner, hidden = config.moe_ffn_hidden_size, config.hidden_size
        self.weight1 = self._parameter((num_local_experts, 2 * inner, hidden), config.init_method, 1, 2)
        self.weight2 = self._parameter((num_local_experts, hidden, inner), config.output_layer_init_method, 2)

    def _parameter(
        self, shape: tuple[int, ...], initialise: Any, split: int, stride: int = 1
    ) -> torch.nn.Parameter:
        config = self.config
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            for expert in parameter.data:
                initialise(expert)
        # The marks of core's own expert linears (tensor_parallel/layers.py): gradients are summed over the
        # experts' data-parallel group wherever it isn't the dense one, and clipping counts each rank's.
        own_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        parameter.allreduce = not own_groups  # type: ignore[attr-defined]
        parameter.stacked = True  # type: ignore[attr-defined]  # the norm of gradients is taken expert by expert
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=split, stride=stride)
        return parameter

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Output [T, H] of tokens [T, H] sorted by expert; counts [E]; probs [T] scale the inner
        activation.
        """
        tokens, probs = permuted_local_hidden_states, permuted_probs
        if tokens.shape[0] == 0:
            # Weights and probs take part all the same: each has a gradient to reduce or to send back, and
            # a rank that leaves one out leaves the others waiting.
            nothing = (tokens * probs.unsqueeze(-1)).to(tokens.dtype)
            return nothing + 0.0 * (self.weight1.sum() + self.weight2.sum()), None
        inner = self.products.up(tokens, self.weight1, tokens_per_expert)
        return self.products.down(inner, probs, self.weight2, tokens_per_expert), None

    def backward_dw(self) -> None:
        """Nothing is delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The keys and global shapes of core's SequentialMLP; each tensor is a view of the packed weight."""
        alone = bool((metadata or {}).get("singleton_local_shards"))
        total = self.ep_group.size() * self.num_local_experts
        sharded: ShardedStateDict = {}
        for index in range(self.num_local_experts):
            expert = self.ep_group.rank() * self.num_local_experts + index
            offsets = sharded_offsets if alone else (*sharded_offsets, (len(sharded_offsets), expert, total))
            name = f"{prefix}experts.{expert}." if alone else f"{prefix}experts."
            for layer, weight in (("linear_fc1", self.weight1), ("linear_fc2", self.weight2)):
                tensor: Any = ShardedTensor.from_rank_offsets(
                    f"{name}{layer}.weight",
                    weight.data[index],
                    *offsets,
                    replica_id=(0, 0, self.dp_group.rank()),
                    prepend_axis_num=len(offsets),
                )
                if layer == "linear_fc1":  # gate and up are stored as two halves
                    tensor = apply_swiglu_sharded_factory(tensor, offsets, alone)
                sharded[f"{prefix}local_experts.{index}.{layer}.weight"] = tensor
        return sharded
