"""Multi-token prediction: one more block that predicts the token after the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dsplugins.contracts import Plan, Problem, Range, Settings
from dsplugins.hookspecs import hookimpl
from dsplugins.schedules import Schedule

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import MLATransformerConfig


@dataclass(frozen=True)
class MtpOptions:
    """Options of mtp."""

    weight: Annotated[Schedule, Range(0.0)] = Schedule.constant(0.3)
    """Lambda, what the MTP loss is multiplied by; V3: 0.3 for 10T tokens, then 0.1 (section 4.2)."""
    depth: Annotated[int, Range(1, None)] = 1
    """D, blocks in a chain, each predicting one token further; V3 has 1. The loss is their mean."""


class Mtp:
    """Multi-token prediction (arXiv 2412.19437, section 2.2; megatron-core's `MultiTokenPredictionBlock`).

    h' = M [RMSNorm(embedding of the next token); RMSNorm(main model's output, after its final norm)], one
    more decoder layer, an own norm, then the main model's head. Embedding and head are shared. The layer
    is made from the last decoder layer's spec, so attention, router and experts are those of the recipe
    (core's own builders take their stock ones here). Core divides the loss by the T - k tokens that have a
    target, the paper by T.
    """

    Options = MtpOptions
    contract = ">=1.0,<2"

    def __init__(self, options: MtpOptions) -> None:
        self.options = options

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Depth and weight; the weight may follow a schedule."""
        return {
            "model.mtp_num_layers": self.options.depth,
            "model.mtp_loss_scaling_factor": self.options.weight,
        }

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Chains that are longer than the decoder or the samples."""
        depth, layers, sequence = self.options.depth, settings.model.num_layers, plan.data.seq_length
        if layers < 1:
            yield Problem(
                "mtp continues a decoder, and model.num_layers=0 gives it none",
                key="model.num_layers",
                remedy="at least one layer",
            )
        elif depth > layers:
            yield Problem(
                f"plugins.mtp.depth={depth} is more than model.num_layers={layers}",
                key="plugins.mtp.depth",
                remedy="fewer blocks than the decoder has layers; V3 has 1",
            )
        if depth >= sequence:
            yield Problem(
                f"plugins.mtp.depth={depth} leaves no token to predict in data.seq_length={sequence}",
                key="plugins.mtp.depth",
                remedy="longer samples, or fewer blocks",
            )

    @hookimpl
    def ds_mtp(
        self, config: MLATransformerConfig, decoder: TransformerBlockSubmodules, backend: BackendSpecProvider
    ) -> ModuleSpec:
        """Spec of a block whose layers are the decoder's last one."""
        from megatron.core.transformer.multi_token_prediction import (
            MultiTokenPredictionBlock,
            MultiTokenPredictionBlockSubmodules,
            MultiTokenPredictionLayer,
            MultiTokenPredictionLayerSubmodules,
        )
        from megatron.core.transformer.spec_utils import ModuleSpec

        assert decoder.layer_specs, "the whole decoder's specs, not those of a stage without layers"
        # Core's own builder asks the backend for a norm without saying which kind.
        norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=False)
        layer = ModuleSpec(
            module=MultiTokenPredictionLayer,
            submodules=MultiTokenPredictionLayerSubmodules(
                enorm=norm,
                hnorm=norm,
                layer_norm=norm,
                eh_proj=backend.column_parallel_linear(),
                mtp_model_layer=decoder.layer_specs[-1],
            ),
        )
        return ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * self.options.depth),
        )
