"""The model itself: embedding, decoder, MTP, head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from dsplugins.contracts import Plan, Problem, Range, Settings
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


@dataclass(frozen=True)
class GptOptions:
    """Options of gpt."""

    dense_layers: Annotated[int, Range(0, None)] = 0
    """First layers with a dense FFN instead of experts; V3 has 3 of 61 (arXiv 2412.19437, section 4.2)."""


class Gpt:
    """megatron-core's `GPTModel`: embedding, decoder, MTP block and a head that is not tied to the embedding.

    Logits stay split over the vocabulary (`parallel_output`); the loss comes out per token, [B, S].
    """

    Options = GptOptions
    contract = ">=1.0,<2"

    def __init__(self, options: GptOptions) -> None:
        self.options = options

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Which layers have experts."""
        if not plan.model.get("num_moe_experts"):
            return {}
        dense = self.options.dense_layers
        experts = max(0, int(plan.model.get("num_layers", 0)) - dense)
        return {"model.moe_layer_freq": [0] * dense + [1] * experts}

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Dense layers that leave no experts, biased shared experts, a vocabulary that can't be split."""
        dense, layers = self.options.dense_layers, settings.model.num_layers
        if dense and not settings.model.num_moe_experts:
            yield Problem(
                f"plugins.gpt.dense_layers={dense} means nothing without experts: all layers are dense",
                key="plugins.gpt.dense_layers",
                remedy="leave it out, or give model.num_moe_experts",
            )
        elif dense and dense >= layers:
            yield Problem(
                f"plugins.gpt.dense_layers={dense} leaves none of model.num_layers={layers} for the experts",
                key="plugins.gpt.dense_layers",
                remedy=f"at most {layers - 1}",
            )
        if settings.model.add_bias_linear and settings.model.moe_shared_expert_intermediate_size:
            yield Problem(
                "model.add_bias_linear=True: megatron-core's shared experts have no biases",
                key="model.add_bias_linear",
                remedy="set it to false, or leave model.moe_shared_expert_intermediate_size out",
            )
        tensor = plan.layout.tensor
        if settings.vocab_size % tensor:
            yield Problem(
                f"parallel.tensor={tensor} does not divide model.vocab_size={settings.vocab_size}",
                key="model.vocab_size",
                remedy="round the vocabulary up to a multiple",
            )

    @hookimpl
    def ds_model(self, plan: Plan, settings: Settings) -> Callable[..., torch.nn.Module]:
        """Factory of this rank's `GPTModel` chunks."""
        from megatron.core.models.gpt import GPTModel
        from megatron.core.process_groups_config import ProcessGroupCollection

        config = settings.model

        def factory(
            *,
            decoder: TransformerBlockSubmodules,
            mtp: ModuleSpec | None,
            pre_process: bool,
            post_process: bool,
            vp_stage: int | None,
        ) -> Any:
            with _without_deprecation_warning():
                return GPTModel(
                    config=config,
                    transformer_layer_spec=decoder,
                    vocab_size=settings.vocab_size,
                    max_sequence_length=plan.data.seq_length,
                    pre_process=pre_process,
                    post_process=post_process,
                    fp16_lm_cross_entropy=False,
                    parallel_output=True,
                    share_embeddings_and_output_weights=False,
                    position_embedding_type="rope",
                    rotary_percent=config.rotary_percent,
                    rotary_base=config.rotary_base,
                    mtp_block_spec=mtp,
                    pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
                    vp_stage=vp_stage,
                )

        return factory


@contextmanager
def _without_deprecation_warning() -> Iterator[None]:
    """Hold back GPTModel's advice to move to HybridModel, which needs TransformerEngine in 0.19."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("GPTModel IS DEPRECATED")

    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
