"""Experts one after the other: megatron-core's own module, the reference."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dsplugins.contracts import ExpertsFactory
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig


class Sequential:
    """Each local expert is an MLP of the backend's linears, run in turn (core's SequentialMLP).

    In BF16 on a CPU an expert's rows are rounded up to few sizes, as those of `grouped` are.
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_experts(self, config: MLATransformerConfig, backend: BackendSpecProvider) -> ExpertsFactory:
        """SequentialMLP of the backend's linears; of experts that the number format brings where it does, and
        of core's in few shapes where oneDNN would compile a kernel for each.
        """
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe.experts import SequentialMLP

        submodules = MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(),
            linear_fc2=backend.row_parallel_linear(),
            activation_func=backend.activation_func(),
        )
        from dsplugins.plugins.experts.sequential_experts import FewShapesMLP, SequentialExperts

        if brought := getattr(backend, "expert_mlp", None):
            return partial(SequentialExperts, submodules=submodules, mlp=brought())
        if config.bf16:
            return partial(SequentialExperts, submodules=submodules, mlp=FewShapesMLP)
        return partial(SequentialMLP, submodules=submodules)
