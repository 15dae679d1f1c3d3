"""V3's router: balance by a bias that only selects, no loss that fights the language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from dsplugins.contracts import Plan, Problem, Range, RouterFactory, Settings
from dsplugins.hookspecs import hookimpl
from dsplugins.schedules import Schedule

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import MLATransformerConfig


@dataclass(frozen=True)
class AuxFreeOptions:
    """Options of aux_free."""

    sequence_loss: Annotated[float, Range(0.0)] = 1e-4
    """alpha of the sequence-wise balance loss (report, 2.1.2 eq. 17-20 and 4.2); 0 turns it off."""
    update_rate: Annotated[Schedule, Range(0.0, 1.0)] = Schedule.constant(0.001)
    """gamma: how far a bias moves after each step (report, 4.2: 0.001, then 0 from 14.3T tokens on)."""


class AuxFree:
    """Auxiliary-loss-free balance with node-limited top-k (report, 2.1.2; arXiv 2408.15664).

    Sigmoid affinity; bias for selection only; groups by `moe_router_num_groups` and
    `moe_router_group_topk`; weights renormalised and times `moe_router_topk_scaling_factor`.
    """

    Options = AuxFreeOptions
    contract = ">=1.0,<2"

    def __init__(self, options: AuxFreeOptions) -> None:
        self.options = options

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The fields that the router reads, alive in each step."""
        return {
            "model.moe_router_score_function": "sigmoid",
            "model.moe_router_load_balancing_type": "seq_aux_loss",
            "model.moe_aux_loss_coeff": self.options.sequence_loss,
            "model.moe_router_bias_update_rate": self.options.update_rate,
        }

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Sizes of experts and groups, and fields that would have no effect."""
        from dsplugins.plugins.router.sizes import router_problems

        return list(router_problems(settings.model, "aux_free", "moe_router_pre_softmax"))

    @hookimpl
    def ds_router(self, config: MLATransformerConfig) -> RouterFactory:
        """AuxFreeRouter, for decoder and MTP alike."""
        from dsplugins.plugins.router.aux_free_router import AuxFreeRouter

        factory: Any = AuxFreeRouter
        return factory
