"""The classic router: balance by an auxiliary loss over the micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dsplugins.contracts import Plan, Problem, Range, RouterFactory, Settings
from dsplugins.hookspecs import hookimpl
from dsplugins.schedules import Schedule

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import MLATransformerConfig


@dataclass(frozen=True)
class AuxLossOptions:
    """Options of aux_loss."""

    coeff: Annotated[Schedule, Range(0.0)] = Schedule.constant(1e-3)
    """Weight of the balance loss (Switch Transformer, eq. 4); 0 is routing without any balance."""
    score: Literal["softmax", "sigmoid"] = "sigmoid"
    """Affinity of token and expert; V3's own comparison uses sigmoid on both sides (report, 4.5.2)."""


class AuxLoss:
    """Top-k routing with the auxiliary loss of GShard and Switch, over the tokens of a micro-batch."""

    Options = AuxLossOptions
    contract = ">=1.0,<2"

    def __init__(self, options: AuxLossOptions) -> None:
        self.options = options

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The fields that the router reads, alive in each step."""
        return {
            "model.moe_router_score_function": self.options.score,
            "model.moe_router_load_balancing_type": "aux_loss",
            "model.moe_aux_loss_coeff": self.options.coeff,
        }

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Sizes of experts and groups, and fields that would have no effect."""
        from dsplugins.plugins.router.sizes import router_problems

        return list(router_problems(settings.model, "aux_loss"))

    @hookimpl
    def ds_router(self, config: MLATransformerConfig) -> RouterFactory:
        """AuxLossRouter, for decoder and MTP alike."""
        from dsplugins.plugins.router.aux_loss_router import AuxLossRouter

        factory: Any = AuxLossRouter
        return factory
