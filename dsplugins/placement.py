"""Where embedding, MTP and head stand: on the ends of the pipeline, or where a layout puts them.

megatron-core reads layers and MTP off `pipeline_model_parallel_layout`, but takes the first stage for that of
the embedding, and the last for that of the head, whatever a layout of a class of its own says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


def embeds(config: Any, vp_stage: int | None) -> bool:
    """Whether chunk `vp_stage` of this rank starts with the embedding."""
    if config.pipeline_model_parallel_layout is None:
        return parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    return LayerType.embedding in _here(config, vp_stage)


def has_head(config: Any, vp_stage: int | None) -> bool:
    """Whether chunk `vp_stage` of this rank ends with the head and the loss."""
    if config.pipeline_model_parallel_layout is None:
        return parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    return LayerType.loss in _here(config, vp_stage)


def embedding_ranks(layout: PipelineParallelLayerLayout) -> Callable[[Sequence[int]], list[int]]:
    """Of the ranks of a pipeline, those that hold the embedding or MTP's copy of it."""
    holders = {LayerType.embedding, LayerType.mtp}
    stages = [stage for stage, chunks in enumerate(layout.layout) if any(map(holders.intersection, chunks))]
    return lambda ranks: [ranks[stage] for stage in stages]


def _here(config: Any, vp_stage: int | None) -> Sequence[LayerType]:
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return config.pipeline_model_parallel_layout.layout[rank][vp_stage or 0]


__all__ = ["embedding_ranks", "embeds", "has_head"]
