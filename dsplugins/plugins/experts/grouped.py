"""Experts in two grouped matrix products, on CPU and CUDA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dsplugins.contracts import ExpertsFactory, Plan, Problem, Settings
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig


class Grouped:
    """All local experts at once through `torch.nn.functional.grouped_mm`.

    Same arithmetic and same checkpoint keys as `sequential`; weights are packed, [E, 2I, H] and
    [E, H, I]. The backend's linears are not used.
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """What the packed experts don't do."""
        problems = []
        if plan.layout.expert_tensor > 1:
            said = "parallel.expert_tensor > 1: grouped experts are whole on a rank"
            problems.append(Problem(said, "parallel.expert_tensor", "set it to 1, or name sequential"))
        if not settings.model.gated_linear_unit or settings.model.add_bias_linear:
            said = "grouped experts are SwiGLU without biases"
            remedy = "model.gated_linear_unit: true and model.add_bias_linear: false, or name sequential"
            problems.append(Problem(said, "plugins.grouped", remedy))
        return problems

    @hookimpl
    def ds_experts(self, config: MLATransformerConfig, backend: BackendSpecProvider) -> ExpertsFactory:
        """GroupedExperts."""
        from dsplugins.plugins.experts.grouped_experts import GroupedExperts

        return GroupedExperts
